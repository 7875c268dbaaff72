"""Operating points: what a controller chooses from when the load rises, from the cheapest to the best."""

from collections.abc import Sequence
from dataclasses import dataclass

from elit.analysis.calibration import STEPS, Calibration
from elit.analysis.plan import MIN_STEPS, constant_plan
from elit.errors import ElitError
from elit.serving.costs import CostTable

WORTH = 0.95  # a point is worth having where it costs at most this share of the next better one


@dataclass(frozen=True)
class OperatingPoint:
    """What the controller gives to jobs that leave it open.

    Attributes:
        level: of their next steps.
        steps: of those that begin, as a share of the steps that they ask for.
    """

    level: int
    steps: float = 1.0


def points_at(levels: Sequence[int]) -> tuple[OperatingPoint, ...]:
    """Returns the points of some levels, ascending, with all the steps that jobs ask for."""
    return tuple(OperatingPoint(level) for level in levels)


def points_from(
    calibration: Calibration, costs: CostTable, steps: int, min_steps: int = MIN_STEPS, min_budget: float = 0.0
) -> tuple[OperatingPoint, ...]:
    """Returns the pairs of a level and a number of steps that a planner's calibration predicts to be worth their cost.

    The best point is the highest level with all steps. Each one below has the least predicted error of those that cost
    less, so that the controller gives up steps and levels in the order in which that harms least.

    Args:
        calibration: tells the errors of fewer steps and of lower levels.
        costs: tell what the levels cost in a full batch, which is what an engine under load runs.
        steps: that jobs ask for.
        min_steps: the fewest of a point.
        min_budget: the least budget of a point.

    Raises:
        ElitError: ``min_steps`` is not between 1 and ``steps``.
    """
    if not 1 <= min_steps <= steps:
        raise ElitError(f"min_steps is {min_steps}; it must be between 1 and steps, {steps}")
    table, highest = calibration.tables[0], calibration.levels[-1]
    levels = [level for level in calibration.levels if level >= min_budget * calibration.num_latents - 1e-6]
    counts = sorted({steps, *(count for count in STEPS if min_steps <= count < steps), min_steps})
    pairs = [(level, count) for level in levels for count in counts]
    errors = {pair: constant_plan(calibration, table, *pair).error for pair in pairs}
    work = {(level, count): count * costs.work(level) for level, count in pairs}
    front = [(highest, steps)]
    for pair in sorted(pairs, key=lambda pair: errors[pair]):
        if work[pair] <= WORTH * work[front[-1]]:
            front.append(pair)
    return tuple(OperatingPoint(level, count / steps) for level, count in reversed(front))
