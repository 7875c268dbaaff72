"""The loss that a retrofit is trained with: that of its base's own training, and the distance from the base."""

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_SCALE = 10.0
"""Most that distillation is scaled up: where the model still equals its base, no factor makes the two losses alike."""


def distillation_loss(predicted: Tensor, target: Tensor, of_base: Tensor | None = None, weight: float = 1.0) -> Tensor:
    """Returns the loss of a batch: the squared error, and that from the base's prediction, scaled to a like magnitude.

    All three are of the base's own kind. A base that predicts noise (DiT, PixArt) goes on predicting noise, at its own
    noise levels: the target is then the noise, and of a rectified flow ``noise - data``. Nothing has to be converted,
    for a squared error of noise is one of velocity with another weight at each noise level.

    Args:
        predicted, target, of_base: (B, ...). Without ``of_base`` there is no distillation.
        weight: of distillation.
    """
    loss = F.mse_loss(predicted, target)
    if of_base is None or not weight:
        return loss
    distance = F.mse_loss(predicted, of_base)
    return loss + weight * scale(loss, distance) * distance


def distillation_terms(predicted: Tensor, target: Tensor, of_base: Tensor) -> Tensor:
    """Returns of each sample its squared error, its distance from the base scaled to a like magnitude, and that
    distance itself, which has no gradient: (3, B).

    The scale is that of the sample, so that the parts of a batch that several processes work on decide nothing.

    Args:
        predicted, of_base: (B, ...).
        target: the same, or without the last channels: those of a base that predicts variances after the noise.
    """
    loss, distance = squared_error(predicted, target), squared_error(predicted, of_base)
    return torch.stack((loss, scale(loss, distance) * distance, distance.detach()))


def squared_error(predicted: Tensor, target: Tensor) -> Tensor:
    """Returns the mean squared error of each sample, (B,), in float32, over the channels that the target has."""
    return (predicted[:, : target.shape[1]].float() - target.float()).square().flatten(1).mean(1)


@torch.no_grad()
def scale(loss: Tensor, distance: Tensor) -> Tensor:
    """Returns what multiplies distances to make them as large as losses: at most :data:`MAX_SCALE`."""
    return (loss / distance.clamp(min=1e-12)).clamp(max=MAX_SCALE)
