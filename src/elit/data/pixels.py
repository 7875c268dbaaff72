"""Pixels as bytes, and as numbers in [-1, 1]."""

from collections.abc import Callable

import torch
from torch import Tensor


def to_uint8(images: Tensor) -> Tensor:
    """Rounds pixels in [-1, 1], (B, C, H, W), to bytes (B, H, W, C) on the CPU, as files hold them."""
    return round_to_uint8(images).cpu()


def round_to_uint8(images: Tensor) -> Tensor:
    """Does as :func:`to_uint8`, but leaves the bytes on the device of the images."""
    pixels = ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1)


def start_copy(pixels: Tensor) -> Callable[[], Tensor]:
    """Starts to copy a tensor to the CPU, and returns a function that waits for the copy and returns it.

    A GPU goes on with other work meanwhile; the function may be called in another thread.
    """
    copy = pixels.to("cpu", non_blocking=True)
    if pixels.device.type == "cpu":
        return lambda: copy
    copied = torch.cuda.current_stream(pixels.device).record_event()

    def wait() -> Tensor:
        copied.synchronize()
        return copy

    return wait


def from_uint8(pixels: Tensor) -> Tensor:
    """Turns bytes of any shape into float32 numbers in [-1, 1], what models and autoencoders see.

    The divisor is a tensor of the same device, for GPUs would multiply by the reciprocal of a number, which rounds
    otherwise: bytes become the same numbers on every device.
    """
    return pixels.float() / torch.full((), 127.5, device=pixels.device) - 1
