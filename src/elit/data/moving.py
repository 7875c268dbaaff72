"""Moving digits: handwritten digits that cross a canvas and bounce off its sides. Real strokes, known motion."""

import torch
from torch import Tensor

from elit.data.dataset import ImageData
from elit.data.digits import NUM_CLASSES, digits8
from elit.seeding import generator, integers

FRAMES, CANVAS = 8, 16
PATHS = 2  # per digit


def moving_digits(held_out: bool = False) -> ImageData:
    """Makes two clips of each digit: 2874 to train on or 720 held out, (1, 8, 16, 16), pixels in [-1, 1].

    A digit of 8 x 8 pixels starts anywhere and moves by -1, 0 or 1 pixels a frame along each axis, never by 0 along
    both.
    """
    raw = digits8(held_out)
    images, labels = (x.repeat_interleave(PATHS, dim=0) for x in (raw.images, raw.labels))
    side = images.shape[-1]
    draws = generator("moving digits", int(held_out))
    start = integers(draws, CANVAS - side + 1, (len(images), 2))
    direction = integers(draws, 8, len(images))
    direction = direction + (direction >= 4)  # of nine, all but the middle
    step = torch.stack((direction // 3 - 1, direction % 3 - 1), dim=1)
    clips = torch.full((len(images), 1, FRAMES, CANVAS, CANVAS), -1.0)
    for t in range(FRAMES):
        for clip, image, (row, column) in zip(clips, images, bounce(start + t * step, CANVAS - side), strict=True):
            clip[:, t, row : row + side, column : column + side] = image
    return ImageData(clips, labels, NUM_CLASSES)


def bounce(position: Tensor, end: int) -> Tensor:
    """Reflects positions on a line at 0 and ``end``."""
    return end - (position.remainder(2 * end) - end).abs()
