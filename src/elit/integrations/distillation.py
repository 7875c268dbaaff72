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
    with torch.no_grad():
        scale = (loss / distance.clamp(min=1e-12)).clamp(max=MAX_SCALE)
    return loss + weight * scale * distance
