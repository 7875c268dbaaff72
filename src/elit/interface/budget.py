"""Budgets and levels: how much of the latents is used, as people say it and as code passes it.

A *budget* is the fraction of a window's J latents that is used, in (0, 1]. A *level* is a whole number of latents J~
that a model was trained for. A budget becomes a level once, where a user gives it (:func:`to_level`); everything
inside passes levels.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from elit.errors import ElitError
from elit.seeding import derive_seed


def check_budget(budget: float, name: str = "budget") -> float:
    """Checks a budget and returns it as a float.

    Raises:
        ElitError: it is not a number in (0, 1].
    """
    if isinstance(budget, bool) or not isinstance(budget, int | float) or not 0 < budget <= 1:
        raise ElitError(f"{name} is {budget!r}; it must be a number in (0, 1], the fraction of latents to use")
    return float(budget)


def to_level(budget: float, levels: Sequence[int], num_latents: int, round_down: bool = False) -> int:
    """Turns a budget into the nearest of a model's levels: into the larger of two that are equally near.

    With J = 16 and the levels 1, ..., 16, a budget of 0.3 means 4.8 latents and becomes the level 5. A budget of less
    than one latent means one latent, and one above the highest level means that level. ``to_level(k / J, ...)`` is k
    for every level k.

    Args:
        levels: the trained numbers of latents, ascending.
        num_latents: J.
        round_down: take ``int(J * budget)`` latents, as the published checkpoints do, instead of the nearest number.

    Raises:
        ElitError: the budget is not in (0, 1], or means fewer latents than the lowest level.
    """
    wanted = round(check_budget(budget) * num_latents, 9)  # 9 digits: k / J * J may fall below k
    wanted = max(1.0, float(math.floor(wanted)) if round_down else wanted)
    if math.floor(wanted + 0.5) < levels[0]:
        raise ElitError(
            f"budget {budget:g} means {wanted:g} of {num_latents} latents, and the model was trained with "
            f"{listed(levels)}: take at least {levels[0] / num_latents:g}, or allow others with --untrained-levels "
            "(in Python elit.load(..., untrained_levels=True))"
        )
    return min(levels, key=lambda level: (abs(level - wanted), -level))


def listed(levels: Sequence[int]) -> str:
    """Writes levels as people read them: ``1 to 16``, or ``4, 8 and 16``."""
    if len(levels) > 2 and list(levels) == list(range(levels[0], levels[-1] + 1)):
        return f"{levels[0]} to {levels[-1]}"
    *most, last = map(str, levels)
    return f"{', '.join(most)} and {last}" if most else last


def draw_level(levels: Sequence[int], seed: int, step: int, weights: Sequence[float] | None = None) -> int:
    """Draws the level of one training step, uniformly or by weights.

    The level is a function of the seed and the step alone. So all processes draw the same one without communication,
    and a resumed run draws what it would have drawn.

    Raises:
        ElitError: another number of weights than of levels.
    """
    if weights is not None and len(weights) != len(levels):
        raise ElitError(f"{len(weights)} weights for {len(levels)} levels; give one for each")
    return random.Random(derive_seed(seed, "budget", step)).choices(levels, weights)[0]


@dataclass(frozen=True)
class BudgetByNoise:
    """Chooses the budget by the noise level: ``budgets[i]`` while t is above ``thresholds[i]``, and the last budget
    below all thresholds.

    ``BudgetByNoise([0.5], [0.25, 1.0])`` uses a quarter of the latents while t > 0.5, and all of them afterwards.

    Attributes:
        thresholds: noise levels t, falling from noise (t = 1) to data (t = 0).
        budgets: fractions of the latents in (0, 1], one more than thresholds.

    Raises:
        ElitError: a budget outside (0, 1], thresholds that do not fall, or a number of budgets that does not fit.
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


Budget: TypeAlias = float | Sequence[float] | Callable[[float], float] | Tensor
"""What :func:`elit.sample` takes as a budget: one number for everything; a list with one per step; a function of the
noise level t (:class:`BudgetByNoise` or any other); or a tensor with one per sample, (B,), or one per sample and step,
(B, steps)."""


def budget_schedule(budget: Budget | None, times: Sequence[float], name: str = "budget") -> list[float | None]:
    """Lists the budget of every sampling step of one sample. None, which means all latents, stays None.

    Args:
        budget: a :data:`Budget` other than a tensor, which :func:`budget_schedules` splits by sample first.
        times: the noise level at which each step starts.
        name: what an error calls the budget.

    Raises:
        ElitError: a budget outside (0, 1], or a list whose length is not the number of steps.
    """
    if budget is None:
        return [None] * len(times)
    if callable(budget) and not isinstance(budget, Tensor):
        return [check_budget(budget(t), name) for t in times]
    if isinstance(budget, Sequence) and not isinstance(budget, str):
        if len(budget) != len(times):
            raise ElitError(f"{name} lists {len(budget)} values for {len(times)} sampling steps; give one per step")
        return [check_budget(b, name) for b in budget]
    return [check_budget(budget, name)] * len(times)  # type: ignore[arg-type]


def budget_schedules(
    budget: Budget | None, times: Sequence[Sequence[float]], name: str = "budget"
) -> list[list[float | None]]:
    """Lists, for each of several samples, the budget of every sampling step.

    Args:
        times: of each sample, the noise level at which each of its steps starts.

    Raises:
        ElitError: a budget outside (0, 1], or a list or tensor of another length than samples and steps have.
    """
    if not isinstance(budget, Tensor) or budget.dim() == 0:
        given = budget.item() if isinstance(budget, Tensor) else budget
        return [budget_schedule(given, of_sample, name) for of_sample in times]
    longest = max(len(of_sample) for of_sample in times)
    if budget.shape not in ((len(times),), (len(times), longest)):
        raise ElitError(
            f"{name} is a tensor of shape {tuple(budget.shape)}; for {len(times)} samples of {longest} steps give "
            f"({len(times)},) or ({len(times)}, {longest})"
        )
    rows: list[float | list[float]] = budget.tolist()
    return [
        budget_schedule(row[: len(of_sample)] if isinstance(row, list) else row, of_sample, name)
        for row, of_sample in zip(rows, times, strict=True)
    ]


def default_min_latents(num_latents: int) -> int:
    """Returns J_min of the paper: 1 of 16 at 256px, 4 of 64 at 512px."""
    return max(1, math.floor(num_latents / 16))


def valid_levels(
    num_latents: int, smallest: int | None = None, step: int = 1, trained: Sequence[int] | None = None
) -> tuple[int, ...]:
    """Lists the levels of windows of J latents, ascending: those that were trained, or all multiples of ``step`` from
    ``smallest`` to J.

    Args:
        smallest: J_min; None is the paper's. Where it is no multiple of ``step``, the next one is the first level.
        trained: the levels themselves, in any order; ``smallest`` then says nothing.

    Raises:
        ElitError: a level or smallest level outside 1..J, or one (or J) that is no multiple of ``step``.
    """
    smallest = default_min_latents(num_latents) if smallest is None else smallest
    if not 1 <= smallest <= num_latents:
        raise ElitError(f"min_latents is {smallest}; a window has 1 to {num_latents} latents")
    if num_latents % step:
        raise ElitError(f"a window of {num_latents} latents has no runs of {step}, which this model merges")
    if trained is None:
        return tuple(range(math.ceil(smallest / step) * step, num_latents + 1, step))
    possible = range(step, num_latents + 1, step)
    if not trained or any(type(level) is not int or level not in possible for level in trained):
        raise ElitError(f"levels is {list(trained)}; a window of {num_latents} latents has the levels {list(possible)}")
    return tuple(sorted(set(trained)))
