"""How fast training runs: images per second, how much of the device's peak the model's FLOPs are, and for how much of
the time the device waits for data."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
        data_wait: the part of the time, in [0, 1], in which this process's device had nothing to do because its next
            batch was not there.
    """

    images_per_second: float
    mfu: float | None
    data_wait: float


class Speedometer:
    """Measures images per second, FLOP utilisation, and the wait for data.

    Args:
        model: what is trained.
        levels: numbers of latents that it is trained at; none without an interface. Their FLOPs are counted here, for
            that takes a while, and a step should not.
        device: what it is trained on.
        peak: FLOP/s of all devices together, or None.
    """

    def __init__(self, model: Model, levels: Sequence[int], device: torch.device, peak: float | None) -> None:
        self.peak = peak
        self.device = device
        measured = () if peak is None else levels or (0,)
        self.flops_of = {level: 3 * count_flops(model.config, level).total for level in measured}
        self.restart()

    def restart(self) -> None:
        """Counts from here."""
        self.images, self.flops, self.since = 0, 0, time.perf_counter()
        self.waited = 0.0  # seconds, on the clock of the host
        self.pauses: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []  # likewise, on the clock of a GPU

    def add(self, level: int, images: int) -> None:
        """Counts images that were trained on at a level (0: no interface)."""
        self.images += images
        self.flops += self.flops_of.get(level, 0) * images

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Counts the time for which the device stands idle while the block brings it a batch.

        A GPU works on what was launched before, while the host already waits in the block. So there the clock is the
        GPU's: it marks when it has come to the end of its work, and when it may go on.
        """
        if self.device.type != "cuda":
            start = time.perf_counter()
            yield
            self.waited += time.perf_counter() - start
            return
        idle, busy = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        idle.record()
        yield
        busy.record()
        self.pauses.append((idle, busy))

    def read(self) -> Speed:
        """Returns the speed since the last restart. The device must be done with all steps since then."""
        seconds = time.perf_counter() - self.since
        mfu = None if self.peak is None else self.flops / seconds / self.peak
        waited = self.waited + sum(idle.elapsed_time(busy) for idle, busy in self.pauses) / 1000
        return Speed(self.images / seconds, mfu, waited / seconds)


def peak_flops(device: torch.device) -> float | None:
    """Returns the FLOP/s of a device in half precision; None where it is not known, and for processors."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK.items() if part in name), None)
