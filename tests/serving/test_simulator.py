"""The scheduler and the controller on a virtual clock: nobody is lost or starved, budgets follow the load both ways."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elit.serving import ControllerOptions, CostTable
from elit.serving.job import Job, batch_seconds
from elit.serving.points import OperatingPoint, points_at
from elit.serving.scheduler import PATIENCE, Scheduler, SchedulerOptions
from elit.serving.simulator import Outcome, attainment, simulate

LEVELS, FULL = (1, 2, 4, 8), 8
POINTS = points_at(LEVELS)
STEPS = 8
SIZES, SHARES = (1, 2, 4, 8), (0.35, 0.45, 0.6, 1)
COSTS = CostTable(LEVELS, SIZES, tuple(tuple(0.002 + share * n * 0.008 for n in SIZES) for share in SHARES))
OPTIONS = SchedulerOptions(POINTS, max_work=8.0, latency_objective=2.5)
CAPACITY = 8 / COSTS.forward({FULL: 8}) / STEPS  # images per second at full budget


def poisson(load: float, seconds: float, seed: int = 0, start: float = 0.0) -> list[Job]:
    """Jobs that arrive at random, at a multiple of the capacity at full budget."""
    draws = np.random.default_rng(seed).exponential(1 / (load * CAPACITY), int(4 * load * CAPACITY * seconds) + 20)
    times = np.cumsum(draws)
    return [Job(start + float(time), STEPS, FULL) for time in times[times < seconds]]


def budget(outcomes: Sequence[Outcome]) -> float:
    """The mean budget that was delivered."""
    return float(np.mean([level for outcome in outcomes for level in outcome.job.delivered])) / FULL


@st.composite
def some_jobs(draw: st.DrawFn) -> list[Job]:
    jobs = []
    for _ in range(draw(st.integers(1, 40))):
        guidance = draw(st.sampled_from(("none", "cfg", "ag", "ccfg")))
        jobs.append(
            Job(
                draw(st.floats(0, 3)),
                draw(st.integers(1, 10)),
                draw(st.sampled_from(LEVELS)),
                draw(st.integers(1, 2)),
                draw(st.booleans()),
                draw(st.sampled_from((0, *LEVELS))),
                draw(st.sampled_from((None, 1, 4))),
                guidance,  # type: ignore[arg-type]
                weak_level=1,
                guided=draw(st.floats(0, 1)),
                latency_objective=draw(st.sampled_from((None, 0.01, 1.0, 50.0))),
            )
        )
    return sorted(jobs, key=lambda job: job.arrival)


@given(some_jobs(), st.floats(0.5, 20), st.integers(1, 50), st.booleans(), st.sampled_from((None, 0.3, 5.0)))
@settings(max_examples=100, deadline=None)
def test_every_job_gets_what_it_asked_for(
    jobs: list[Job], max_work: float, queue_limit: int, refuse_late: bool, objective: float | None
) -> None:
    points = (OperatingPoint(1, 0.25), *POINTS)
    scheduler = Scheduler(COSTS, SchedulerOptions(points, max_work, objective, queue_limit, refuse_late))
    asked = {job: job.level for job in jobs}

    def seconds(batch: Sequence[Job]) -> float:
        assert len(batch) == 1 or sum(job.work(job.level, COSTS) for job in batch) <= max_work + 1e-9
        assert len(set(map(id, batch))) == len(batch) and scheduler.queued <= queue_limit
        return batch_seconds(batch, COSTS)

    outcomes = simulate(scheduler, jobs, seconds)
    assert {outcome.job for outcome in outcomes} == set(jobs) and len(outcomes) == len(jobs)
    assert len(scheduler) == 0
    for outcome in outcomes:
        job = outcome.job
        if outcome.finish is None:
            assert job.delivered == [] and (refuse_late or queue_limit < len(jobs))
        elif job.budget_is_fixed:
            assert job.delivered == [asked[job]] * job.steps
        else:
            assert len(job.delivered) == job.steps
            assert job.steps == job.asked_steps if job.min_steps is None else job.steps <= job.asked_steps
            assert job.steps >= min(job.min_steps or job.asked_steps, job.asked_steps)
            assert set(job.delivered) <= {max(level, job.min_level) for level in LEVELS}
        if outcome.finish is not None and objective is None and job.latency_objective is None:
            assert job.budget_is_fixed or job.deadline == float("inf")


@pytest.mark.parametrize("seed", range(2))
def test_below_capacity_images_are_at_full_budget_and_above_it_the_objective_is_kept(seed: int) -> None:
    budgets = []
    for load in (0.5, 1.5, 2.0):
        outcomes = simulate(Scheduler(COSTS, OPTIONS), poisson(load, 60, seed))
        assert attainment(outcomes) >= 0.95
        budgets.append(budget(outcomes))
    assert budgets[0] == 1.0
    assert 1 > budgets[1] > budgets[2] > LEVELS[0] / FULL
    fixed = simulate(Scheduler(COSTS, replace(OPTIONS, points=points_at([FULL]))), poisson(2.0, 60, seed))
    assert attainment(fixed) < 0.3


def test_steps_and_levels_together_go_further_than_either() -> None:
    """Only for jobs that leave their steps open, and back to all of them when the load falls."""

    def jobs() -> list[Job]:
        found = [*poisson(0.3, 10), *poisson(4.0, 30, start=10), *poisson(0.3, 20, start=40)]
        for each in found[::2]:
            each.min_steps = 2
        return found

    together = (OperatingPoint(2, 0.25), OperatingPoint(2, 0.5), *points_at(LEVELS[1:]))
    outcomes = {
        points: simulate(Scheduler(COSTS, replace(OPTIONS, points=points, refuse_late=True)), jobs())
        for points in (together, POINTS)
    }
    assert attainment(outcomes[together]) > attainment(outcomes[POINTS]) + 0.1
    given = {each.job.steps for each in outcomes[together] if each.job.min_steps and 12 < each.job.arrival < 40}
    assert min(given) == 2 and max(given) < STEPS
    assert all(each.job.steps == STEPS for each in outcomes[together] if each.job.min_steps is None)
    assert all(each.job.steps == STEPS for each in outcomes[together] if not 9 < each.job.arrival < 44)


def test_the_objective_survives_times_that_are_not_those_of_the_table() -> None:
    draws = np.random.default_rng(0)

    def slower(batch: Sequence[Job]) -> float:
        return 1.4 * batch_seconds(batch, COSTS) * float(draws.lognormal(0, 0.2))

    outcomes = simulate(Scheduler(COSTS, OPTIONS), poisson(1.3, 60), slower)
    assert attainment(outcomes) >= 0.95


class Credulous(Scheduler):
    """Believes its costs."""

    slowdown = 1.0


def test_a_machine_that_is_suddenly_half_as_fast_is_noticed() -> None:
    def found(scheduler: type[Scheduler], start: float, end: float) -> list[Outcome]:
        clock = [0.0]

        def seconds(batch: Sequence[Job]) -> float:
            took = (2 if 20 < clock[0] < 60 else 1) * batch_seconds(batch, COSTS)
            clock[0] += took
            return took

        options = replace(OPTIONS, refuse_late=True)
        outcomes = simulate(scheduler(COSTS, options), poisson(0.8, 80), seconds)
        return [each for each in outcomes if start <= each.job.arrival < end]

    assert attainment(found(Scheduler, 0, 80)) >= 0.95
    assert budget(found(Scheduler, 5, 18)) == 1.0 and budget(found(Scheduler, 72, 80)) > 0.95
    assert 0.2 < budget(found(Scheduler, 25, 55)) < 0.7
    assert attainment(found(Credulous, 20, 60)) < attainment(found(Scheduler, 20, 60)) - 0.01


@pytest.mark.parametrize("factor", [0.1, 1.0, 8.0])
def test_costs_may_be_wrong_by_any_factor(factor: float) -> None:
    """As where they were measured in a busy moment: the machine is as fast as ever, and its costs say otherwise."""
    wrong = CostTable(LEVELS, SIZES, tuple(tuple(factor * each for each in row) for row in COSTS.seconds))
    jobs = poisson(1.5, 60)
    outcomes = simulate(Scheduler(wrong, OPTIONS), jobs, lambda batch: batch_seconds(batch, COSTS))
    settled = [each for each in outcomes if each.job.arrival > 10]
    assert attainment(settled) >= 0.95 and all(each.latency <= 2.5 for each in settled[::20])
    assert 0.2 < budget(settled) < 0.95


def test_a_batch_that_was_disturbed_changes_nothing() -> None:
    budgets = []
    for disturbed in (0, 50):
        count = iter(range(1, 10**6))

        def seconds(batch: Sequence[Job], every: int = disturbed, count: Iterator[int] = count) -> float:
            return batch_seconds(batch, COSTS) * (10 if every and next(count) % every == 0 else 1)

        budgets.append(budget(simulate(Scheduler(COSTS, OPTIONS), poisson(0.5, 60), seconds)))
    assert budgets == [1.0, 1.0]


def test_a_queue_that_would_only_grow_does_not_fill_all_the_time_that_there_is() -> None:
    """Near what the floor can serve, on a machine whose speed wanders, some time is kept in reserve."""

    def found(unsustained: float) -> float:
        draws, drift = np.random.default_rng(1), [0.0]

        def wandering(batch: Sequence[Job]) -> float:
            drift[0] = 0.98 * drift[0] + 0.2 * float(draws.normal())
            return batch_seconds(batch, COSTS) * float(np.exp(0.3 * drift[0]))

        options = replace(OPTIONS, controller=ControllerOptions(unsustained=unsustained), refuse_late=True)
        return attainment(simulate(Scheduler(COSTS, options), poisson(2.2, 60), wandering))

    assert found(0.5) > found(1.0) + 0.01


def test_budgets_go_up_again_when_the_load_falls() -> None:
    jobs = [*poisson(0.3, 10), *poisson(2.2, 20, start=10), *poisson(0.3, 20, start=30)]
    outcomes = simulate(Scheduler(COSTS, OPTIONS), jobs)
    before, within, after = (
        budget([each for each in outcomes if start <= each.job.arrival < end])
        for start, end in ((0, 9), (15, 30), (34, 60))
    )
    assert before == after == 1.0
    assert within < 0.5


def test_the_level_does_not_swing() -> None:
    """At a constant load above capacity it changes far less often than it is decided, thanks to hysteresis."""

    def changes(options: ControllerOptions) -> int:
        levels: list[int] = []
        scheduler = Scheduler(COSTS, replace(OPTIONS, controller=options))

        def seconds(batch: Sequence[Job]) -> float:
            levels.append(scheduler.point.level)
            return batch_seconds(batch, COSTS)

        simulate(scheduler, poisson(1.6, 60), seconds)
        return sum(a != b for a, b in zip(levels, levels[1:], strict=False))

    assert changes(ControllerOptions()) < 0.5 * changes(ControllerOptions(raise_headroom=0.8))


def test_more_than_the_floor_can_serve_is_refused_and_nothing_is_lost() -> None:
    jobs = poisson(5.0, 15)
    kept = simulate(Scheduler(COSTS, replace(OPTIONS, refuse_late=True)), jobs)
    refused = [outcome for outcome in kept if outcome.finish is None]
    assert len(kept) == len(jobs) and len(refused) > 0.2 * len(jobs)
    served = [outcome for outcome in kept if outcome.finish is not None]
    assert attainment(served) >= 0.95
    bounded = simulate(Scheduler(COSTS, replace(OPTIONS, queue_limit=30)), poisson(5.0, 15))
    assert attainment([outcome for outcome in bounded if outcome.finish is not None]) == 1.0  # as the queue is short


def test_nobody_starves() -> None:
    """A patient request goes first once all that is urgent came after its deadline."""
    patient = Job(0.0, STEPS, FULL, latency_objective=15.0)
    scheduler = Scheduler(COSTS, replace(OPTIONS, refuse_late=True))
    outcomes = simulate(scheduler, [patient, *poisson(4.0, 30)])
    (finish,) = (outcome.finish for outcome in outcomes if outcome.job is patient)
    assert finish is not None and finish <= 15 + 1


@given(st.floats(0, 20), st.floats(1, 4), st.booleans(), st.integers(0, 100))
@settings(max_examples=10, deadline=None)
def test_nobody_without_an_objective_starves(arrival: float, load: float, refuse_late: bool, seed: int) -> None:
    """Urgent requests come faster than they can be served, for longer than a patient one waits."""
    patient = Job(arrival, STEPS, FULL)
    urgent = poisson(load, arrival + PATIENCE + 5, seed)
    for job in urgent:
        job.latency_objective = 2.5
    scheduler = Scheduler(COSTS, replace(OPTIONS, latency_objective=None, refuse_late=refuse_late, queue_limit=100))
    outcomes = simulate(scheduler, sorted([patient, *urgent], key=lambda job: job.arrival))
    (end,) = (outcome for outcome in outcomes if outcome.job is patient)
    if end.finish is not None:  # else the queue was full
        assert end.latency <= PATIENCE + 3
    assert end.finish is not None or load > 1


def test_a_job_that_cannot_keep_the_objective_does_not_lower_the_budgets_of_others() -> None:
    long = Job(0.0, 1000, FULL, budget_is_fixed=True)
    outcomes = simulate(Scheduler(COSTS, OPTIONS), [long, *poisson(0.3, 20)])
    assert attainment(outcomes) == 1.0
    assert budget([outcome for outcome in outcomes if outcome.job is not long]) == 1.0
