"""Budgets: what fraction of the latents is used, which levels exist, how training draws one and how sampling
schedules them.

*budget* is a fraction in (0, 1] of the J latents of a window; a *level* is a number of latents J~ that a model was
trained for.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from elit.errors import ElitError
from elit.seeding import derive_seed

Rounding = Literal["nearest", "down"]


def check_budget(budget: float, name: str = "budget") -> float:
    """The budget as a float.

    Raises:
        ElitError: it is not a number in (0, 1].
    """
    if isinstance(budget, bool) or not isinstance(budget, int | float) or not 0 < budget <= 1:
        raise ElitError(f"{name} is {budget!r}; it must be a number in (0, 1], the fraction of latents to use")
    return float(budget)


def to_level(budget: float, levels: Sequence[int], num_latents: int, rounding: Rounding = "nearest") -> int:
    """The level that a budget means: J * budget, to the nearest level, or down (published checkpoints: ``int(J *
    budget)``).

    Of two levels equally near, the larger. A budget below the smallest level gives the smallest.
    ``to_level(k / J, ...)`` is k for every level k.

    Args:
        levels: valid numbers of latents, ascending.
        num_latents: J.
    """
    wanted = check_budget(budget) * num_latents
    if rounding == "down":
        wanted += 1e-9 * num_latents  # k / J * J may fall below k in floating point
        return max((level for level in levels if level <= wanted), default=levels[0])
    return min(levels, key=lambda level: (abs(level - wanted), -level))


def draw_level(levels: Sequence[int], seed: int, step: int, weights: Sequence[float] | None = None) -> int:
    """The level of one training step: uniform over the levels, or by weights.

    A function of (seed, step) alone, so that all processes agree without talking and a resumed run draws the same.

    Raises:
        ElitError: another number of weights than of levels.
    """
    if weights is not None and len(weights) != len(levels):
        raise ElitError(f"{len(weights)} weights for {len(levels)} levels; give one for each")
    return random.Random(derive_seed(seed, "budget", step)).choices(levels, weights)[0]


@dataclass(frozen=True)
class BudgetByNoise:
    """A schedule by noise level: ``budgets[i]`` while t is above ``thresholds[i]``, the last one below all of them.

    ``BudgetByNoise([0.5], [0.25, 1.0])`` spends a quarter of the latents while t > 0.5 and all of them afterwards.

    Raises:
        ElitError: a budget outside (0, 1], thresholds that do not fall, or counts that do not fit.
    """

    thresholds: Sequence[float]
    budgets: Sequence[float]

    def __post_init__(self) -> None:
        if len(self.budgets) != len(self.thresholds) + 1:
            raise ElitError(
                f"a budget schedule with {len(self.thresholds)} thresholds needs {len(self.thresholds) + 1} budgets, "
                f"not {len(self.budgets)}"
            )
        if any(low >= high for high, low in zip(self.thresholds, self.thresholds[1:], strict=False)):
            raise ElitError(f"thresholds {list(self.thresholds)} of a budget schedule must fall, from noise to data")
        for budget in self.budgets:
            check_budget(budget)

    def __call__(self, t: float) -> float:
        return next((b for h, b in zip(self.thresholds, self.budgets, strict=False) if t > h), self.budgets[-1])


Budget: TypeAlias = float | Sequence[float] | Callable[[float], float]
"""One budget, one per step, or a function of the noise level t (:class:`BudgetByNoise` or any other)."""


def budget_per_step(budget: Budget | None, times: Sequence[float], name: str = "budget") -> list[float | None]:
    """Spells a budget out, one per sampling step; ``None`` (everything) stays None.

    Args:
        times: noise level at which each step starts.

    Raises:
        ElitError: a budget outside (0, 1], or a list whose length is not the number of steps.
    """
    if budget is None:
        return [None] * len(times)
    if callable(budget):
        return [check_budget(budget(t), name) for t in times]
    if isinstance(budget, Sequence) and not isinstance(budget, str):
        if len(budget) != len(times):
            raise ElitError(f"{name} lists {len(budget)} values for {len(times)} sampling steps; give one per step")
        return [check_budget(b, name) for b in budget]
    return [check_budget(budget, name)] * len(times)


def default_min_latents(num_latents: int) -> int:
    """J_min of the paper: 1 of 16 at 256px, 4 of 64 at 512px."""
    return max(1, math.floor(num_latents / 16))


def valid_levels(num_latents: int, smallest: int | None = None, step: int = 1) -> tuple[int, ...]:
    """The levels of windows of J latents, ascending: the multiples of ``step`` from ``smallest`` to J.

    Args:
        smallest: J_min; None is the paper's. Where it is no multiple of ``step``, the next one is the first level.

    Raises:
        ElitError: a smallest level outside 1..J, or a J that is no multiple of ``step``.
    """
    smallest = default_min_latents(num_latents) if smallest is None else smallest
    if not 1 <= smallest <= num_latents:
        raise ElitError(f"min_latents is {smallest}; a window has 1 to {num_latents} latents")
    if num_latents % step:
        raise ElitError(f"a window of {num_latents} latents has no runs of {step}, which this model merges")
    return tuple(range(math.ceil(smallest / step) * step, num_latents + 1, step))
