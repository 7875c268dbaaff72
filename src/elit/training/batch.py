"""What is drawn for a step, and how it is shared out.

Times, noise and dropped labels are drawn for the global batch from (seed, step), and every process takes its slice:
sample i of step s is the same sample with the same noise however many processes and micro-batches there are.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from elit.flow import flow_matching_loss
from elit.flow.paths import Path
from elit.flow.pyramid import pyramid_loss
from elit.models import DFM, Model
from elit.seeding import generator
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


def draw(config: TrainConfig, model: Model, path: Path, step: int, count: int) -> Draws:
    """The draws of a step for the global batch of ``count`` samples, on the model's device."""
    device = model.device
    rng = generator(config.seed, "step", step, device=device)
    if isinstance(model, DFM):
        t, active = config.stages.draw(count, path, rng)
        shapes: list[tuple[int, ...]] = [*model.stage_shapes]
    else:
        t, active = config.times.draw(count, path, rng), 0
        shapes = [model.input_shape()]
    noise = [torch.randn(count, *shape, generator=rng, device=device) for shape in shapes]
    return Draws(t, noise, torch.rand(count, generator=rng, device=device) < config.label_dropout, active)


def share(count: int, process: int, processes: int) -> slice:
    """The part of a global batch that a process takes; parts differ by one sample at most."""
    return slice(count * process // processes, count * (process + 1) // processes)


def micro_batches(levels: list[int], largest: int | None) -> Iterator[tuple[int, Tensor]]:
    """Cuts samples of some levels into batches of one level each, of at most ``largest`` samples: (level, indices)."""
    for level in sorted(set(levels)):
        same = torch.tensor([i for i, of_sample in enumerate(levels) if of_sample == level])
        for part in same.split(largest or len(levels)):
            yield level, part


def losses(network: nn.Module, x: Tensor, y: Any, draws: Draws, path: Path, budget: float | None) -> Tensor:
    """One loss per sample, (B,)."""
    if draws.active:
        velocities = lambda states, t, active: network(states, t, y, budget, active)  # noqa: E731
        return pyramid_loss(velocities, x, draws.t, draws.noise, path, draws.active)
    return flow_matching_loss(partial(network, y=y, budget=budget), x, draws.t, draws.noise[0], path)
