"""Decides what runs next: pure bookkeeping of jobs, without tensors, threads or a clock of its own."""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(eq=False, slots=True)
class Job:
    """One image as the scheduler sees it.

    Attributes:
        arrival, deadline: on the clock of the caller, in seconds.
        steps: number of steps.
        level: J~ of its next step.
        step: how many steps are complete.
        started: when its first step began; None while it waits.
    """

    arrival: float
    deadline: float
    steps: int
    level: int
    step: int = 0
    started: float | None = None


class Scheduler:
    """Holds the jobs that are not finished and chooses those of the next batch.

    Args:
        max_work: the most rows in a batch.
    """

    def __init__(self, max_work: float = 8) -> None:
        self.max_work = max_work
        self._jobs: dict[Job, None] = {}  # in order of arrival

    def __len__(self) -> int:
        return len(self._jobs)

    def __iter__(self) -> Iterator[Job]:
        return iter(self._jobs)

    @property
    def queued(self) -> int:
        """How many jobs have not started."""
        return sum(job.started is None for job in self._jobs)

    def add(self, job: Job) -> None:
        """Takes a job."""
        self._jobs[job] = None

    def remove(self, job: Job) -> None:
        """Forgets a job that is finished, failed or cancelled."""
        del self._jobs[job]

    def next_batch(self, now: float) -> list[Job]:
        """Chooses the jobs that take their next evaluation together, the earliest deadline first."""
        batch = sorted(self._jobs, key=lambda job: job.deadline)[: max(1, int(self.max_work))]
        for job in batch:
            if job.started is None:
                job.started = now
        return batch
