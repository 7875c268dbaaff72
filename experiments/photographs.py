"""Crops of three photographs that scikit-learn and matplotlib ship: real image statistics, of uneven difficulty.

The class is the photograph: a Chinese palace, a flower, a portrait. Sky and a blurred background are easy, roofs and
stripes are hard. Photographs are halved; crops to train on lie in the left three quarters, held-out ones in the rest.
"""

from functools import lru_cache

import numpy as np
import torch
from matplotlib.cbook import get_sample_data
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor

from elit.data import ImageData
from elit.data.pixels import from_uint8
from elit.seeding import generator, integers

SIDE = 16  # pixels
TRAIN, HELD_OUT = 4000, 400  # crops per photograph


@lru_cache(maxsize=1)
def whole() -> list[Tensor]:
    """The photographs at half their size, (3, H, W) in [-1, 1]."""
    with Image.open(get_sample_data("grace_hopper.jpg", asfileobj=False)) as portrait:
        images = [*map(Image.fromarray, load_sample_images().images), portrait.convert("RGB")]
    return [from_uint8(torch.tensor(np.asarray(image.reduce(2)))).permute(2, 0, 1) for image in images]


@lru_cache(maxsize=2)
def photographs(held_out: bool = False) -> ImageData:
    """Random crops: 12,000 to train on or 1,200 held out, (3, 16, 16); always the same ones."""
    count = HELD_OUT if held_out else TRAIN
    crops: list[Tensor] = []
    for label, image in enumerate(whole()):
        height, width = image.shape[1:]
        left, right = (3 * width // 4, width) if held_out else (0, 3 * width // 4)
        rng = generator("photographs", label, int(held_out))
        rows = integers(rng, height - SIDE + 1, count).tolist()
        columns = (left + integers(rng, right - SIDE + 1 - left, count)).tolist()
        crops += [image[:, r : r + SIDE, c : c + SIDE] for r, c in zip(rows, columns, strict=True)]
    labels = torch.arange(3).repeat_interleave(count)
    return ImageData(torch.stack(crops), labels, 3)
