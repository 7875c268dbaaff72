"""The controller: the highest level that keeps the deadlines, within every request's bounds, and without swinging."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elit import ElitError
from elit.serving import ControllerOptions, CostTable
from elit.serving.controller import Load, choose_point, keeps, predicted_finishes, sustains
from elit.serving.job import Job
from elit.serving.points import OperatingPoint, points_at

LEVELS = (1, 2, 4)
POINTS = _, _, HIGHEST = points_at(LEVELS)
PAIRS = (OperatingPoint(2, 0.25), OperatingPoint(2, 0.5), *POINTS[1:])
COSTS = CostTable(LEVELS, (1, 2, 4), ((0.4, 0.5, 1.0), (0.6, 0.7, 1.4), (1.0, 1.25, 2.5)))
"""At the highest level one row takes 1 s, two take 1.25 s, and so does every further pair; the lowest costs 0.4."""
OPTIONS = ControllerOptions(attainment=1.0, headroom=1.0, raise_headroom=0.5)


def load(*jobs: Job, max_work: float = 2.0) -> Load:
    return Load(jobs, 0.0, COSTS, max_work)


def job(deadline: float, steps: int = 4, **changes: object) -> Job:
    return Job(0.0, steps, 4, deadline=deadline, **changes)  # type: ignore[arg-type]


def level_of(load: Load, current: int, options: ControllerOptions) -> int:
    """The level that is chosen, of those with all steps."""
    return choose_point(load, OperatingPoint(current), POINTS, options).level


def test_costs_are_interpolated() -> None:
    assert COSTS.forward({4: 3}) == pytest.approx((1.25 + 2.5) / 2)
    assert COSTS.forward({3: 1}) == pytest.approx((0.6 + 1.0) / 2)
    assert COSTS.forward({4: 8}) == pytest.approx(5.0)  # as the largest batch, twice
    assert COSTS.forward({1: 1, 4: 1}) == pytest.approx((0.5 + 1.25) / 2)
    assert CostTable(LEVELS, COSTS.batch_sizes, COSTS.seconds, 0.1).forward({1: 1, 4: 1}) == pytest.approx(0.975)
    assert COSTS.forward({}) == 0
    assert (COSTS.work(4), COSTS.work(1)) == (1.0, 0.4)
    assert COSTS.saturating_work() == 2  # four rows at once are no faster than two and two


def test_finishes_are_those_of_list_scheduling() -> None:
    jobs = [job(9, steps) for steps in (4, 2, 1)]
    assert list(predicted_finishes(load(*jobs), HIGHEST)) == pytest.approx(
        [5.0, 2.5, 3.75]
    )  # two run, the third follows
    assert list(predicted_finishes(load(*jobs, max_work=1), HIGHEST)) == pytest.approx([4.0, 6.0, 7.0])
    assert list(predicted_finishes(load(jobs[0]), HIGHEST)) == pytest.approx([4.0])
    assert list(predicted_finishes(load(), HIGHEST)) == []


@pytest.mark.parametrize(("deadline", "level"), [(5.0, 4), (4.9, 2), (2.8, 2), (2.7, 1), (0.1, 1)])
def test_the_highest_level_that_keeps_the_deadlines_is_chosen(deadline: float, level: int) -> None:
    assert level_of(load(job(deadline), job(deadline)), 4, OPTIONS) == level


def test_the_level_rises_only_with_room_to_spare() -> None:
    two = load(job(6.0), job(6.0))
    assert [level_of(two, current, OPTIONS) for current in LEVELS] == [2, 2, 4]  # 5.0 s is above half of 6
    assert level_of(load(job(10.0), job(10.0)), 1, OPTIONS) == 4


def test_a_share_of_jobs_may_miss() -> None:
    jobs = [job(1.0), *[job(100.0)] * 19]
    assert not keeps(load(*jobs), HIGHEST, 1.0, 1.0)
    assert keeps(load(*jobs), HIGHEST, 1.0, 0.95)
    assert not keeps(load(*jobs), HIGHEST, 1.0, 0.96)
    assert keeps(load(job(1.0, is_too_long=True)), HIGHEST, 1.0, 1.0)


def test_no_load_and_no_deadline_mean_the_highest_level() -> None:
    assert level_of(load(), 1, OPTIONS) == 4
    assert level_of(load(*[job(float("inf"))] * 500), 1, OPTIONS) == 4


def test_a_level_that_cannot_keep_up_with_the_arrivals_has_less_time() -> None:
    def level(arrivals: float) -> int:
        return level_of(replace(load(job(6.0), job(6.0)), arrivals=arrivals), 4, OPTIONS)

    assert sustains(replace(load(job(6.0), job(6.0)), arrivals=1.6), HIGHEST)  # two evaluations take 1.25 s
    assert not sustains(replace(load(job(6.0), job(6.0)), arrivals=1.7), HIGHEST)
    assert (level(1.6), level(1.7)) == (4, 2)  # 5.0 s fit into 6, and not into half of them


def test_steps_are_left_out_of_what_has_not_begun_and_leaves_them_open() -> None:
    half = OperatingPoint(4, 0.5)
    begun = job(9, 4, min_steps=1, evaluation=1)
    begun.begin(0.0, HIGHEST)
    jobs = [begun, job(9, 4), job(9, 4, min_steps=1), job(9, 4, min_steps=3), job(9, 5, min_steps=1, evaluations=2)]
    assert [each.remaining_at(half) for each in jobs] == [3, 4, 2, 3, 3]
    assert list(predicted_finishes(load(*jobs[1:3], max_work=1), half)) == pytest.approx([4.0, 6.0])
    assert choose_point(load(*[job(2.5, 4, min_steps=1)] * 2), HIGHEST, (half, HIGHEST), OPTIONS) == half
    steady = replace(load(jobs[2]), arrivals=3.0)  # of which half is left: 1.6 a second can be done
    assert sustains(steady, half) and not sustains(steady, HIGHEST)


def test_guidance_counts_by_its_terms() -> None:
    for kind, seconds in (("none", 1.0), ("cfg", 1.25), ("ag", (0.5 + 1.25) / 2), ("ccfg", 1.4)):
        guided = job(100.0, steps=1, weak=kind, weak_level=1)
        assert list(predicted_finishes(load(guided), HIGHEST)) == pytest.approx([seconds]), kind


@st.composite
def loads(draw: st.DrawFn) -> Load:
    count = draw(st.integers(1, 12))
    jobs = []
    for _ in range(count):
        steps = draw(st.integers(1, 6))
        jobs.append(
            job(
                draw(st.floats(0.1, 60)),
                steps,
                budget_is_fixed=draw(st.booleans()),
                min_level=draw(st.sampled_from((0, *LEVELS))),
                min_steps=draw(st.sampled_from((None, 1, 3))),
                evaluation=draw(st.integers(0, steps - 1)),
            )
        )
    return Load(jobs, 0.0, COSTS, draw(st.floats(0.5, 8)), draw(st.floats(0.5, 2)))


@given(loads(), st.sampled_from(PAIRS), st.floats(1.0, 3.0))
@settings(max_examples=100, deadline=None)
def test_more_time_never_means_a_worse_point(some: Load, current: OperatingPoint, longer: float) -> None:
    options = ControllerOptions()
    point = choose_point(some, current, PAIRS, options)
    for each in some.jobs:
        each.deadline *= longer
    assert PAIRS.index(choose_point(some, current, PAIRS, options)) >= PAIRS.index(point)


@given(loads(), st.sampled_from(PAIRS))
@settings(max_examples=100, deadline=None)
def test_a_decision_that_is_repeated_stays(some: Load, current: OperatingPoint) -> None:
    point = choose_point(some, current, PAIRS, ControllerOptions())
    assert choose_point(some, point, PAIRS, ControllerOptions()) == point


@pytest.mark.parametrize(
    "wrong",
    [
        {"headroom": 0.5},
        {"attainment": 0.0},
        {"headroom": 1.5},
        {"raise_headroom": 0.0},
        {"unsustained": 0.0},
        {"every": 0},
    ],
)
def test_wrong_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ElitError, match="raise_headroom is not above headroom"):
        ControllerOptions(**wrong)  # type: ignore[arg-type]
