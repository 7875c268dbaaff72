"""Runs the engine's scheduler and controller on a virtual clock: what a load would do to an engine, in no time."""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from elit.serving.job import Job, batch_seconds
from elit.serving.scheduler import Scheduler


@dataclass(frozen=True)
class Outcome:
    """What became of one job.

    Attributes:
        job: with the levels that were delivered.
        finish: when it was finished; None where it was refused.
    """

    job: Job
    finish: float | None

    @property
    def latency(self) -> float:
        """Seconds from arrival to the end; infinite for a job that was refused."""
        return float("inf") if self.finish is None else self.finish - self.job.arrival

    @property
    def kept(self) -> bool:
        """Whether it was finished by its deadline."""
        return self.finish is not None and self.finish <= self.job.deadline


def simulate(
    scheduler: Scheduler,
    arrivals: Iterable[Job],
    seconds: Callable[[Sequence[Job]], float] | None = None,
    overhead: float = 0.0,
) -> list[Outcome]:
    """Serves jobs on a virtual clock and returns what became of them, in the order in which they ended.

    Args:
        scheduler: an empty one.
        arrivals: jobs by the time of their arrival.
        seconds: what a batch takes; by default what the scheduler's costs predict.
        overhead: seconds between two batches.
    """
    coming = deque(arrivals)
    outcomes: list[Outcome] = []
    now = 0.0
    while coming or len(scheduler):
        if not len(scheduler):
            now = max(now, coming[0].arrival)
        while coming and coming[0].arrival <= now:
            job = coming.popleft()
            if scheduler.refusal(job, now) is None:
                scheduler.add(job)
            else:
                outcomes.append(Outcome(job, None))
        batch = scheduler.next_batch(now)
        if not batch:
            continue
        took = seconds(batch) if seconds else batch_seconds(batch, scheduler.costs)
        now += took + overhead
        scheduler.advanced(batch, took)
        for job in batch:
            if job.is_done:
                scheduler.remove(job)
                outcomes.append(Outcome(job, now))
    return outcomes


def attainment(outcomes: Sequence[Outcome]) -> float:
    """Returns the share of jobs that were finished by their deadline; refused ones were not."""
    return sum(outcome.kept for outcome in outcomes) / len(outcomes)
