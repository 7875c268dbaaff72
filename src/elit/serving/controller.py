"""The budget controller: from the load to the highest budget that keeps the latency objective, as a pure function.

One level holds for all jobs that leave their budget open. Finishes are predicted by list scheduling: as many jobs as
fit into a batch run side by side, and when one ends, the next in order takes its place.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import heapreplace

from elit.errors import ElitError
from elit.serving.costs import CostTable
from elit.serving.job import Job, add


@dataclass(frozen=True)
class ControllerOptions:
    """Settings of the controller.

    Attributes:
        attainment: the share of jobs that should keep their deadline.
        headroom: a level is kept while jobs are predicted to finish within this share of their time.
        raise_headroom: the level rises only where they would finish within this, smaller, share: so it does not swing.
        every: decide once in so many batches.

    Raises:
        ElitError: a value out of range.
    """

    attainment: float = 0.95
    headroom: float = 0.8
    raise_headroom: float = 0.6
    every: int = 4

    def __post_init__(self) -> None:
        if not 0 < self.attainment <= 1 or not 0 < self.raise_headroom <= self.headroom <= 1 or self.every < 1:
            raise ElitError(f"{self}: shares lie in (0, 1], raise_headroom is not above headroom, every is at least 1")


@dataclass(frozen=True)
class Load:
    """What the controller looks at.

    Attributes:
        jobs: all that are in flight or waiting, in the order in which they are served.
        now: on the clock of their deadlines, in seconds.
        costs: of this machine.
        max_work: the most work in a batch, in rows at the highest level.
        slowdown: how much longer batches take than the costs say, lately.
    """

    jobs: Sequence[Job]
    now: float
    costs: CostTable
    max_work: float
    slowdown: float = 1.0


def choose_level(load: Load, current: int, levels: Sequence[int], options: ControllerOptions) -> int:
    """Chooses the highest level at which enough jobs are predicted to keep their deadlines; the lowest where none does.

    Args:
        current: the level until now.
        levels: to choose from, ascending.
    """
    for level in reversed(levels[1:]):
        if keeps(load, level, options.headroom if level <= current else options.raise_headroom, options.attainment):
            return level
    return levels[0]


def keeps(load: Load, level: int, headroom: float, attainment: float) -> bool:
    """Tells whether enough jobs are predicted to finish within a share of the time that they have."""
    may_miss = int((1 - attainment) * sum(not job.is_too_long for job in load.jobs) + 1e-9)
    for job, finish in zip(load.jobs, predicted_finishes(load, level), strict=True):
        due = job.arrival + headroom * (job.deadline - job.arrival)
        may_miss -= finish > due and not job.is_too_long
        if may_miss < 0:
            return False
    return True


def predicted_finishes(load: Load, level: int) -> Iterator[float]:
    """Predicts when each job is finished where the controller chooses a level, and nothing else comes."""
    if not load.jobs:
        return
    slots, seconds = side_by_side(load, level)
    free = [load.now] * slots
    for job in load.jobs:
        finish = free[0] + job.remaining * seconds
        heapreplace(free, finish)
        yield finish


def side_by_side(load: Load, level: int) -> tuple[int, float]:
    """Returns how many jobs run in a batch at a level, and the seconds that it takes, for the mean of all jobs."""
    first: dict[int, float] = {}
    behind: dict[int, float] = {}
    for job in load.jobs:
        together, apart = job.rows(job.at(level))
        add(first, together, job.remaining)
        add(behind, apart, job.remaining)
    remaining = sum(job.remaining for job in load.jobs)
    work = sum(load.costs.work(each) * count for rows in (first, behind) for each, count in rows.items()) / remaining
    slots = max(1, min(len(load.jobs), int(load.max_work / work)))
    share = slots / remaining
    forwards = (add({}, rows, share) for rows in (first, behind))
    return slots, load.slowdown * sum(load.costs.forward(rows) for rows in forwards)
