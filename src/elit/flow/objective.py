"""The rectified-flow objective (section 1 of the paper: the interface changes nothing in it)."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from elit.flow.paths import Path, interpolate, velocity


def flow_matching_error(
    model: Callable[[Tensor, Tensor], Tensor], x: Tensor, t: Tensor, noise: Tensor, path: Path
) -> Tensor:
    """Computes the squared error of the velocity at ``x_t``, element by element: float32, in the shape of x.

    Args:
        model: a function (x_t, t) -> velocity, into which the caller has put labels and budget.
        x: data (B, ...).
        t: times (B,).
        noise: standard normal noise like x.
    """
    at = t.view(-1, *(1,) * (x.dim() - 1))
    x_t, target = interpolate(path, x, noise, at), velocity(path, x, noise, at)
    return (model(x_t, t).float() - target.float()).square()


def flow_matching_loss(
    model: Callable[[Tensor, Tensor], Tensor], x: Tensor, t: Tensor, noise: Tensor, path: Path
) -> Tensor:
    """Computes one loss per sample, (B,): the mean of :func:`flow_matching_error`, whose arguments it takes."""
    return flow_matching_error(model, x, t, noise, path).flatten(1).mean(1)


def per_token(error: Tensor, patch_size: int) -> Tensor:
    """Averages an error (B, C, H, W) over the values of each token: (B, H / p, W / p)."""
    return F.avg_pool2d(error.mean(1, keepdim=True), patch_size).squeeze(1)
