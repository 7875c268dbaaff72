"""The controller: the highest level that keeps the deadlines, within every request's bounds, and without swinging."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elit import ElitError
from elit.serving import ControllerOptions, CostTable
from elit.serving.controller import Load, choose_level
from elit.serving.job import Job

LEVELS = (1, 2, 4)
COSTS = CostTable(LEVELS, (1, 2, 4), ((0.4, 0.5, 1.0), (0.6, 0.7, 1.4), (1.0, 1.25, 2.5)))
"""At the highest level one row takes 1 s, two take 1.25 s, and so does every further pair; the lowest costs 0.4."""
OPTIONS = ControllerOptions(attainment=1.0, headroom=1.0, raise_headroom=0.5)


def load(*jobs: Job, max_work: float = 2.0) -> Load:
    return Load(jobs, 0.0, COSTS, draw(st.floats(0.5, 8)), draw(st.floats(0.5, 2)))


@given(loads(), st.sampled_from(LEVELS), st.floats(1.0, 3.0))
@settings(max_examples=100, deadline=None)
def test_more_time_never_means_a_lower_level(some: Load, current: int, longer: float) -> None:
    options = ControllerOptions()
    level = choose_level(some, current, LEVELS, options)
    assert level in LEVELS
    for each in some.jobs:
        each.deadline *= longer
    assert choose_level(some, current, LEVELS, options) >= level


@given(loads(), st.sampled_from(LEVELS))
@settings(max_examples=100, deadline=None)
def test_a_decision_that_is_repeated_stays(some: Load, current: int) -> None:
    level = choose_level(some, current, LEVELS, ControllerOptions())
    assert choose_level(some, level, LEVELS, ControllerOptions()) == level


@pytest.mark.parametrize(
    "wrong", [{"headroom": 0.5}, {"attainment": 0.0}, {"headroom": 1.5}, {"raise_headroom": 0.0}, {"every": 0}]
)
def test_wrong_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ElitError, match="raise_headroom is not above headroom"):
        ControllerOptions(**wrong)  # type: ignore[arg-type]
