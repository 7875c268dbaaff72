"""The budget controller: from the load to the best operating point that keeps the objective, as a pure function.

One operating point, a level and a share of the steps, holds for all jobs that leave these open. Finishes are predicted
by list scheduling: as many jobs as fit into a batch run side by side, and when one ends, the next in order takes its
place.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import heapreplace

from elit.errors import ElitError
from elit.serving.costs import CostTable
from elit.serving.job import Job, add
from elit.serving.points import OperatingPoint


@dataclass(frozen=True)
class ControllerOptions:
    """Settings of the controller.

    Attributes:
        attainment: the share of jobs that should keep their deadline.
        headroom: a point is kept while jobs are predicted to finish within this share of their time.
        raise_headroom: a better one is taken only where they would finish within this, smaller, share: so the point
            does not swing.
        unsustained: a point that cannot keep up with the arrivals of late gets this share of those two: a queue that
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
        arrivals: evaluations per second that were asked for lately.
    """

    jobs: Sequence[Job]
    now: float
    costs: CostTable
    max_work: float
    slowdown: float = 1.0
    arrivals: float = 0.0


def choose_point(
    load: Load, current: OperatingPoint, points: Sequence[OperatingPoint], options: ControllerOptions
) -> OperatingPoint:
    """Chooses the best point at which enough jobs are predicted to keep their deadlines; the cheapest where none does.

    Args:
        current: the point until now.
        points: to choose from, from the cheapest to the best.
    """
    now_at = points.index(current)
    for at in range(len(points) - 1, 0, -1):
        if is_allowed(load, points[at], at > now_at, options):
            return points[at]
    return points[0]


def is_allowed(load: Load, point: OperatingPoint, rises: bool, options: ControllerOptions) -> bool:
    """Tells whether a point leaves enough time."""
    headroom = options.raise_headroom if rises else options.headroom
    if not sustains(load, point):
        headroom *= options.unsustained
    return keeps(load, point, headroom, options.attainment)


def sustains(load: Load, point: OperatingPoint) -> bool:
    """Tells whether full batches at a point keep up with the arrivals of late, taken to be like the present jobs."""
    if not load.jobs:
        return True
    slots, seconds = side_by_side(load, point, at_most=None)
    given = sum(job.in_all_at(point) for job in load.jobs) / sum(job.asked for job in load.jobs)
    return load.arrivals * given * seconds <= slots


def keeps(load: Load, point: OperatingPoint, headroom: float, attainment: float) -> bool:
    """Tells whether enough jobs are predicted to finish within a share of the time that they have."""
    may_miss = int((1 - attainment) * sum(not job.is_too_long for job in load.jobs) + 1e-9)
    for job, finish in zip(load.jobs, predicted_finishes(load, point), strict=True):
        due = job.arrival + headroom * (job.deadline - job.arrival)
        may_miss -= finish > due and not job.is_too_long
        if may_miss < 0:
            return False
    return True


def predicted_finishes(load: Load, point: OperatingPoint) -> Iterator[float]:
    """Predicts when each job is finished where the controller chooses a point, and nothing else comes."""
    if not load.jobs:
        return
    slots, seconds = side_by_side(load, point, len(load.jobs))
    free = [load.now] * slots
    for job in load.jobs:
        finish = free[0] + job.remaining_at(point) * seconds
        heapreplace(free, finish)
        yield finish


def side_by_side(load: Load, point: OperatingPoint, at_most: int | None) -> tuple[int, float]:
    """Returns how many jobs like the mean of all run in a batch at a point, and the seconds that the batch takes.

    Args:
        at_most: so many, where more would fit; None is no limit.
    """
    first: dict[int, float] = {}
    behind: dict[int, float] = {}
    evaluations = 0
    for job in load.jobs:
        together, apart = job.rows(job.level_at(point))
        remaining = job.remaining_at(point)
        add(first, together, remaining)
        add(behind, apart, remaining)
        evaluations += remaining
    work = sum(load.costs.work(each) * count for rows in (first, behind) for each, count in rows.items()) / evaluations
    slots = max(1, int(load.max_work / work))
    slots = slots if at_most is None else min(slots, at_most)
    share = slots / evaluations
    forwards = (add({}, rows, share) for rows in (first, behind))
    return slots, load.slowdown * sum(load.costs.forward(rows) for rows in forwards)
