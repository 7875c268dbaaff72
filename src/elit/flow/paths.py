"""Paths between data (t = 0) and noise (t = 1): ``x_t = alpha(t) x + sigma(t) noise`` (Ma et al. 2024, SiT).

Times are tensors that broadcast against the data.
"""

import math
from typing import Protocol

import torch
from torch import Tensor

from elit.errors import ElitError


class Path(Protocol):
    """A path; ``d_`` marks the derivative in t."""

    def alpha(self, t: Tensor) -> Tensor: ...
    def sigma(self, t: Tensor) -> Tensor: ...
    def d_alpha(self, t: Tensor) -> Tensor: ...
    def d_sigma(self, t: Tensor) -> Tensor: ...
    def time(self, log_ratio: Tensor) -> Tensor:
        """The t at which log(sigma / alpha) has a value."""
        ...


class Linear:
    """alpha = 1 - t, sigma = t: rectified flow."""

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def d_alpha(self, t: Tensor) -> Tensor:
        return -torch.ones_like(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def time(self, log_ratio: Tensor) -> Tensor:
        return log_ratio.sigmoid()


class Cosine:
    """alpha = cos(pi t / 2), sigma = sin(pi t / 2): variance-preserving."""

    def alpha(self, t: Tensor) -> Tensor:
        return torch.cos(math.pi / 2 * t)

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sin(math.pi / 2 * t)

    def d_alpha(self, t: Tensor) -> Tensor:
        return -math.pi / 2 * torch.sin(math.pi / 2 * t)

    def d_sigma(self, t: Tensor) -> Tensor:
        return math.pi / 2 * torch.cos(math.pi / 2 * t)

    def time(self, log_ratio: Tensor) -> Tensor:
        return 2 / math.pi * log_ratio.exp().atan()


PATHS: dict[str, Path] = {"linear": Linear(), "cosine": Cosine()}


def path_named(name: str) -> Path:
    """Raises:
    ElitError: no path has this name.
    """
    if name not in PATHS:
        raise ElitError(f"no path is named {name!r}; there are {', '.join(PATHS)}")
    return PATHS[name]


def interpolate(path: Path, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t."""
    return path.alpha(t) * x + path.sigma(t) * noise


def velocity(path: Path, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """d x_t / d t, what a model learns."""
    return path.d_alpha(t) * x + path.d_sigma(t) * noise


def score(path: Path, x_t: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """Gradient of log p_t at x_t, from the velocity (SiT, Eq. 9). Linear: ``-(x + (1 - t) v) / t``."""
    alpha, sigma, d_alpha, d_sigma = path.alpha(t), path.sigma(t), path.d_alpha(t), path.d_sigma(t)
    return (alpha * v - d_alpha * x_t) / (sigma * (d_alpha * sigma - alpha * d_sigma))
