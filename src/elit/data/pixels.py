"""Pixels as bytes, and as numbers in [-1, 1]."""

import torch
from torch import Tensor


def to_uint8(images: Tensor) -> Tensor:
    """Rounds pixels in [-1, 1], (B, C, H, W), to bytes (B, H, W, C) on the CPU, as files hold them."""
    pixels = ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).cpu()


def from_uint8(pixels: Tensor) -> Tensor:
    """Turns bytes of any shape into float32 numbers in [-1, 1], what models and autoencoders see.

    The divisor is a tensor of the same device, for GPUs would multiply by the reciprocal of a number, which rounds
    otherwise: bytes become the same numbers on every device.
    """
    return pixels.float() / torch.full((), 127.5, device=pixels.device) - 1
