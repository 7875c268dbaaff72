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
        unsustained: a level that cannot keep up with the arrivals of late gets this share of those two: a queue that
            would only grow is not left to fill all the time that there is.
        every: decide once in so many batches.

    Raises:
        ElitError: a value out of range.
    """

    attainment: float = 0.95
    headroom: float = 0.8
    raise_headroom: float = 0.6
    unsustained: float = 0.5
    every: int = 4

    def __post_init__(self) -> None:
        shares = (self.attainment, self.headroom, self.raise_headroom, self.unsustained)
        if not all(0 < share <= 1 for share in shares) or self.raise_headroom > self.headroom or self.every < 1:
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
        arrivals: evaluations per second that came in lately.
    """

    jobs: Sequence[Job]
    now: float
    costs: CostTable
    max_work: float
    slowdown: float = 1.0
    arrivals: float = 0.0


def choose_level(load: Load, current: int, levels: Sequence[int], options: ControllerOptions) -> int:
    """Chooses the highest level at which enough jobs are predicted to keep their deadlines; the lowest where none does.

    Args:
        current: the level until now.
        levels: to choose from, ascending.
    """
    for level in reversed(levels[1:]):
        if is_allowed(load, level, level > current, options):
            return level
    return levels[0]


def is_allowed(load: Load, level: int, rises: bool, options: ControllerOptions) -> bool:
    """Tells whether a level leaves enough time."""
    headroom = options.raise_headroom if rises else options.headroom
    if not sustains(load, level):
        headroom *= options.unsustained
    return keeps(load, level, headroom, options.attainment)


def sustains(load: Load, level: int) -> bool:
    """Tells whether full batches at a level keep up with the arrivals of late, taken to be like the present jobs."""
    if not load.jobs:
        return True
    slots, seconds = side_by_side(load, level, at_most=None)
    return load.arrivals * seconds <= slots


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
    slots, seconds = side_by_side(load, level, len(load.jobs))
    free = [load.now] * slots
    for job in load.jobs:
        finish = free[0] + job.remaining * seconds
        heapreplace(free, finish)
        yield finish


def side_by_side(load: Load, level: int, at_most: int | None) -> tuple[int, float]:
    """Returns how many jobs like the mean of all run in a batch at a level, and the seconds that the batch takes.

    Args:
        at_most: so many, where more would fit; None is no limit.
    """
    first: dict[int, float] = {}
    behind: dict[int, float] = {}
    for job in load.jobs:
        together, apart = job.rows(job.at(level))
        add(first, together, job.remaining)
        add(behind, apart, job.remaining)
    remaining = sum(job.remaining for job in load.jobs)
    work = sum(load.costs.work(each) * count for rows in (first, behind) for each, count in rows.items()) / remaining
    slots = max(1, int(load.max_work / work))
    slots = slots if at_most is None else min(slots, at_most)
    share = slots / remaining
    forwards = (add({}, rows, share) for rows in (first, behind))
    return slots, load.slowdown * sum(load.costs.forward(rows) for rows in forwards)
