"""Scenes: several handwritten digits of one class on an empty canvas. Nothing in one region, much in the next.

One digit on its own is easy to describe, so that few latents are as good as many. Here a window may hold parts of
several digits, and every budget buys something that one can see.
"""

from functools import lru_cache
from itertools import combinations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from elit.data.dataset import ImageData
from elit.data.digits import DIGIT, NUM_CLASSES, digits8
from elit.seeding import generator, integers, uniform

CANVAS, STEP = 32, 4  # pixels; digits stand at multiples of a step
MOST = 4  # digits of a scene
TRAIN, HELD_OUT = 12_000, 2_000


def scenes(held_out: bool = False) -> ImageData:
    """Makes scenes of one to four digits: 12,000 to train on or 2,000 held out, (1, 32, 32), pixels in [-1, 1].

    The digits of a scene are drawn from the images of one class, which is the label; each is enlarged to 12x12 pixels.
    Held-out scenes have held-out digits.
    """
    count, rng = HELD_OUT if held_out else TRAIN, generator("scenes", int(held_out))
    labels = torch.arange(count) % NUM_CLASSES
    glyphs = draw_glyphs(rng, labels, held_out)  # (M, 4, 12, 12)
    corners = draw_corners(rng, count)  # (M, 4, 2)
    canvas = torch.full((count, CANVAS + DIGIT, CANVAS), -1.0)  # the part below it is for the digits of no scene
    scene, within = torch.arange(count)[:, None, None], torch.arange(DIGIT)
    for digit in range(MOST):
        rows, columns = (corners[:, digit, axis, None] + within for axis in (0, 1))  # (M, 12)
        canvas[scene, rows[:, :, None], columns[:, None]] = glyphs[:, digit]
    return ImageData(canvas[:, None, :CANVAS].clone(), labels, NUM_CLASSES)


def draw_glyphs(rng: np.random.Generator, labels: Tensor, held_out: bool) -> Tensor:
    """Draws four handwritten digits of every class in ``labels`` (M,): (M, 4, 12, 12) in [-1, 1]."""
    source = digits8(held_out)
    large = F.interpolate(source.images, size=(DIGIT, DIGIT), mode="bicubic", align_corners=False)[:, 0]
    by_class = source.labels.argsort(stable=True)
    sizes = source.labels.bincount()
    starts = sizes.cumsum(0) - sizes
    place = (uniform(rng, len(labels) * MOST).view(-1, MOST) * sizes[labels, None]).long()
    return large.clamp(-1, 1)[by_class[starts[labels, None] + place]]


def draw_corners(rng: np.random.Generator, count: int) -> Tensor:
    """Draws the upper left corners of four digits a scene, (M, 4, 2), of which only one to four lie on the canvas."""
    corners = torch.full((count, MOST, 2), CANVAS)
    corners[:, :, 1] = 0
    numbers = 1 + integers(rng, MOST, count)
    for number in range(1, MOST + 1):
        of_number = numbers == number
        known = layouts(number)
        corners[of_number, :number] = known[integers(rng, len(known), int(of_number.sum()))]
    return corners


@lru_cache(maxsize=MOST)
def layouts(number: int) -> Tensor:
    """Lists all ways to place so many digits, in no order, without overlap: their upper left corners (L, number, 2)."""
    free = torch.arange(0, CANVAS - DIGIT + 1, STEP)
    places = torch.cartesian_prod(free, free)
    ways = places[torch.tensor(list(combinations(range(len(places)), number)))]  # (L, number, 2)
    apart = (ways[:, :, None] - ways[:, None]).abs().amax(-1) >= DIGIT
    return ways[(apart | torch.eye(number, dtype=torch.bool)).all(-1).all(-1)]
