"""Densities of the training time t."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from elit.errors import ElitError
from elit.flow.paths import Path


@dataclass(frozen=True)
class TimeDensity:
    """How training draws t in [0, 1].

    Attributes:
        kind: ``uniform`` in t, or ``logit-normal``: log(sigma / alpha) is normal (linear path: t = sigmoid(n), Esser
            et al. 2024; any path sees the same noise levels).
        mean: mean of the normal behind the logit-normal.
        std: its standard deviation.
        shift: multiplies sigma / alpha; above 1 it moves times towards noise, as large images want.
    """

    kind: Literal["uniform", "logit-normal"] = "logit-normal"
    mean: float = 0.0
    std: float = 1.0
    shift: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in ("uniform", "logit-normal"):
            raise ElitError(f"no time density is named {self.kind!r}; there are uniform and logit-normal")
        if self.shift <= 0 or self.std < 0:
            raise ElitError(f"a time density needs shift > 0 and std >= 0, not {self.shift} and {self.std}")

    def draw(self, count: int, path: Path, generator: torch.Generator) -> Tensor:
        """(count,) times in float32 on the generator's device."""
        device = generator.device
        if self.kind == "logit-normal":
            normal = torch.randn(count, generator=generator, device=device)
            return path.time(normal * self.std + self.mean + math.log(self.shift))
        t = torch.rand(count, generator=generator, device=device)
        log_ratio = path.sigma(t).log() - path.alpha(t).log()
        return t if self.shift == 1 else path.time(log_ratio + math.log(self.shift))
