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
    """How fast training was since it was last asked for.

    Attributes:
        images_per_second: over all processes.
        mfu: model FLOP utilisation, in [0, 1]: FLOPs of forward and backward (3 forwards; none for what checkpointed
            activations compute again) over what the devices could have done. None where their peak is not known.
    """

    images_per_second: float
    mfu: float | None


class Speedometer:
    """Measures images per second and FLOP utilisation.

    Args:
        model: what is trained.
        peak: FLOP/s of all devices together, or None.
    """

    def __init__(self, model: Model, peak: float | None) -> None:
        self.model = model
        self.peak = peak
        self.restart()

    def restart(self) -> None:
        """Counts from here."""
        self.images, self.flops, self.since = 0, 0, time.perf_counter()

    def add(self, level: int, images: int) -> None:
        """Counts images that were trained on at a level (0: no interface)."""
        self.images += images
        if self.peak is not None:
            self.flops += 3 * count_flops(self.model.config, level).total * images

    def read(self) -> Speed:
        """Returns the speed since the last restart."""
        seconds = time.perf_counter() - self.since
        mfu = None if self.peak is None else self.flops / seconds / self.peak
        return Speed(self.images / seconds, mfu)


def peak_flops(device: torch.device) -> float | None:
    """Returns the FLOP/s of a device in half precision; None where it is not known, and for processors."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK.items() if part in name), None)
