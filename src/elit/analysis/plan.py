"""Plans sampling: the steps, a budget for each of them and the weak budget of guidance that come closest to the full
model within a cost.

Of a number of steps S, the predicted error of a sample is ``sqrt(D(S)^2 + (sum_s dt e(t_s, J~_s))^2)``: the error D of
too few steps and that of lower budgets are independent, while the errors of a trajectory's steps add up (they mostly
point the same way; the sum is what they can be at most). For one S that is a knapsack: of each step one level, least
error within the cost. It is small enough to be solved exactly, by dynamic programming over costs in units of a
4000th of the limit; a Lagrangian sweep would find only the convex hull of its solutions.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor

from elit.analysis.calibration import (
    STEPS,
    Calibration,
    GuidanceTable,
    StepTable,
    cache_from,
    choose_levels,
    guidance_from,
    is_current,
    root_mean_square,
)
from elit.analysis.measure import Latency, time_interleaved
from elit.atomic import write_json
from elit.conditions import Condition
from elit.errors import ElitError
from elit.flow import Cache, Guidance, sample
from elit.flow.solvers import SOLVERS, time_grid
from elit.models import Model

CostKind = Literal["seconds", "flops"]
TableKind = Literal["seconds", "flops", "error"]
MIN_STEPS = 4  # of fewer, the discretisation error is no guide to quality
CANDIDATE_STEPS = 5  # numbers of steps that a choice by quality looks at
COST_UNITS = 4000


@dataclass(frozen=True)
class Plan:
    """How to sample. ``sample(model, labels, **plan.arguments())`` follows it.

    Attributes:
        budgets: of the strong term, one per step.
        guidance: with its weak budget; None is none.
        cache: when the core is skipped; None is never.
        solver: the calibrated one.
        path: likewise.
        seconds: predicted, of a call that samples one batch of the calibrated size.
        flops: of one sample, all steps and terms.
        error: predicted root mean square distance to the sample of full budget and many steps.
        stamp: the calibration's.
        choice: the scores that the plan was chosen by, see :func:`~elit.analysis.choice.choose`; None where it is the
            plan of least predicted error.
    """

    budgets: list[float]
    guidance: Guidance | None
    cache: Cache | None
    solver: str
    path: str
    seconds: float
    flops: int
    error: float
    stamp: dict[str, Any]
    choice: dict[str, Any] | None = None

    @property
    def steps(self) -> int:
        return len(self.budgets)

    def arguments(self) -> dict[str, Any]:
        """Returns the arguments of :func:`elit.sample` that follow the plan."""
        return {
            "steps": self.steps,
            "budget": self.budgets,
            "guidance": self.guidance,
            "cache": self.cache,
            "solver": self.solver,
            "path": self.path,
        }

    def save(self, path: Path) -> None:
        """Writes the plan to a JSON file.

        Raises:
            ElitError: it cannot be written.
        """
        write_json(path, asdict(self))

    @classmethod
    def load(cls, path: Path) -> "Plan":
        """Reads a plan from its file.

        Raises:
            ElitError: the file is not there, is no plan, or is one of another version of the library.
        """
        try:
            values = json.loads(Path(path).read_text())
            current = is_current(values["stamp"])
            made = {"guidance": guidance_from(values["guidance"]), "cache": cache_from(values.get("cache"))}
            plan = cls(**{**values, **made}) if current else None
        except OSError as error:
            raise ElitError(f"cannot read the plan {path}: {error.strerror or error}") from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ElitError(f"{path} is no plan of elit plan, or a damaged one") from error
        if plan is None:
            raise ElitError(f"{path} was planned by another version of elit; make it again with elit plan")
        return plan


def predict(
    calibration: Calibration, table: GuidanceTable, levels: Sequence[int], stepping: StepTable | None = None
) -> Plan:
    """Predicts cost and error of a schedule: one level per step, of those that are calibrated.

    Args:
        stepping: with which cache; None is without.
    """
    stepping = calibration.step_tables[0] if stepping is None else stepping
    costs, flops, errors = (
        _step_table(calibration, table, stepping, len(levels), kind) for kind in ("seconds", "flops", "error")
    )
    at = range(len(levels)), [calibration.levels.index(level) for level in levels]
    return Plan(
        budgets=[level / calibration.num_latents for level in levels],
        guidance=table.guidance,
        cache=stepping.cache,
        solver=calibration.solver,
        path=calibration.stamp["path"],
        seconds=float(costs[at].sum()) + calibration.overhead,
        flops=int(flops[at].sum()),
        error=float(np.hypot(stepping.error(len(levels)), errors[at].sum())),
        stamp=calibration.stamp,
    )


def constant_plan(
    calibration: Calibration, table: GuidanceTable, level: int, steps: int, stepping: StepTable | None = None
) -> Plan:
    """Makes the plan of one level for all steps."""
    return predict(calibration, table, [level] * steps, stepping)


def solve(calibration: Calibration, limit: float, cost: CostKind = "seconds", min_steps: int = MIN_STEPS) -> Plan:
    """Finds the plan of least predicted error whose cost stays within the limit.

    Args:
        limit: seconds of a call for one batch of the calibrated size, or FLOPs of a sample.

    Raises:
        ElitError: nothing is that cheap (the cheapest possible is named), or the limit is no number above 0.
    """
    return min(_plans(calibration, limit, cost, min_steps), key=lambda plan: (plan.error, getattr(plan, cost)))


def candidate_plans(
    calibration: Calibration, limit: float, steps: int, cost: CostKind = "seconds", min_steps: int = MIN_STEPS
) -> dict[str, Plan]:
    """Makes plans within the limit that may look best, by name, for :func:`~elit.analysis.choice.choose`.

    They are the plan of :func:`solve` (``least error``), those of :func:`baseline_plans`, with ``cfg`` the best plan
    whose weak term has the lowest level, and for several numbers of steps the best plan and the best constant budget.
    Plans that are the same are listed once.

    Args:
        limit, cost, min_steps: as for :func:`solve`.
        steps: the usual number, as for :func:`baseline_plans`.

    Raises:
        ElitError: as for :func:`solve`.
    """
    plans = _plans(calibration, limit, cost, min_steps)

    def best(among: Iterable[Plan]) -> Plan | None:
        return min(among, key=lambda plan: (plan.error, getattr(plan, cost)), default=None)

    found = {"least error": best(plans)}
    found |= {
        name: plan for name, plan in baseline_plans(calibration, limit, steps, cost).items() if plan.steps >= min_steps
    }
    if len(calibration.tables) > 1:
        found["lowest weak budget"] = best(plan for plan in plans if plan.guidance == calibration.tables[1].guidance)
    for count in choose_levels(sorted({plan.steps for plan in plans}), CANDIDATE_STEPS):
        constants = (constant_plan(calibration, calibration.tables[0], level, count) for level in calibration.levels)
        found[f"{count} steps"] = best(plan for plan in plans if plan.steps == count)
        found[f"{count} steps, one budget"] = best(plan for plan in constants if getattr(plan, cost) <= limit)
    different: dict[Any, tuple[str, Plan]] = {}
    for name, plan in found.items():
        if plan is not None:  # FLOPs tell caches apart: one that skips nothing changes nothing
            different.setdefault((tuple(plan.budgets), plan.guidance, plan.flops), (name, plan))
    return dict(different.values())


def baseline_plans(calibration: Calibration, limit: float, steps: int, cost: CostKind = "seconds") -> dict[str, Plan]:
    """Makes what one would do within the limit without a planner, guided as asked; those that exist, by name.

    ``constant budget``: the usual ``steps`` at the highest budget that they leave. ``best constant``: the steps
    and the one budget of least predicted error. ``fewer steps``: the highest level. ``cached``: the highest level with
    the steps and the cache of least predicted error.
    """
    table, highest = calibration.tables[0], calibration.levels[-1]

    def within(counts: Sequence[int], levels: Sequence[int] = calibration.levels) -> list[Plan]:
        plans = (constant_plan(calibration, table, level, n) for level in levels for n in counts)
        return [plan for plan in plans if getattr(plan, cost) <= limit]

    cached = (constant_plan(calibration, table, highest, n, s) for s in calibration.step_tables[1:] for n in STEPS)
    found = {
        "constant budget": max(within([steps]), key=lambda p: p.budgets[0], default=None),
        "best constant": min(within(STEPS), key=lambda p: p.error, default=None),
        "fewer steps": max(within(STEPS, [highest]), key=lambda p: p.steps, default=None),
        "cached": min((p for p in cached if getattr(p, cost) <= limit), key=lambda p: p.error, default=None),
    }
    return {name: plan for name, plan in found.items() if plan is not None}


def measure_seconds(
    model: Model, labels: Condition | Sequence[int] | None, plans: Sequence[Plan], batch_size: int, rounds: int = 9
) -> list[Latency]:
    """Times sampling one batch as each plan says: in turns, so that a busy moment of the machine meets all of them."""

    def run(plan: Plan) -> None:
        sample(model, labels, seeds=range(batch_size), batch_size=batch_size, **plan.arguments())

    return time_interleaved([partial(run, plan) for plan in plans], model.device, rounds, warmup=2)


def measure_error(samples: Tensor, reference: Tensor) -> float:
    """Measures what a plan predicts: the distance between samples (B, C, H, W) of the same noise, per element."""
    return root_mean_square(samples - reference)


def format_number(value: float, digits: int = 3) -> str:
    """Writes a number with so many digits, and without an exponent where it is large."""
    return f"{value:,.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}"


def format_cost(value: float, cost: CostKind) -> str:
    """Writes a cost with its unit: ``80.1 ms`` or ``12.3 GFLOPs``."""
    return f"{format_number(value * 1e3)} ms" if cost == "seconds" else f"{format_number(value / 1e9)} GFLOPs"


def _plans(calibration: Calibration, limit: float, cost: CostKind, min_steps: int) -> list[Plan]:
    """Returns the plan of least error within the limit for each number of steps, way to guide and cache that has one.

    Raises:
        ElitError: as for :func:`solve`.
    """
    if not limit > 0:
        raise ElitError(f"the limit is {limit}; it must be a number above 0")
    counts = [steps for steps in STEPS if steps >= min_steps]
    if not counts:
        raise ElitError(f"min_steps is {min_steps}; plans have up to {STEPS[-1]} steps")
    plans = [
        predict(calibration, table, levels, stepping)
        for table in calibration.tables
        for steps in counts
        for stepping in calibration.step_tables
        if stepping.cache is None or not all(stepping.runs(steps))
        if (levels := _schedule(calibration, table, stepping, steps, limit, cost)) is not None
    ]
    if not plans:
        cheapest = min(
            (
                constant_plan(calibration, table, calibration.levels[0], counts[0], stepping)
                for table in calibration.tables
                for stepping in calibration.step_tables
            ),
            key=lambda plan: getattr(plan, cost),
        )
        raise ElitError(
            f"nothing costs {format_cost(limit, cost)} or less; the least is "
            f"{format_cost(getattr(cheapest, cost), cost)}: {counts[0]} steps at budget {cheapest.budgets[0]:.4g}"
        )
    return plans


def _schedule(
    calibration: Calibration, table: GuidanceTable, stepping: StepTable, steps: int, limit: float, cost: CostKind
) -> list[int] | None:
    """Returns the levels of least error within the limit, or None where the lowest level is too dear.

    Steps that skip the core have the level of the step whose effect they use, so each such run is one choice.
    """
    left = limit - (calibration.overhead if cost == "seconds" else 0)
    starts = np.flatnonzero(stepping.runs(steps))
    costs, errors = (
        np.add.reduceat(_step_table(calibration, table, stepping, steps, kind), starts) for kind in (cost, "error")
    )
    if costs.min(axis=1).sum() > left:
        return None
    chosen = knapsack(costs / left, errors)
    if chosen is None:
        return None
    lengths = np.diff(starts, append=steps)
    return [calibration.levels[i] for i, length in zip(chosen, lengths, strict=True) for _ in range(length)]


def knapsack(costs: np.ndarray, errors: np.ndarray, units: int = COST_UNITS) -> list[int] | None:
    """Chooses one column of each row, so that the costs sum to 1 at most and the sum of errors is least; None where
    nothing is that cheap.

    Costs are rounded up to ``1 / units``, so that the sum never exceeds 1.

    Args:
        costs: (rows, columns); those below 0 count as 0.
        errors: (rows, columns).
    """
    whole = np.ceil(costs * units - 1e-9).astype(int).clip(0)  # a difference of measured times may be below 0
    best, choices = np.zeros(units + 1), []
    for cost, error in zip(whole, errors, strict=True):
        options = np.full((len(cost), units + 1), np.inf)
        for column, c in enumerate(cost):
            if c <= units:
                options[column, c:] = best[: units + 1 - c] + error[column]
        choices.append(options.argmin(axis=0))
        best = options.min(axis=0)
    if not np.isfinite(best[-1]):
        return None
    at, chosen = units, []
    for cost, choice in zip(whole[::-1], choices[::-1], strict=True):
        chosen.append(int(choice[at]))
        at -= cost[chosen[-1]]
    return chosen[::-1]


def _step_table(
    calibration: Calibration, table: GuidanceTable, stepping: StepTable, steps: int, kind: TableKind
) -> np.ndarray:
    """Returns the cost or the error of every step at every level: (steps, levels)."""
    times = time_grid(calibration.solver, steps)
    if kind == "error":
        return -times.diff().numpy()[:, None] * calibration.errors_at(table, times[:-1].numpy())
    plain, guided = np.array(getattr(calibration, kind)), np.array(getattr(table, kind))
    skipped = np.array(getattr(calibration, f"{kind}_skipped")), np.array(getattr(table, f"{kind}_skipped"))
    on = np.zeros(steps + 1, bool) if table.guidance is None else table.guidance.active(times).numpy()
    costs, weak_is_known = np.zeros((steps, len(plain))), False
    for step, runs in enumerate(stepping.runs(steps)):
        # A solver of second order evaluates at the end of each step too, but for the last.
        evaluations = 1 if step == steps - 1 else SOLVERS[calibration.solver].evaluations
        for at in range(step, step + evaluations):
            if runs:
                costs[step] += guided if on[at] else plain
            elif on[at] and not weak_is_known:  # the weak term's core runs, for guidance was off when the other's did
                costs[step] += skipped[0] + guided - plain
            else:
                costs[step] += skipped[int(on[at])]
            weak_is_known = weak_is_known or bool(on[at])
    return costs
