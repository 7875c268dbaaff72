"""How the data of a pretrained transformer become noise, and what it predicts there: the flows of distillation."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from torch import Tensor

from elit.flow import PATHS, TimeDensity, TrainingFlow
from elit.flow.matching import FlowMatching, Velocity
from elit.flow.paths import interpolate, velocity
from elit.integrations.distillation import squared_error
from elit.seeding import integers


class Noising(TrainingFlow, Protocol):
    """A flow that says what the transformer is to predict."""

    def noised(self, x: Tensor, t: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Returns noisy data (B, C, ...) at times (B,), and the target of their prediction, of the same shape."""
        ...


class PredictsNoise:
    """Defines the diffusion of a transformer that predicts noise (DiT, PixArt), at the steps of its scheduler.

    Times are these steps, whole numbers from 0 (nearly data) on, drawn uniformly, as such transformers were trained.

    Args:
        shape: of a sample, (C, H, W).
        signal_levels: the share of the data's variance at each step, falling: ``alphas_cumprod`` of diffusers.
    """

    def __init__(self, shape: Sequence[int], signal_levels: Tensor) -> None:
        self.noise_shapes = [tuple(shape)]
        self.signal_levels = signal_levels

    def draw_times(self, count: int, rng: np.random.Generator) -> tuple[Tensor, int]:
        return integers(rng, len(self.signal_levels), count), 1

    def noised(self, x: Tensor, t: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        signal = self.signal_levels.to(x.device)[t].view(-1, *(1,) * (x.dim() - 1))
        return signal.sqrt() * x + (1 - signal).sqrt() * noise, noise

    def loss(self, predict: Velocity, x: Tensor, t: Tensor, noise: Sequence[Tensor], active: int = 1) -> Tensor:
        x_t, target = self.noised(x, t, noise[0])
        return squared_error(predict(x_t, t), target)

    def noise_level(self, t: Tensor) -> Tensor:
        """Returns the fraction of the scheduler's steps below each time, which budgets by noise see in pipelines."""
        return t / len(self.signal_levels)


class PredictsVelocity(FlowMatching):
    """Defines the rectified flow of a transformer that predicts velocities (SD3, FLUX, Qwen-Image, Wan).

    Times lie in [0, 1], where 1 is noise.

    Args:
        shape: of a sample, (C, H, W).
        times: the density that they are drawn from.
    """

    def __init__(self, shape: Sequence[int], times: TimeDensity) -> None:
        super().__init__(shape, PATHS["linear"], times)

    def noised(self, x: Tensor, t: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        at = self.spread(t)
        return interpolate(self.path, x, noise, at), velocity(self.path, x, noise, at)
