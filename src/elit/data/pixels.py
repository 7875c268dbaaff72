"""Pixels as bytes, and as numbers in [-1, 1]."""

import torch
from torch import Tensor


def to_uint8(images: Tensor) -> Tensor:
    """Rounds pixels in [-1, 1], (B, C, H, W), to bytes (B, H, W, C) on the CPU, as files hold them."""
    pixels = ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).cpu()


def from_uint8(pixels: Tensor) -> Tensor:
    """Turns bytes of any shape into float32 numbers in [-1, 1], what models and autoencoders see."""
    return pixels.float() / 127.5 - 1
