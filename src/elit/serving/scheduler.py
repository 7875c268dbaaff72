"""Decides what runs next: bookkeeping of jobs without tensors, threads or a clock of its own.

The engine and the simulator run the same code, the one on a device and the other on a virtual clock.
"""

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median

from elit.serving.controller import ControllerOptions, Load, choose_point, predicted_finishes
from elit.serving.costs import CostTable
from elit.serving.job import Job, batch_seconds
from elit.serving.points import OperatingPoint

LENIENCE = 2.0  # a job that cannot keep the objective even alone gets so many times what it takes alone
ADMITTED = 0.9  # share of the time that a job has, by which it must be predicted to finish to come in
RECENT = 15  # batches, of whose ratios of measured to predicted seconds the median counts
PATIENCE = 30.0  # seconds after which a job without an objective is as urgent as one whose deadline is then


@dataclass(frozen=True)
class SchedulerOptions:
    """Settings of a scheduler.

    Attributes:
        points: those that the controller chooses from, from the cheapest to the best.
        max_work: the most work in a batch, in rows at the highest level.
        latency_objective: seconds from arrival to the end; None for no objective, and always the best point.
        queue_limit: how many jobs may wait for their first step.
        refuse_late: whether to refuse a job that is predicted to come too close to its deadline even at the cheapest
            point.
        controller: see :class:`~elit.serving.controller.ControllerOptions`.
    """

    points: tuple[OperatingPoint, ...]
    max_work: float
    latency_objective: float | None = None
    queue_limit: int = 1024
    refuse_late: bool = False
    controller: ControllerOptions = field(default_factory=ControllerOptions)


class Scheduler:
    """Holds the jobs that are not finished, chooses those of the next batch, and asks the controller for their point.

    Args:
        costs: of this machine.
        options: see :class:`SchedulerOptions`.

    Attributes:
        point: what the controller gives at present.
        max_work: the most work in a batch at present.
    """

    def __init__(self, costs: CostTable, options: SchedulerOptions) -> None:
        self.costs, self.options, self.max_work = costs, options, options.max_work
        self.point = options.points[-1]
        self._ratios = deque([1.0] * RECENT, RECENT)
        self._jobs: dict[Job, None] = {}  # in order of arrival
        self._batches_since = 0  # the last decision
        self._memory = max(options.latency_objective or 1.0, 1.0)  # seconds after which arrivals fade
        self._arrived, self._arrived_at = 0.0, 0.0  # evaluations that came, those of long ago faded, and when
        self._last_backlog = float("-inf"), 0.0  # when it was predicted, and the seconds

    def __len__(self) -> int:
        return len(self._jobs)

    def __iter__(self) -> Iterator[Job]:
        return iter(self._jobs)

    @property
    def slowdown(self) -> float:
        """How many times what the costs say batches take lately."""
        return median(self._ratios)

    @property
    def queued(self) -> int:
        """How many jobs have not started."""
        return sum(job.started is None for job in self._jobs)

    def add(self, job: Job) -> None:
        """Takes a job and sets its deadline."""
        self._set_deadline(job)
        if not self._jobs:
            self._batches_since = self.options.controller.every  # after a pause, decide at once
        decay = math.exp((self._arrived_at - job.arrival) / self._memory)
        self._arrived, self._arrived_at = decay * self._arrived + job.remaining, job.arrival
        self._jobs[job] = None

    def remove(self, job: Job) -> None:
        """Forgets a job that is finished, failed or cancelled."""
        del self._jobs[job]

    def set_costs(self, costs: CostTable, max_work: float) -> None:
        """Takes what was measured in place of what it began with."""
        self.costs, self.max_work = costs, max_work
        self._ratios.extend([1.0] * RECENT)
        for job in self._jobs:
            self._set_deadline(job)

    def halve_work(self, jobs: Sequence[Job]) -> None:
        """Makes batches at most half as large as that of some jobs, which did not fit into memory."""
        self.max_work = min(self.max_work, sum(job.work(job.level, self.costs) for job in jobs)) / 2

    def _set_deadline(self, job: Job) -> None:
        """Sets when a job should be finished.

        One that could not keep the objective even alone, at the cheapest point that it allows, gets twice the time that
        this takes, and the controller does not look at it: it would pull everybody's budget down in vain.
        That the machine is slower than its costs say does not count here, for it may be so for a moment.
        """
        objective = job.latency_objective or self.options.latency_objective
        if objective is None:
            job.deadline = float("inf")
            return
        cheapest = self.options.points[0]
        forwards = job.rows(job.level_at(cheapest))
        alone = job.remaining_at(cheapest) * sum(self.costs.forward(rows) for rows in forwards)
        alone *= min(1.0, self.slowdown)
        job.is_too_long = alone > objective
        job.deadline = job.arrival + (LENIENCE * alone if job.is_too_long else objective)

    def next_batch(self, now: float) -> list[Job]:
        """Chooses the jobs that take their next evaluation together, and settles levels and numbers of steps."""
        jobs = sorted(self._jobs, key=in_order)
        if self._batches_since >= self.options.controller.every:
            self._decide(jobs, now)
        self._batches_since += 1
        batch: list[Job] = []
        work = 0.0
        for job in jobs:
            if not job.step_has_begun:
                job.level = job.level_at(self.point)
            work += job.work(job.level, self.costs)
            if batch and work > self.max_work:
                break
            batch.append(job)
        for job in batch:
            if job.started is None:
                job.begin(now, self.point)
        return batch

    def _decide(self, jobs: Sequence[Job], now: float) -> None:
        """Asks the controller for the point of the jobs that leave it open."""
        self._batches_since = 0
        self.point = choose_point(self._load(jobs, now), self.point, self.options.points, self.options.controller)

    def _load(self, jobs: Sequence[Job], now: float) -> Load:
        """Returns what the controller looks at."""
        decay = math.exp((self._arrived_at - now) / self._memory)
        return Load(jobs, now, self.costs, self.max_work, self.slowdown, decay * self._arrived / self._memory)

    def advanced(self, batch: Sequence[Job], seconds: float) -> None:
        """Notes that a batch took its evaluation, and how long that was."""
        predicted = batch_seconds(batch, self.costs)
        if predicted:
            self._ratios.append(seconds / predicted)
        for job in batch:
            job.evaluate()

    def refusal(self, job: Job, now: float, beside: int = 0) -> float | None:
        """Returns None where a job may come in, else the seconds after which it is worth trying again.

        Args:
            beside: how many others are about to come in.
        """
        self._set_deadline(job)
        if self.queued + beside >= self.options.queue_limit:
            return self._backlog(now)
        if not self.options.refuse_late or job.is_too_long:
            return None
        due = job.arrival + ADMITTED * (job.deadline - job.arrival)
        late = self._predicted_finish(job, now) - due
        return late if late > 0 else None

    def _backlog(self, now: float) -> float:
        """Predicts the seconds until all that is here is finished, anew at most once a second: a full queue is long."""
        counted, seconds = self._last_backlog
        if not counted <= now < counted + 1:
            finishes = predicted_finishes(self._load(list(self._jobs), now), self.options.points[0])
            seconds = max(finishes, default=now) - now
            self._last_backlog = now, seconds
        return seconds

    def _predicted_finish(self, job: Job, now: float) -> float:
        """Predicts when a job would be finished if it came in now, at the cheapest point that everybody allows."""
        jobs = sorted([*self._jobs, job], key=in_order)
        finishes = predicted_finishes(self._load(jobs, now), self.options.points[0])
        return next(finish for each, finish in zip(jobs, finishes, strict=True) if each is job)


def in_order(job: Job) -> tuple[float, float]:
    """Orders jobs: the earliest deadline first, and of equal deadlines the earliest arrival.

    A deadline is a moment that all later arrivals are behind sooner or later, so nobody waits for ever; nor does a job
    without one, whose patience ends.
    """
    turn = job.arrival + PATIENCE if math.isinf(job.deadline) else job.deadline
    return turn, job.arrival
