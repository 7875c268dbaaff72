"""Densities of the training time t."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import Tensor

from elit.errors import ElitError
from elit.flow.paths import Path
from elit.seeding import normal, uniform


@dataclass(frozen=True)
class TimeDensity:
    """Draws training times t in [0, 1].

    Attributes:
        kind: ``uniform`` draws t uniformly. ``logit-normal`` draws log(sigma / alpha) from a normal distribution, so
            that every path sees the same noise levels; on the linear path t = sigmoid(n) (Esser et al. 2024).
        mean: mean of that normal distribution.
        std: its standard deviation.
        shift: multiplies sigma / alpha; above 1 it moves times towards noise, which suits large images.

    Raises:
        ElitError: an unknown kind, a shift that is not positive, or a negative standard deviation.
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

    def draw(self, count: int, path: Path, rng: np.random.Generator) -> Tensor:
        """Draws times (count,), float32, on the CPU."""
        if self.kind == "logit-normal":
            return path.time(normal(rng, count) * self.std + self.mean + math.log(self.shift))
        t = uniform(rng, count)
        log_ratio = path.sigma(t).log() - path.alpha(t).log()
        return t if self.shift == 1 else path.time(log_ratio + math.log(self.shift))
