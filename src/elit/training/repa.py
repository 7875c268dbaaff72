"""Alignment with a pretrained encoder (REPA, Yu et al. 2024, arXiv 2410.06940).

Hidden spatial tokens of the noisy sample, projected, are to resemble what DINOv2 sees in the patches of the clean
image. Projector and encoder belong to training alone: the saved model does not know of them.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elit.data import Data, EncodedFolder, ImageFolder, PublishedLatents
from elit.data.latents import LatentData, RawImages
from elit.data.pixels import from_uint8
from elit.errors import ElitError
from elit.evaluation.extractors import IMAGENET_MEAN, IMAGENET_STD, load_dinov2
from elit.models import HDiT, Model, Transformer
from elit.seeding import torch_seeded
from elit.training.config import RepaConfig

HIDDEN = 2048  # of the projector, the paper's


class AlignmentFeatures:
    """Computes patch features (B, N, F) of clean images, one for each spatial token.

    Images are resized so that a patch of the encoder is a token: 224 px for 16 x 16 tokens and patches of 14 pixels,
    448 px for 32 x 32, as in the paper.

    Args:
        source: a DINOv2 model of transformers: a folder or a Hub id.
        model: whose tokens they are for.
        data: whose images they are of.

    Raises:
        ElitError: no such encoder, or data without images.
    """

    def __init__(self, source: str, model: Transformer, data: Data, device: torch.device) -> None:
        self.images = images_of(data)
        self.encoder = load_dinov2(source, "repa.encoder").to(device)
        patch = self.encoder.config.patch_size
        _, rows, columns = model.config.grid_size
        self.tokens = rows * columns
        self.size = (rows * patch, columns * patch)
        self.mean, self.std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))

    @property
    def width(self) -> int:
        """F, the width of the features."""
        return self.encoder.config.hidden_size

    def read(self, indices: Tensor, raw: Any) -> Tensor | None:
        """Reads the bytes of the images at indices (B,), where the samples are others; None where they are the same.

        Args:
            raw: what was read of the samples. Where their images are among it, they are not read again.
        """
        if self.images is None:
            return None
        return raw.pixels if isinstance(raw, RawImages) else self.images.pixels(indices)

    @torch.no_grad()
    def __call__(self, pixels: Tensor | None, x: Tensor) -> Tensor:
        """Computes features of images, given as the bytes that :meth:`read` gave or as samples x (B, C, H, W)."""
        images = x if pixels is None else from_uint8(pixels)  # in [-1, 1]
        small = F.interpolate(images, self.size, mode="bicubic", antialias=True, align_corners=False)
        seen = (small.clamp(-1, 1).expand(-1, 3, -1, -1) / 2 + 0.5 - self.mean) / self.std
        return self.encoder(seen).last_hidden_state[:, -self.tokens :]  # after the class token


def images_of(data: Data) -> ImageFolder | None:
    """Finds where the images of latents are; None where the samples are images themselves.

    Raises:
        ElitError: data without images.
    """
    if isinstance(data, EncodedFolder) and isinstance(data.images, ImageFolder):
        return data.images
    if isinstance(data, PublishedLatents):
        return data.source_images()
    if isinstance(data, LatentData) or data.shape[0] not in (1, 3):
        raise ElitError(
            "repa.encoder looks at images, and the data has latents alone; take the images, IMAGES@AUTOENCODER, or the "
            "published layout with its folder images"
        )
    return None


def make_projector(model: Model, width: int, seed: int) -> nn.Module:
    """Makes the MLP from hidden tokens (B, N, D) to features (B, N, F), with weights from the seed."""
    with torch_seeded(seed, "projector"):
        return nn.Sequential(
            *(nn.Linear(model.config.width, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, HIDDEN), nn.SiLU()),
            nn.Linear(HIDDEN, width),
        )


def check_alignment(config: RepaConfig, model: Model) -> Transformer:
    """Returns the model, if its tokens can be aligned.

    Raises:
        ElitError: blocks after which there are no spatial tokens of an image, or a coefficient below 0.
    """
    if config.coefficient < 0:
        raise ElitError(f"repa.coefficient is {config.coefficient}; it must be at least 0")
    assert isinstance(model, Transformer)
    hourglass = isinstance(model, HDiT) and model.interface is None  # its tokens are in runs, and merged in between
    if model.takes_text or hourglass or model.config.grid_size[0] > 1:
        raise ElitError(f"repa.encoder is set; a {type(model).__name__} of this kind cannot be aligned with one")
    deepest = model.config.depth if model.interface is None else model.config.head_depth
    if not 1 <= config.depth <= deepest:
        raise ElitError(f"repa.depth is {config.depth}; the model has spatial tokens after its blocks 1 to {deepest}")
    return model
