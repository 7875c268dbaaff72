"""How fast training runs: images per second, and how much of the device's peak the model's FLOPs are."""

import time
from typing import NamedTuple

import torch

from elit.analysis import count_flops
from elit.models import Model

PEAK = {
    "B200": 2250e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
"""FLOP/s of dense bf16 matrix products, from the makers' data sheets. The first name found in the device's counts."""


class Speed(NamedTuple):
    """Since it was last asked for.

    Attributes:
        images_per_second: over all processes.
        mfu: model FLOP utilisation, in [0, 1]: FLOPs of forward and backward (3 forwards; none for what checkpointed
            activations compute again) over what the devices could have done. None where their peak is not known.
    """

    images_per_second: float
    mfu: float | None


class Speedometer:
    """Counts images and FLOPs.

    Args:
        model: what is trained.
        peak: FLOP/s of all devices together, or None.
    """

    def __init__(self, model: Model, peak: float | None) -> None:
        self.model = model
        self.peak = peak
        self.flops_of: dict[int, int] = {}
        self.restart()

    def restart(self) -> None:
        self.images, self.flops, self.since = 0, 0, time.perf_counter()

    def add(self, level: int, images: int) -> None:
        """Counts images that were trained on at a level (0: no interface)."""
        self.images += images
        if self.peak is not None:
            if level not in self.flops_of:
                self.flops_of[level] = count_flops(self.model, level / self.model.num_latents if level else None).flops
            self.flops += 3 * self.flops_of[level] * images

    def read(self) -> Speed:
        seconds = time.perf_counter() - self.since
        mfu = None if self.peak is None else self.flops / seconds / self.peak
        return Speed(self.images / seconds, mfu)


def peak_flops(device: torch.device) -> float | None:
    """FLOP/s of a device in half precision; None where it is not known, and for processors."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK.items() if part in name), None)
