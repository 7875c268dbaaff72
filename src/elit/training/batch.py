"""What is drawn for a step, and how it is shared out.

Times, noise and dropped labels are drawn for the global batch from (seed, step), and every process takes its slice:
sample i of step s is the same sample with the same noise however many processes and micro-batches there are.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from elit.flow.paths import Path
from elit.models import DFM, Model
from elit.seeding import generator, normals, uniform
from elit.training.config import TrainConfig


@dataclass(frozen=True)
class Draws:
    """Times, noise and dropped labels of some samples.

    Attributes:
        t: (B,); of a multi-scale model (B, S).
        noise: (B, C, H, W); of a multi-scale model one for each of S stages.
        dropped: (B,) whether a label is replaced by the null class.
        active: number of active stages of a multi-scale model; 0 for any other.
    """

    t: Tensor
    noise: list[Tensor]
    dropped: Tensor
    active: int = 0

    def take(self, index: slice | Tensor) -> "Draws":
        return Draws(self.t[index], [noise[index] for noise in self.noise], self.dropped[index], self.active)


def draw(
    config: TrainConfig,
    model: Model,
    path: Path,
    seed: int,
    count: int,
    mine: slice = slice(None),
    device: torch.device | str = "cpu",
) -> tuple[Draws, Tensor]:
    """Draws what a batch of ``count`` samples needs, and returns the part ``mine`` of it and the times of all samples.

    Every sample has noise of its own, so that a process draws that of its own samples alone.
    """
    rng = generator(seed, "times")
    if isinstance(model, DFM):
        t, active = config.stages.draw(count, path, rng)
        shapes: list[tuple[int, ...]] = [*(model.stage_shapes or ())]
    else:
        t, active = config.times.draw(count, path, rng), 0
        shapes = [model.input_shape()]
    dropped = uniform(rng, count) < config.label_dropout
    samples = range(count)[mine]
    noise = [
        normals([(seed, "noise", stage, sample) for sample in samples], shape, device)
        for stage, shape in enumerate(shapes)
    ]
    return Draws(t[mine].to(device), noise, dropped[mine].to(device), active), t


def share(count: int, process: int, processes: int) -> slice:
    """The part of a global batch that a process takes; parts differ by one sample at most."""
    return slice(count * process // processes, count * (process + 1) // processes)


class Part(NamedTuple):
    """A micro-batch: samples of one level, at places in the process's share of the batch."""

    level: int
    places: Tensor
    weight: float = 1.0


def micro_batches(levels: list[int], largest: int | None) -> list[Part]:
    """Cuts samples of some levels into batches of one level each, of at most ``largest`` samples."""
    parts = []
    for level in sorted(set(levels)):
        same = torch.tensor([i for i, of_sample in enumerate(levels) if of_sample == level])
        parts += [Part(level, places) for places in same.split(largest or len(levels))]
    return parts


def as_many_for_all(parts: list[Part], levels: list[int], largest: int | None, processes: int) -> list[Part]:
    """A process's micro-batches, as many as the process with most of them has.

    Gathering sharded weights takes all processes: one that has nothing left joins with a sample that weighs nothing.
    """
    shares = (levels[share(len(levels), process, processes)] for process in range(processes))
    most = max(len(micro_batches(of_process, largest)) for of_process in shares)
    idle = Part(parts[-1].level, parts[-1].places[:1], weight=0.0)
    return parts + [idle] * (most - len(parts))
