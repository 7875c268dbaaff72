"""What the tests share: tiny models whose every weight is random, and a stand-in model that writes down its calls."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from elit.conditions import Text
from elit.interface import InterfaceConfig, LatentInterface
from elit.models import DiT, DiTConfig, MMDiT, Model

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
    x = torch.randn(batch, *model.input_shape(), generator=draws, dtype=torch.float64).to(dtype)
    t = torch.rand(batch, generator=draws)
    if isinstance(model, MMDiT):
        length = 6
        tokens = torch.randn(batch, length, model.config.text_width, generator=draws, dtype=torch.float64).to(dtype)
        known = torch.randint(1, length + 1, (batch, 1), generator=draws)
        return x, t, Text(tokens, torch.arange(length) < known)
    return x, t, torch.randint(model.config.num_classes + 1, (batch,), generator=draws)


class Call(NamedTuple):
    """One forward of the stand-in."""

    x: Tensor
    t: Tensor
    y: Tensor | None
    budget: float | None


class Recorder(Model):
    """A stand-in with a velocity that is known, ``answer(x, t, y, budget)``, and a list of its calls."""

    def __init__(self, answer: Callable[..., Tensor], num_classes: int = 10, elastic: bool = True) -> None:
        super().__init__(SimpleNamespace(input_size=4, in_channels=2, num_classes=num_classes))
        self.interface = LatentInterface(InterfaceConfig(4), 8, 2, (1, 4, 4), 100.0) if elastic else None
        self.anchor = nn.Parameter(torch.zeros(1))
        self.answer = answer
        self.calls: list[Call] = []

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None, budget: float | None = None) -> Tensor:
        self.calls.append(Call(x, t, y, budget))
        return self.answer(x, t, y, budget)
