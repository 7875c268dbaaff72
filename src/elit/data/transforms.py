"""Reads image files, and crops and scales them to square RGB images."""

import io
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from elit.errors import ElitError

Resampling = Image.Resampling


class CorruptImageError(ElitError):
    """A file that cannot be read as an image."""


def read_rgb(data: bytes) -> Image.Image:
    """Decodes an image file of any mode to RGB: upright, transparent parts on white, 16 bits reduced to 8.

    Raises:
        CorruptImageError: it cannot be decoded.
    """
    try:
        with Image.open(io.BytesIO(data)) as file:
            image = _to_rgb(ImageOps.exif_transpose(file))
    except UnidentifiedImageError as error:
        raise CorruptImageError("not an image of a known format") from error
    except Exception as error:  # decoders raise exceptions of every kind on damaged files
        raise CorruptImageError(f"{type(error).__name__}: {error}") from error
    image.info.clear()  # color profiles and the like would be saved again
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey; Pillow would clip it
        return Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """Crops the largest central square and resizes it (Lanczos)."""
    side = min(image.size)
    return _cut(image, side).resize((size, size), Resampling.LANCZOS)


def center_crop_wide(image: Image.Image, size: int) -> Image.Image:
    """Resizes all of a wide image (Lanczos) and centers it on black; a tall one goes to :func:`center_crop`."""
    width, height = image.size
    if width <= height:
        return center_crop(image, size)
    band = image.resize((size, max(1, round(size * height / width))), Resampling.LANCZOS)
    canvas = Image.new("RGB", (size, size))
    canvas.paste(band, (0, (size - band.height) // 2))
    return canvas


def center_crop_dhariwal(image: Image.Image, size: int) -> Image.Image:
    """Halves an image by area while it has twice the size, resizes the short side (bicubic), and crops the center.

    It is what the class-conditional ImageNet models are trained on (Dhariwal and Nichol, arXiv 2105.05233).
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Resampling.BICUBIC)
    return _cut(image, size)


def _cut(image: Image.Image, side: int) -> Image.Image:
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


TRANSFORMS: dict[str, Callable[[Image.Image, int], Image.Image]] = {
    "center-crop": center_crop,
    "center-crop-wide": center_crop_wide,
    "center-crop-dhariwal": center_crop_dhariwal,
}


def to_pixels(image: Image.Image) -> Tensor:
    """Turns an RGB image into bytes (3, H, W)."""
    return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())
