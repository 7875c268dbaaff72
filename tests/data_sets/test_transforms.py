"""Decoding and transforms against plain implementations."""

import io
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from elit.data.pixels import from_uint8
from elit.data.transforms import TRANSFORMS, CorruptImageError, read_rgb, to_pixels
from tests.helpers.pictures import MODES, encoded, smooth


def saved(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def weights(size: int, target: int, kernel: str) -> np.ndarray:
    """The matrix (target, size) of a resampling, in float64: a kernel widened by the factor of reduction."""
    scale = size / target
    width = max(scale, 1.0)
    support = {"lanczos": 3.0, "bicubic": 2.0}[kernel] * width
    rows = np.zeros((target, size))
    for i in range(target):
        center = (i + 0.5) * scale
        # Pillow cuts the kernel off at whole pixels around its support.
        first, last = max(int(center - support + 0.5), 0), min(int(center + support + 0.5), size)
        x = (np.arange(first, last) + 0.5 - center) / width
        rows[i, first:last] = np.sinc(x) * np.sinc(x / 3) * (abs(x) < 3) if kernel == "lanczos" else cubic(x)
    return rows / rows.sum(1, keepdims=True)


def cubic(x: np.ndarray, a: float = -0.5) -> np.ndarray:
    x = abs(x)
    near = ((a + 2) * x - (a + 3)) * x**2 + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    return np.where(x < 1, near, np.where(x < 2, far, 0))


def resize(pixels: np.ndarray, width: int, height: int, kernel: str) -> np.ndarray:
    """Rows, then columns; bytes after each."""
    pixels = to_bytes(np.einsum("tx,yxc->ytc", weights(pixels.shape[1], width, kernel), pixels))
    return to_bytes(np.einsum("ty,yxc->txc", weights(pixels.shape[0], height, kernel), pixels))


def to_bytes(pixels: np.ndarray) -> np.ndarray:
    return np.floor(pixels + 0.5).clip(0, 255)


def plain_center_crop(pixels: np.ndarray, size: int) -> np.ndarray:
    return resize(cut(pixels, min(pixels.shape[:2])), size, size, "lanczos")


def plain_center_crop_wide(pixels: np.ndarray, size: int) -> np.ndarray:
    height, width = pixels.shape[:2]
    if width <= height:
        return plain_center_crop(pixels, size)
    band = resize(pixels, size, max(1, round(size * height / width)), "lanczos")
    above = (size - len(band)) // 2
    return np.pad(band, ((above, size - len(band) - above), (0, 0), (0, 0)))


def plain_center_crop_dhariwal(pixels: np.ndarray, size: int) -> np.ndarray:
    while min(pixels.shape[:2]) >= 2 * size:
        pixels = to_bytes(np.einsum("tx,yxc->ytc", area(pixels.shape[1]), pixels))
        pixels = to_bytes(np.einsum("ty,yxc->txc", area(pixels.shape[0]), pixels))
    scale = size / min(pixels.shape[:2])
    height, width = (round(side * scale) for side in pixels.shape[:2])
    return cut(resize(pixels, width, height, "bicubic"), size)


def area(size: int) -> np.ndarray:
    """Halving: each result is the mean of the pixels whose centers lie in its part (two, or three of an odd size)."""
    scale = size / (size // 2)
    assume(size % 4 != 1)  # a center on the border of two parts belongs to either, as floats happen to round
    part = np.ceil((np.arange(size) + 0.5) / scale) - 1
    rows = (part == np.arange(size // 2)[:, None]).astype(float)
    return rows / rows.sum(1, keepdims=True)


def cut(pixels: np.ndarray, side: int) -> np.ndarray:
    top, left = (pixels.shape[0] - side) // 2, (pixels.shape[1] - side) // 2
    return pixels[top : top + side, left : left + side]


PLAIN = {
    "center-crop": plain_center_crop,
    "center-crop-wide": plain_center_crop_wide,
    "center-crop-dhariwal": plain_center_crop_dhariwal,
}


@pytest.mark.parametrize("name", TRANSFORMS)
@settings(max_examples=25)
@given(width=st.integers(5, 150), height=st.integers(5, 150), size=st.integers(4, 40), seed=st.integers(0, 99))
def test_transforms_are_the_plain_ones(name: str, width: int, height: int, size: int, seed: int) -> None:
    image = smooth(np.random.default_rng(seed), width, height)
    ours = np.asarray(TRANSFORMS[name](image, size)).astype(float)
    plain = PLAIN[name](np.asarray(image).astype(float), size).clip(0, 255)
    assert ours.shape == (size, size, 3)
    # Pillow rounds to bytes between rows and columns, and which it takes first depends on the sizes.
    assert abs(ours - plain).max() <= 4
    assert abs(ours - plain).mean() <= 0.5


@pytest.mark.parametrize("name", TRANSFORMS)
def test_an_image_of_the_right_size_stays(name: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8))
    assert (np.asarray(TRANSFORMS[name](noise, 24)) == np.asarray(noise)).all()


@pytest.mark.parametrize("name", TRANSFORMS)
def test_mirrored_images_give_mirrored_results(name: str) -> None:
    image = smooth(np.random.default_rng(1), 96, 64)
    mirrored = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    first, second = (np.asarray(TRANSFORMS[name](x, 16)).astype(int) for x in (image, mirrored))
    assert abs(first[:, ::-1] - second).max() <= 1


def test_wide_images_keep_their_width() -> None:
    stripes = np.zeros((20, 80, 3), np.uint8)
    stripes[:, :2], stripes[:, -2:] = (255, 0, 0), (0, 255, 0)
    result = np.asarray(TRANSFORMS["center-crop-wide"](Image.fromarray(stripes), 40))
    assert (result[:15] == 0).all()
    assert (result[25:] == 0).all()
    assert result[20, 0, 0] > 200
    assert result[20, -1, 1] > 200


def test_orientation() -> None:
    """All eight EXIF orientations show the picture that was taken."""
    upright = np.zeros((16, 24, 3), np.uint8)
    upright[:8, :8] = (255, 0, 0)
    upright[8:, 16:] = (0, 0, 255)
    stored = {  # how a camera that is held so stores it
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.transpose(1, 0, 2),
        6: np.rot90(upright), 7: np.rot90(upright, 2).transpose(1, 0, 2), 8: np.rot90(upright, -1),
    }  # fmt: skip
    for orientation, pixels in stored.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        image = read_rgb(saved(Image.fromarray(np.ascontiguousarray(pixels)), exif=exif))
        assert (np.asarray(image) == upright).all(), orientation


def test_modes() -> None:
    rng = np.random.default_rng(0)
    for mode in MODES:
        assert read_rgb(encoded(rng, mode)[0]).mode == "RGB"
    colors = rng.integers(0, 256, (6, 7, 4), dtype=np.uint8)
    alpha = colors[..., 3:] / 255
    on_white = colors[..., :3] * alpha + 255 * (1 - alpha)
    assert abs(np.asarray(read_rgb(saved(Image.fromarray(colors)))) - on_white).max() <= 1  # rounding
    wide = (np.arange(64, dtype=np.uint16) * 1000).reshape(8, 8)
    assert (np.asarray(read_rgb(saved(Image.fromarray(wide))))[..., 0] == wide // 256).all()
    palette = Image.fromarray(colors[..., :3]).quantize(8)
    expected = np.asarray(palette.convert("RGB"))
    assert (np.asarray(read_rgb(saved(palette))) == expected).all()
    palette.info["transparency"] = int(np.asarray(palette)[0, 0])
    assert (np.asarray(read_rgb(saved(palette, transparency=palette.info["transparency"])))[0, 0] == 255).all()
    red = read_rgb(saved(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "JPEG"))
    assert abs(np.asarray(red)[0, 0].astype(int) - (255, 0, 0)).max() <= 2  # JPEG


def test_nothing_but_pixels_is_kept() -> None:
    image = read_rgb(saved(Image.new("RGB", (4, 4)), "PNG", icc_profile=b"profile", dpi=(72, 72)))
    assert saved(image) == saved(Image.new("RGB", (4, 4)))


@pytest.mark.parametrize("data", [b"", b"text", saved(Image.new("RGB", (64, 64)))[:60]])
def test_corrupt_images(data: bytes) -> None:
    with pytest.raises(CorruptImageError):
        read_rgb(data)


def test_pixels() -> None:
    image = Image.fromarray(np.array([[[0, 51, 255]]], np.uint8))
    torch.testing.assert_close(from_uint8(to_pixels(image)).flatten(), torch.tensor([-1.0, -0.6, 1.0]))
