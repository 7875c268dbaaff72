"""What the tests share: tiny models whose every weight is random, and a stand-in model that writes down its calls."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from elit.conditions import Text, select_condition
from elit.interface import InterfaceConfig, LatentInterface
from elit.models import DiT, DiTConfig, MMDiT, Model
from elit.models.base import Levels

TINY = DiTConfig(
    input_size=8, patch_size=2, in_channels=3, num_classes=10, width=32, depth=4, num_heads=4, head_depth=1,
    tail_depth=1, interface=InterfaceConfig(group_size=2),
)  # fmt: skip
"""16 tokens, 4 windows of J = 4, split 1-2-1."""

PUBLISHED = InterfaceConfig(group_size=2, variant="published", tail_visible=True, write_depth=2)


def randomize(module: nn.Module, seed: int = 0) -> Any:
    """Draws every weight, also those that start at zero, so that each path carries signal of about unit size."""
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                value = torch.randn(parameter.shape, generator=draws)
                matrix = parameter.dim() > 1 and not name.endswith("latents")
                value = value / parameter.shape[-1] ** 0.5 if matrix else 0.3 * value
                parameter.copy_(1 + value if "norm" in name else value)
    return module


def tiny(seed: int = 0, **changes: Any) -> DiT:
    """The tiny model with fields changed and every weight random."""
    return randomize(DiT(DiTConfig(**(TINY.__dict__ | changes))), seed).eval()


def inputs(model: Model, batch: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    """x, t, y for a model; text is of 1 to 6 tokens, padded to 6."""
    draws = torch.Generator().manual_seed(seed)
    if model.stage_shapes is not None:
        x: Any = [torch.randn(batch, *shape, generator=draws).to(dtype) for shape in model.stage_shapes]
        t = torch.rand(batch, len(x), generator=draws)
        return x, t, torch.randint(model.config.num_classes + 1, (batch,), generator=draws)
    x = torch.randn(batch, *model.input_shape(), generator=draws, dtype=torch.float64).to(dtype)
    t = torch.rand(batch, generator=draws)
    if isinstance(model, MMDiT):
        length = 6
        tokens = torch.randn(batch, length, model.config.text_width, generator=draws, dtype=torch.float64).to(dtype)
        known = torch.randint(1, length + 1, (batch, 1), generator=draws)
        return x, t, Text(tokens, torch.arange(length) < known)
    return x, t, torch.randint(model.config.num_classes + 1, (batch,), generator=draws)


def of(given: Any, samples: Sequence[int]) -> Any:
    """Some samples of an input or a condition: of a tensor, a text or a list of stages."""
    if isinstance(given, list):
        return [stage[list(samples)] for stage in given]
    return select_condition(given, torch.tensor(list(samples)))


class Call(NamedTuple):
    """One evaluation of the stand-in: what it encoded, and which rows of that went on at which levels."""

    x: Tensor
    t: Tensor
    y: Tensor | None
    rows: list[int]
    levels: list[int]


class Recorder(Model):
    """A stand-in with a velocity that is known, ``answer(x, t, y, budget)``, and a list of its calls.

    The answer sees of each row its own x, t, y and budget (B,), which is 1 without an interface.
    """

    def __init__(self, answer: Callable[..., Tensor], num_classes: int = 10, elastic: bool = True) -> None:
        super().__init__(SimpleNamespace(input_size=4, in_channels=2, num_classes=num_classes))
        self.interface = LatentInterface(InterfaceConfig(4), 8, 2, (1, 4, 4), 100.0) if elastic else None
        self.anchor = nn.Parameter(torch.zeros(1))
        self.answer = answer
        self.calls: list[Call] = []

    def encode(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        return x, t, y

    def at_levels(self, encoded: Any, num_latents: Levels, rows: Sequence[int] | None = None) -> Tensor:
        x, t, y = encoded
        which = list(range(len(x)) if rows is None else rows)
        levels = [num_latents] * len(which) if isinstance(num_latents, int) else list(num_latents)
        self.calls.append(Call(x, t, y, which, levels))
        budgets = torch.tensor(levels) / self.num_latents if self.num_latents else torch.ones(len(levels))
        return self.answer(x[which], t[which], None if y is None else y[which], budgets)
