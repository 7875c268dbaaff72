"""Turning tensors into pictures."""

import math

import torch
from PIL import Image
from torch import Tensor

from elit.data.pixels import to_uint8


def to_frames(clips: Tensor, columns: int | None = None) -> list[Image.Image]:
    """Turns clips (B, C, T, H, W) into the frames of one video, each of which shows all clips in a grid."""
    return [to_grid(frame, columns) for frame in clips.unbind(2)]


def to_grid(images: Tensor, columns: int | None = None, gap: int = 2, smallest: int = 64) -> Image.Image:
    """Puts images (B, C, H, W) side by side in rows; small ones are enlarged to at least ``smallest`` pixels."""
    pixels = to_uint8(images)
    count, height, width, channels = pixels.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    canvas = torch.full((rows * (height + gap) + gap, columns * (width + gap) + gap, channels), 255, dtype=torch.uint8)
    for i, image in enumerate(pixels):
        top, left = gap + i // columns * (height + gap), gap + i % columns * (width + gap)
        canvas[top : top + height, left : left + width] = image
    picture = Image.fromarray(canvas.squeeze(-1).numpy())
    factor = max(1, smallest // height)
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
