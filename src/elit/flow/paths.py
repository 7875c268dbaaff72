"""Paths between data (t = 0) and noise (t = 1): ``x_t = alpha(t) x + sigma(t) noise`` (Ma et al. 2024, SiT).

Times are tensors that broadcast against the data.
"""

import math
from typing import Protocol

import torch
from torch import Tensor

from elit.errors import ElitError


class Path(Protocol):
    """Connects data and noise by alpha(t) and sigma(t); ``d_`` marks their derivatives in t."""

    def alpha(self, t: Tensor) -> Tensor: ...
    def sigma(self, t: Tensor) -> Tensor: ...
    def d_alpha(self, t: Tensor) -> Tensor: ...
    def d_sigma(self, t: Tensor) -> Tensor: ...
    def time(self, log_ratio: Tensor) -> Tensor:
        """Returns the t at which log(sigma / alpha) is ``log_ratio``."""
        ...


class Linear:
    """Connects data and noise by a straight line, as rectified flow does: alpha = 1 - t, sigma = t."""

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
    """Connects data and noise so that the variance stays: alpha = cos(pi t / 2), sigma = sin(pi t / 2)."""

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
    """Finds a path by its name, ``linear`` or ``cosine``.

    Raises:
        ElitError: no path has this name.
    """
    if name not in PATHS:
        raise ElitError(f"no path is named {name!r}; there are {', '.join(PATHS)}")
    return PATHS[name]


def interpolate(path: Path, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Returns x_t, the noisy sample at time t: ``alpha(t) x + sigma(t) noise``."""
    return path.alpha(t) * x + path.sigma(t) * noise


def velocity(path: Path, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Returns d x_t / d t, the velocity that a model learns to predict."""
    return path.d_alpha(t) * x + path.d_sigma(t) * noise


def score(path: Path, x_t: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """Computes the score, the gradient of log p_t at x_t, from the velocity v there (SiT, Eq. 9).

    On the linear path it is ``-(x + (1 - t) v) / t``.
    """
    alpha, sigma, d_alpha, d_sigma = path.alpha(t), path.sigma(t), path.d_alpha(t), path.d_sigma(t)
    return (alpha * v - d_alpha * x_t) / (sigma * (d_alpha * sigma - alpha * d_sigma))


def data_estimate(path: Path, x_t: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """Computes the data that x_t and the velocity v there point to.

    On the linear path it is ``x - t v``.
    """
    alpha, sigma, d_alpha, d_sigma = path.alpha(t), path.sigma(t), path.d_alpha(t), path.d_sigma(t)
    return (d_sigma * x_t - sigma * v) / (alpha * d_sigma - sigma * d_alpha)
