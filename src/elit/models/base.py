"""`Model`, the interface of every backbone: a forward in parts, levels, conditions, and saving."""

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from elit.conditions import Condition, Text, map_condition
from elit.errors import ElitError
from elit.interface import LatentInterface, check_budget
from elit.models.hub import HubModel

Levels = int | Sequence[int]
"""Numbers of latents J~: one for the whole batch, or one per sample."""


class Model(nn.Module, HubModel):
    """Predicts velocities: ``v = model(x, t, y, budget=...)``.

    A forward has two halves, so that callers can compute the first one once. :meth:`encode` does what no budget
    changes, and :meth:`at_levels` takes each sample on from there at its own number of latents.

    Attributes:
        config: the dataclass that rebuilds the model.
        interface: its latent interface, or None for a plain transformer.
        is_compiled: whether :func:`elit.compile` has compiled its layers.
        is_captured: whether its forwards are captured in CUDA graphs.
    """

    config: Any
    interface: LatentInterface | None
    is_compiled: bool = False
    is_captured: bool = False

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    # -------------------------------------------------------------------------------------------- the forward

    def forward(
        self,
        x: Any,
        t: Tensor,
        y: Any = None,
        budget: float | Sequence[float] | Tensor | None = None,
        *,
        num_latents: Levels | None = None,
    ) -> Any:
        """Predicts the velocity at x, which has the shape of x.

        Args:
            x: (B, C, H, W), or (B, C, T, H, W) for video, in the dtype of the weights; of a multi-scale model (DFM) a
                list of its stages.
            t: (B,) in [0, 1], float32; 1 is noise and 0 is data. Of a multi-scale model (B, S).
            y: (B,) labels, where the label ``num_classes`` is the null class; for a model of text a
                :class:`~elit.conditions.Text`; None for an unconditional model.
            budget: the fraction of the latents to use, in (0, 1]: one for all samples, or one per sample. None is the
                most that was trained.
            num_latents: the number of latents per window J~ to use, in place of ``budget``: one, or one per sample.

        Raises:
            ElitError: a budget that the model was not trained for, both of budget and num_latents, a condition that
                is missing, or a shape that does not fit.
        """
        batch_size = len(x) if isinstance(x, Tensor) else len(x[0])
        if num_latents is None:
            num_latents = self.levels_of(budget, batch_size)
        elif budget is not None:
            raise ElitError("give a budget or num_latents, not both")
        else:
            self._check_num_latents(num_latents, batch_size)
        return self.at_levels(self.encode(x, t, y), num_latents)

    def encode(self, x: Any, t: Tensor, y: Any = None) -> Any:
        """Runs the part of a forward that no budget changes (embedding, condition and head) and returns its result.

        Args:
            x, t, y: as in :meth:`forward`.
        """
        raise NotImplementedError

    def at_levels(self, encoded: Any, num_latents: Levels, rows: Sequence[int] | None = None) -> Any:
        """Finishes a forward that :meth:`encode` began, each sample at its own level, and returns the velocities.

        Args:
            encoded: what :meth:`encode` returned.
            num_latents: J~ for all samples, or one for each; 0 without an interface.
            rows: indices of the samples to finish; None is each of them once. A sample may be named several times, at
                different levels; what these have in common is then computed once.
        """
        raise NotImplementedError

    # -------------------------------------------------------------------------------------------- levels

    @property
    def levels(self) -> tuple[int, ...]:
        """The numbers of latents per window J~ that were trained, ascending; empty without an interface."""
        return () if self.interface is None else self.interface.levels

    @property
    def num_latents(self) -> int:
        """J, the number of latents per window; 0 without an interface."""
        return 0 if self.interface is None else self.interface.num_latents

    def level(self, budget: float | None) -> int:
        """Turns a budget into a level J~, the nearest number of latents that was trained; 0 without an interface.

        Raises:
            ElitError: a budget outside (0, 1] or below what was trained, or below 1 without an interface.
        """
        if self.interface is not None:
            return self.interface.level(budget)
        if budget is not None and check_budget(budget) != 1:
            raise ElitError(f"budget is {budget}, but this model has no latent interface: it always runs in full")
        return 0

    def allow_untrained_levels(self) -> Self:
        """Lets the model run with any number of latents, also untrained ones, and returns the model."""
        if self.interface is not None:
            self.interface.allow_untrained_levels()
        return self

    def levels_of(self, budget: float | Sequence[float] | Tensor | None, batch_size: int) -> Levels:
        """Turns the budget of a batch, or one budget per sample, into levels.

        Raises:
            ElitError: as :meth:`level`, or another number of budgets than samples.
        """
        given = budget.tolist() if isinstance(budget, Tensor) else budget
        if not isinstance(given, Sequence) or isinstance(given, str):
            return self.level(given)
        if len(given) != batch_size:
            raise ElitError(f"{len(given)} budgets for {batch_size} samples; give one for each, or one for all")
        return [self.level(each) for each in given]

    def _check_num_latents(self, num_latents: Levels, batch_size: int) -> None:
        given = [num_latents] if isinstance(num_latents, int) else num_latents
        if not isinstance(given, Sequence) or any(type(number) is not int for number in given):
            raise ElitError(f"num_latents is {num_latents!r}; it must be a whole number, or a list with one per sample")
        if not isinstance(num_latents, int) and len(given) != batch_size:
            raise ElitError(
                f"{len(given)} numbers of latents for {batch_size} samples; give one for each, or one for all"
            )
        lowest = 0 if self.interface is None else self.interface.level_step
        for number in given:
            if not lowest <= number <= self.num_latents or (lowest and number % lowest):
                raise ElitError(f"num_latents is {number}; a window of this model has {lowest} to {self.num_latents}")

    # -------------------------------------------------------------------------------------------- inputs

    @property
    def stacks(self) -> list[nn.ModuleList]:
        """The lists of its blocks, in the order in which tokens pass them."""
        raise NotImplementedError

    @property
    def shards(self) -> list[nn.Module]:
        """The blocks whose weights can lie in shards and be whole only while they run."""
        return [block for blocks in self.stacks for block in blocks]

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def input_shape(self) -> tuple[int, ...]:
        """Returns the shape of one sample: (C, H, W), or (C, T, H, W)."""
        size = self.config.input_size
        return (self.config.in_channels, *((size, size) if isinstance(size, int) else size))

    @property
    def stage_shapes(self) -> list[tuple[int, ...]] | None:
        """The shapes of the stages that a multi-scale model takes, the coarsest first; None for all other models."""
        return None

    # -------------------------------------------------------------------------------------------- conditions

    @property
    def takes_text(self) -> bool:
        """Whether the model is conditioned by text."""
        return False

    @property
    def conditional(self) -> bool:
        """Whether a forward takes conditions: labels or text."""
        return bool(self.config.num_classes)

    def as_condition(self, given: Any) -> Condition:
        """Checks the labels that a user gives, and returns them as a tensor (B,) on the model's device.

        Models of text do the same with text. This looks at values, which a forward never does.

        Raises:
            ElitError: labels that are no whole numbers, or outside 0..num_classes - 1. The null class is none that a
                user can give: it is for guidance and training.
        """
        if isinstance(given, Text):
            raise ElitError("the model is conditioned by labels, not by text")
        try:
            y = torch.as_tensor(given)
        except (TypeError, ValueError) as error:
            raise ElitError(f"labels must be whole numbers, one per sample, not {given!r}") from error
        if y.is_floating_point() or y.dtype == torch.bool or y.dim() != 1:
            raise ElitError(f"labels must be whole numbers, one per sample, not {y.dtype} of shape {tuple(y.shape)}")
        classes = self.config.num_classes
        wrong = y[(y < 0) | (y >= classes)]
        if len(wrong):
            raise ElitError(f"label {int(wrong[0])} does not exist; the model knows 0..{classes - 1}")
        return y.to(self.device, torch.long)

    def null_condition(self, y: Condition) -> Condition:
        """Returns the condition "no class" (or the empty prompt) for each of y."""
        return map_condition(lambda labels: torch.full_like(labels, self.config.num_classes), y)

    def drop_condition(self, y: Condition, dropped: Tensor) -> Condition:
        """Replaces the conditions y of those samples that are True in ``dropped`` (B,) by :meth:`null_condition`."""

        def choose(null: Tensor, value: Tensor) -> Tensor:
            return torch.where(dropped.view(-1, *(1,) * (value.dim() - 1)), null, value)

        return map_condition(choose, self.null_condition(y), y)
