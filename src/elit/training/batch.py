"""What is drawn for a step, and how it is shared out.

Times, noise and dropped labels are drawn for the global batch from (seed, step), and every process takes its slice:
sample i of step s is the same sample with the same noise however many processes and micro-batches there are.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from elit.flow import TrainingFlow
from elit.seeding import generator, normals, uniform


class TrainingDraws(NamedTuple):
    """Times, noise and dropped labels of some samples.

    Attributes:
        t: (B,); of a multi-scale model (B, S).
        noise: (B, C, H, W); of a multi-scale model one for each of S stages.
        dropped: (B,) whether a label is replaced by the null class.
        active: number of stages of a multi-scale model that take part; 1 for any other.
    """

    t: Tensor
    noise: list[Tensor]
    dropped: Tensor
    active: int = 1

    def take(self, index: slice | Tensor) -> "TrainingDraws":
        """Returns the draws of some of the samples."""
        return TrainingDraws(self.t[index], [noise[index] for noise in self.noise], self.dropped[index], self.active)


def draw(
    flow: TrainingFlow,
    label_dropout: float,
    seed: int,
    count: int,
    own: slice = slice(None),
    device: torch.device | str = "cpu",
) -> tuple[TrainingDraws, Tensor]:
    """Draws what a batch of ``count`` samples needs, and returns the part ``own`` of it and the times of all samples.

    Every sample has noise of its own, so that a process draws that of its own samples alone.
    """
    rng = generator(seed, "times")
    t, active = flow.draw_times(count, rng)
    dropped = uniform(rng, count) < label_dropout
    samples = range(count)[own]
    noise = [
        normals([(seed, "noise", stage, sample) for sample in samples], shape, device)
        for stage, shape in enumerate(flow.noise_shapes)
    ]
    return TrainingDraws(t[own].to(device), noise, dropped[own].to(device), active), t


def share(count: int, process: int, processes: int) -> slice:
    """Returns the slice of a global batch that a process takes; slices differ in length by one sample at most."""
    return slice(count * process // processes, count * (process + 1) // processes)


class MicroBatch(NamedTuple):
    """Samples of one level that are one forward and backward.

    Attributes:
        level: J~ of all of them.
        indices: (B,) where they stand in the process's share of the batch.
        weight: of their losses; 0 where they only keep this process in step with the others.
    """

    level: int
    indices: Tensor
    weight: float = 1.0


def micro_batches(levels: list[int], largest: int | None) -> list[MicroBatch]:
    """Cuts samples of some levels into batches of one level each, of at most ``largest`` samples."""
    batches = []
    for level in sorted(set(levels)):
        same = torch.tensor([i for i, of_sample in enumerate(levels) if of_sample == level])
        batches += [MicroBatch(level, indices) for indices in same.split(largest or len(levels))]
    return batches


def pad_micro_batches(
    batches: list[MicroBatch], levels: list[int], largest: int | None, processes: int
) -> list[MicroBatch]:
    """Gives a process as many micro-batches as the process with most of them has.

    Gathering sharded weights takes all processes: one that has nothing left joins with a sample that weighs nothing.

    Args:
        batches: of this process.
        levels: of the global batch.
    """
    shares = (levels[share(len(levels), process, processes)] for process in range(processes))
    most = max(len(micro_batches(of_process, largest)) for of_process in shares)
    idle = MicroBatch(batches[-1].level, batches[-1].indices[:1], weight=0.0)
    return batches + [idle] * (most - len(batches))
