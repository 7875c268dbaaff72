"""What is asked of an engine, one image at a time, and what it answers: a stream of events."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import TypeAlias

from torch import Tensor

from elit.conditions import Condition, Text
from elit.errors import ElitError
from elit.flow import Guidance, weak_level
from elit.flow.solvers import check_steps, solver_named
from elit.models import Model


def check_seconds(name: str, value: object) -> None:
    """Checks that a setting is a number of seconds above 0.

    Raises:
        ElitError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ElitError(f"{name} is {value!r}; it must be a number of seconds above 0")


@dataclass(frozen=True, eq=False)
class Request:
    """Asks for one image.

    Attributes:
        label: its class; None for models of text and unconditional ones.
        condition: for a model of text, the :class:`~elit.conditions.Text` of one prompt.
        seed: of its noise. The same seed and settings give the same image, whoever else is in the batch.
        steps: number of steps.
        min_steps: the fewest that the controller may choose as the request begins; None is exactly ``steps``.
        solver: ``euler``, ``heun`` or ``sde``.
        budget: fraction of the latents to use at every step, which is then delivered exactly; None leaves it to the
            budget controller.
        min_budget: the least that the controller may choose; None is the engine's floor.
        guidance: None is none.
        previews: how many previews of the image to send while it forms, evenly over its steps.
        latency_objective: seconds after which this image should be finished; None is the engine's objective. It decides
            the order of requests: the earliest deadline goes first.
    """

    label: int | None = None
    condition: Text | None = None
    seed: int = 0
    steps: int = 40
    min_steps: int | None = None
    solver: str = "euler"
    budget: float | None = None
    min_budget: float | None = None
    guidance: Guidance | None = None
    previews: int = 0
    latency_objective: float | None = None

    def check(self, model: Model) -> None:
        """Checks that a model can make this image, without a look at its device.

        Raises:
            ElitError: a setting that is out of range or does not fit the model.
        """
        self._check_condition(model)
        if not isinstance(self.seed, Integral) or isinstance(self.seed, bool):
            raise ElitError(f"seed is {self.seed!r}; it must be a whole number")
        check_steps(self.steps)
        if self.min_steps is not None and (type(self.min_steps) is not int or not 1 <= self.min_steps <= self.steps):
            raise ElitError(f"min_steps is {self.min_steps!r}; it must be between 1 and steps, {self.steps}")
        solver_named(self.solver)
        model.level(self.budget)
        model.level(self.min_budget)
        if self.budget is not None and self.min_budget is not None:
            raise ElitError("a request with a budget gets exactly that one: give no min_budget beside it")
        if not isinstance(self.guidance, Guidance | None):
            raise ElitError(f"guidance is {self.guidance!r}; it must be an elit.Guidance")
        if self.guidance is not None:
            weak_level(model, self.guidance)
        if type(self.previews) is not int or not 0 <= self.previews < self.steps:
            raise ElitError(f"previews is {self.previews!r}; it must be a whole number, at least 0 and below the steps")
        if self.latency_objective is not None:
            check_seconds("latency_objective", self.latency_objective)

    def _check_condition(self, model: Model) -> None:
        """Checks that there is a label where the model has classes, and text where it takes text."""
        if (self.label is not None) and (self.condition is not None):
            raise ElitError("give a label or a condition, not both")
        if model.takes_text:
            if not isinstance(self.condition, Text) or len(self.condition.mask) != 1:
                raise ElitError("the model takes text: give the condition of one prompt, an elit.conditions.Text")
            model.null_condition(model.check_text(self.condition))  # type: ignore[operator]  # long enough for both
        elif self.condition is not None:
            raise ElitError("the model takes no text: give no condition")
        elif not model.conditional:
            if self.label is not None:
                raise ElitError("the model has no classes: give no label")
        elif type(self.label) is not int or not 0 <= self.label < model.config.num_classes:
            raise ElitError(f"label is {self.label!r}; the model knows the classes 0..{model.config.num_classes - 1}")

    def labels(self) -> Condition | Sequence[int] | None:
        """Returns the condition as :func:`elit.sample` takes it, for one sample."""
        return self.condition if self.label is None else [self.label]

    def preview_steps(self, steps: int) -> set[int]:
        """Returns the numbers of complete steps, of so many, after which a preview is due."""
        return {round(steps * (i + 1) / (self.previews + 1)) for i in range(self.previews)}


@dataclass(frozen=True, eq=False)
class Preview:
    """Shows an image as it forms: what it would become if it went straight on.

    Attributes:
        step: how many steps are complete, of ``steps``.
        sample: (C, H, W) in the model's space, on the CPU.
    """

    step: int
    steps: int
    sample: Tensor


@dataclass(frozen=True, eq=False)
class Finished:
    """Brings the finished image. No event follows it.

    ``elit.sample(model, [label], seeds=[seed], steps=steps, solver=solver, budget=list(budgets), guidance=guidance)``
    makes it again: to the bit if it was alone in every batch, else within the rounding of the matrix kernels, 2e-5 of
    the largest value in float32.

    Attributes:
        sample: (C, H, W) in the model's space, on the CPU.
        budgets: what was delivered, one per step.
        queued: seconds between submission and the first step.
        latency: seconds between submission and the last step.
    """

    sample: Tensor
    budgets: tuple[float, ...]
    steps: int
    seed: int
    queued: float
    latency: float


@dataclass(frozen=True, eq=False)
class Failed:
    """Says why there will be no image. No event follows it; other requests go on."""

    error: Exception


Event: TypeAlias = Preview | Finished | Failed
OnEvent: TypeAlias = Callable[[Event], None]


class QueueFull(ElitError):  # noqa: N818  # as queue.Full
    """The engine has as many waiting requests as it may have; try again after ``retry_after`` seconds."""

    def __init__(self, queued: int, retry_after: float) -> None:
        super().__init__(f"{queued} requests are waiting already; try again in {retry_after:.0f} seconds")
        self.retry_after = retry_after


class EngineClosedError(RuntimeError):
    """The engine takes no requests (any more), or stopped before this one was finished."""


class NotFiniteError(RuntimeError):
    """An image became infinite or not a number on its way."""
