"""Handwritten digits that scikit-learn ships: real data for a first run and for tests.

``digits8`` are the raw 8x8 images. ``digits`` places each, enlarged to 12x12, at nine offsets of a 16x16 canvas: easy
background and hard strokes, which is what an elastic model is about. Pixels are in [-1, 1].
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from elit.data.dataset import ImageData
from elit.errors import ElitError
from elit.seeding import torch_seeded

NUM_CLASSES = 10
HELD_OUT = 360  # of 1797 digits; all nine placements of a digit are on the same side of the split
CANVAS, DIGIT = 16, 12
OFFSETS = [(row, column) for row in (0, 2, 4) for column in (0, 2, 4)]


@lru_cache(maxsize=1)
def _raw() -> tuple[Tensor, Tensor]:
    """Returns images (1797, 1, 8, 8) in [0, 1] and labels (1797,), in an order of our own."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ElitError("the digits come with scikit-learn: pip install 'elit-diffusion[quickstart]'") from error
    data = load_digits()
    with torch_seeded("digits"):
        order = torch.randperm(len(data.target))
    images = torch.from_numpy(data.images).float()[:, None] / 16
    return images[order], torch.from_numpy(data.target)[order].long()


def _split(held_out: bool) -> tuple[Tensor, Tensor]:
    images, labels = _raw()
    part = slice(HELD_OUT) if held_out else slice(HELD_OUT, None)
    return images[part], labels[part]


def digits8(held_out: bool = False) -> ImageData:
    """Returns the raw digits: 1437 to train on or 360 held out, (1, 8, 8)."""
    images, labels = _split(held_out)
    return ImageData(images * 2 - 1, labels, NUM_CLASSES)


def digits(held_out: bool = False) -> ImageData:
    """Returns nine placements of each digit: 12933 images to train on or 3240 held out, (1, 16, 16).

    The nine placements of a digit follow each other.
    """
    images, labels = _split(held_out)
    large = F.interpolate(images, size=(DIGIT, DIGIT), mode="bicubic", align_corners=False).clamp(0, 1)
    canvas = torch.zeros(len(large), len(OFFSETS), 1, CANVAS, CANVAS)
    for place, (row, column) in enumerate(OFFSETS):
        canvas[:, place, :, row : row + DIGIT, column : column + DIGIT] = large
    return ImageData(canvas.flatten(0, 1) * 2 - 1, labels.repeat_interleave(len(OFFSETS)), NUM_CLASSES)
