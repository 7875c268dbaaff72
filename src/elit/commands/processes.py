"""Sharing the work of one command among processes that do not talk to each other.

Work is cut into pieces that are functions of their number alone, and a finished piece is a file. A process does the
pieces that are its own and not there yet; none waits for another, so one that dies stops none, and any later run
finishes what is missing.
"""

from typing import NamedTuple

import torch

from elit.errors import ElitError
from elit.launch import default_device, rank_and_world_size


class Process(NamedTuple):
    """This process among those of ``torchrun`` or ``accelerate launch``; the only one without them."""

    rank: int
    total: int
    device: torch.device

    def owns(self, piece: int) -> bool:
        return piece % self.total == self.rank


def this_process(device: str = "auto", threads: int = 1) -> Process:
    """Returns this process, on its own GPU if there are several.

    Args:
        threads: number of CPU threads. It is set, not taken from the environment (launchers change it), because
            another number of threads rounds sums differently.

    Raises:
        ElitError: threads below 1, or a device that is not there.
    """
    if threads < 1:
        raise ElitError(f"threads is {threads}; it must be at least 1")
    torch.set_num_threads(threads)
    return Process(*rank_and_world_size(), default_device(device))
