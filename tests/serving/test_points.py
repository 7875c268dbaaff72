"""Operating points: the pairs of a level and a number of steps that a calibration predicts to be worth their cost."""

from itertools import pairwise

import pytest

from elit import ElitError
from elit.analysis import Calibration
from elit.analysis.calibration import GuidanceTable, StepTable
from elit.analysis.plan import constant_plan
from elit.serving import CostTable
from elit.serving.points import OperatingPoint, points_at, points_from

LEVELS = (1, 2, 4)
COSTS = CostTable(LEVELS, (1, 8), ((1.0, 4.0), (1.0, 5.0), (1.0, 10.0)))
TABLE = GuidanceTable(None, [[0.5, 0.005, 0.0]] * 2, [1.0] * 3, [1] * 3, [1.0] * 3, [1] * 3)
CALIBRATION = Calibration(
    levels=list(LEVELS),
    num_latents=4,
    times=[1.0, 0.5],
    tables=[TABLE],
    seconds=[1.0] * 3,
    flops=[1] * 3,
    seconds_skipped=[1.0] * 3,
    flops_skipped=[1] * 3,
    overhead=0.0,
    step_tables=[StepTable(None, [0.4, 0.2, 0.1, 0.05, 0.025], [])],
    solver="euler",
    stamp={"path": "linear"},
)
"""Level 2 is nearly as good as level 4 at half the cost, and level 1 is worse than a quarter of the steps."""


def test_points_are_those_that_nothing_cheaper_is_better_than() -> None:
    points = points_from(CALIBRATION, COSTS, steps=16)
    assert points[-1] == OperatingPoint(4, 1.0)
    assert points[-2] == OperatingPoint(2, 1.0)
    assert {point.level for point in points[1:-1]} == {2}
    assert points[:2] == (OperatingPoint(1, 0.25), OperatingPoint(2, 0.25))
    costs = [point.steps * COSTS.work(point.level) for point in points]
    errors = [constant_plan(CALIBRATION, TABLE, point.level, round(16 * point.steps)).error for point in points]
    assert all(a < b for a, b in pairwise(costs)) and all(a > b for a, b in pairwise(errors))


def test_floors_are_kept() -> None:
    points = points_from(CALIBRATION, COSTS, steps=16, min_steps=11, min_budget=1.0)
    assert [(point.level, round(16 * point.steps)) for point in points] == [(4, 11), (4, 12), (4, 14), (4, 16)]
    assert points_from(CALIBRATION, COSTS, 16, 16, 1.0) == points_at([4])


@pytest.mark.parametrize("min_steps", [0, 17])
def test_a_wrong_floor_is_told(min_steps: int) -> None:
    with pytest.raises(ElitError, match="it must be between 1 and steps, 16"):
        points_from(CALIBRATION, COSTS, 16, min_steps)
