"""Pixels as numbers in [-1, 1] and as bytes."""

import torch
from torch import Tensor


def to_uint8(images: Tensor) -> Tensor:
    """Pixels in [-1, 1] (B, C, H, W) -> bytes (B, H, W, C), rounded to the nearest."""
    return ((images.float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)


def from_uint8(pixels: Tensor) -> Tensor:
    """Bytes (B, H, W, C) -> pixels in [-1, 1] (B, C, H, W)."""
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
