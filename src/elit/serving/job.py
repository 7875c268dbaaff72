"""A job: one image as the scheduler, the controller and the simulator see it, without tensors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from elit.serving.costs import CostTable
from elit.serving.points import OperatingPoint


@dataclass(eq=False, slots=True)
class Job:
    """One image: what it needs, when it came, and how far it is.

    Attributes:
        arrival: when it came, in seconds on the caller's clock.
        steps: number of steps; the controller may choose fewer when the job begins.
        evaluations: of every step but the last, which has one.
        budget_is_fixed: whether the controller leaves its level alone.
        min_level: the least that the controller may choose.
        min_steps: the fewest that it may choose; None is exactly ``steps``.
        level: J~ of its next step that has not begun.
        weak: which terms of guidance it has beside the strong one: of its level in the same forward (``cfg``), of
            ``weak_level`` in the same forward (``ag``), or of ``weak_level`` in a forward of its own (``ccfg``).
        weak_level: see ``weak``.
        guided: the share of its steps that are guided.
        latency_objective: seconds from arrival to the end, in place of the scheduler's.
        deadline: when it should be finished, as the scheduler sets it; infinite without an objective.
        is_too_long: whether it could not keep its objective even alone, so that the controller does not look at it.
        evaluation: how many evaluations are done.
        started: when its first step began; None while it waits.
        delivered: the level of every step that has had an evaluation.
        asked_steps: ``steps`` as it came.
    """

    arrival: float
    steps: int
    level: int
    evaluations: int = 1
    budget_is_fixed: bool = False
    min_level: int = 0
    min_steps: int | None = None
    weak: Literal["none", "cfg", "ag", "ccfg"] = "none"
    weak_level: int = 0
    guided: float = 1.0
    latency_objective: float | None = None
    deadline: float = float("inf")
    is_too_long: bool = False
    evaluation: int = 0
    started: float | None = None
    delivered: list[int] = field(default_factory=list)
    asked_steps: int = field(init=False)

    def __post_init__(self) -> None:
        self.asked_steps = self.steps

    @property
    def step(self) -> int:
        """How many steps are complete."""
        return self.steps if self.is_done else self.evaluation // self.evaluations

    @property
    def step_has_begun(self) -> bool:
        return self.evaluation % self.evaluations > 0

    @property
    def remaining(self) -> int:
        """How many evaluations are left."""
        return self._evaluations_of(self.steps) - self.evaluation

    @property
    def asked(self) -> int:
        """How many evaluations were asked for."""
        return self._evaluations_of(self.asked_steps)

    @property
    def is_done(self) -> bool:
        return self.remaining == 0

    def begin(self, now: float, point: OperatingPoint) -> None:
        """Notes that its first step begins, and settles how many there will be."""
        self.started, self.steps = now, self.steps_at(point)

    def evaluate(self) -> None:
        """Notes that its next evaluation is done."""
        if not self.step_has_begun:
            self.delivered.append(self.level)
        self.evaluation += 1

    def level_at(self, point: OperatingPoint) -> int:
        """Returns the level that it takes where the controller chooses a point."""
        return self.level if self.budget_is_fixed else max(point.level, self.min_level)

    def steps_at(self, point: OperatingPoint) -> int:
        """Returns the number of steps that it gets where it begins at a point."""
        if self.min_steps is None:
            return self.asked_steps
        return max(min(self.min_steps, self.asked_steps), round(point.steps * self.asked_steps))

    def remaining_at(self, point: OperatingPoint) -> int:
        """Returns how many evaluations are left where the controller chooses a point."""
        return self.remaining if self.started is not None else self.in_all_at(point)

    def in_all_at(self, point: OperatingPoint) -> int:
        """Returns how many evaluations it has where it begins at a point."""
        return self._evaluations_of(self.steps_at(point))

    def _evaluations_of(self, steps: int) -> int:
        return self.evaluations * (steps - 1) + 1

    def rows(self, level: int) -> tuple[dict[int, float], dict[int, float]]:
        """Returns the rows by level of one evaluation at a level: of the first forward, and of one behind it."""
        if self.weak == "cfg":
            return {level: 1 + self.guided}, {}
        if self.weak == "ag":
            return add({level: 1.0}, {self.weak_level: self.guided}), {}
        return {level: 1.0}, {self.weak_level: self.guided} if self.weak == "ccfg" else {}

    def work(self, level: int, costs: CostTable) -> float:
        """Returns the work of one evaluation at a level, in rows at the highest level."""
        return sum(costs.work(each) * count for rows in self.rows(level) for each, count in rows.items())


def add(rows: dict[int, float], more: Mapping[int, float], share: float = 1.0) -> dict[int, float]:
    """Adds rows, or a share of them, to others, and returns these."""
    for level, count in more.items():
        rows[level] = rows.get(level, 0.0) + share * count
    return rows


def batch_seconds(jobs: Sequence[Job], costs: CostTable) -> float:
    """Predicts the seconds of one evaluation of jobs at their levels."""
    first: dict[int, float] = {}
    behind: dict[int, float] = {}
    for job in jobs:
        together, apart = job.rows(job.level)
        add(first, together)
        add(behind, apart)
    return costs.forward(first) + costs.forward(behind)
