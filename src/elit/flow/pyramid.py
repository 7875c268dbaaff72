"""Decomposable flow matching (Haji-Ali et al. 2025): an image as the stages of a Laplacian pyramid, each with its own
time.

Stage 0 is the coarsest of S; x_k (B, C, H_k, W_k) is a stage. Training sees the first stages only, up to a drawn one;
sampling starts them one after the other. Solvers and guidance work on all stages laid side by side, (B, M).
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from elit.errors import ElitError
from elit.flow.matching import Velocity
from elit.flow.paths import Path, interpolate
from elit.flow.paths import velocity as target_velocity
from elit.flow.solvers import Solver, check_steps
from elit.flow.times import TimeDensity
from elit.launch import to_device

# ------------------------------------------------------------------------------------------------ the pyramid


def halve(x: Tensor) -> Tensor:
    """Shrinks an image to half its sides."""
    return F.interpolate(x, scale_factor=0.5, mode="bilinear", align_corners=False)


def double(x: Tensor) -> Tensor:
    """Stretches an image to twice its sides."""
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


def decompose(x: Tensor, stages: int) -> list[Tensor]:
    """Splits an image (B, C, H, W) into the stages of its Laplacian pyramid, the coarsest first.

    The first stage is the image at 1 / 2^(S - 1) of its size. Each further one is what doubling the sides so far lacks.

    Raises:
        ElitError: the sides cannot be halved so often.
    """
    if stages < 1 or any(side % 2 ** (stages - 1) for side in x.shape[-2:]):
        raise ElitError(f"an image of {tuple(x.shape[-2:])} cannot be halved for {stages} stages of a pyramid")
    details = []
    for _ in range(stages - 1):
        low = halve(x)
        details.append(x - double(low))
        x = low
    return [x, *reversed(details)]


def recompose(stages: Sequence[Tensor]) -> Tensor:
    """Puts the stages of a pyramid together again: the inverse of :func:`decompose`."""
    x, *details = stages
    for detail in details:
        x = double(x) + detail
    return x


# ------------------------------------------------------------------------------------------------ training


@dataclass(frozen=True)
class StageDensity:
    """Draws the stages that are active in a training step, once per batch, and their times.

    Attributes:
        weights: ``weights[k]`` is the probability that k is the last active stage; they are scaled to sum to 1.
        last: the density of times of the last active stage.
        earlier: the density of times of the stages before it, which are mostly clean by then.

    Raises:
        ElitError: weights that are negative or all zero.
    """

    weights: Sequence[float] = (0.9, 0.1)
    last: TimeDensity = field(default_factory=TimeDensity)
    earlier: TimeDensity = field(default_factory=lambda: TimeDensity(mean=-2.0))

    def __post_init__(self) -> None:
        if not self.weights or min(self.weights) < 0 or not 0 < sum(self.weights) < math.inf:
            raise ElitError(f"stage weights {list(self.weights)} must be positive, one per stage")

    def draw(self, count: int, path: Path, rng: np.random.Generator) -> tuple[Tensor, int]:
        """Draws times (count, S) in float32 and the number of active stages; masked stages have the time 1."""
        weights = np.array(self.weights, dtype=np.float64)
        last = int(rng.choice(len(weights), p=weights / weights.sum()))
        times = torch.ones(count, len(weights))
        for stage in range(last + 1):
            density = self.last if stage == last else self.earlier
            times[:, stage] = density.draw(count, path, rng)
        return times, last + 1


# ------------------------------------------------------------------------------------------------ sampling

THRESHOLD = 0.1  # the published one


@dataclass(frozen=True)
class StageSchedule:
    """Says when a multi-scale model samples each stage, the coarsest first.

    First, ``steps[k]`` equal steps bring stage k from t = 1 to ``thresholds[k]``, while later stages wait at 1, masked.
    Equal steps until the end then bring it to 0. So the coarse stages are mostly done when a finer one starts, but can
    still adapt to it. The last stage has no threshold and goes to 0 at once. For two stages this is the published
    schedule. ``StageSchedule(steps=[30, 10], thresholds=[0.1])`` has 40 steps.

    Attributes:
        steps: the number of steps of each stage, at least 1.
        thresholds: times in [0, 1), one for each stage but the last.

    Raises:
        ElitError: a number of thresholds that does not fit, or values out of range.
    """

    steps: Sequence[int]
    thresholds: Sequence[float]

    def __post_init__(self) -> None:
        if not self.steps or len(self.thresholds) != len(self.steps) - 1:
            raise ElitError(
                f"a stage schedule has one threshold less than stages, not {len(self.thresholds)} for {len(self.steps)}"
            )
        for steps in self.steps:
            check_steps(steps)
        if not all(0 <= threshold < 1 for threshold in self.thresholds):
            raise ElitError(f"stage thresholds {list(self.thresholds)} must be in [0, 1)")

    @classmethod
    def even(cls, steps: int, stages: int, threshold: float = THRESHOLD) -> Self:
        """Divides ``steps`` evenly among the stages; coarser stages take what remains.

        Raises:
            ElitError: fewer steps than stages.
        """
        if check_steps(steps) < stages:
            raise ElitError(f"{steps} steps are too few for {stages} stages; take at least one for each")
        return cls([(steps + stages - 1 - k) // stages for k in range(stages)], [threshold] * (stages - 1))

    def times(self) -> Tensor:
        """Returns the times of all stages, (steps + 1, S) in float64. No column rises, and each ends at 0."""
        starts = [0, *itertools.accumulate(self.steps)]
        columns = []
        for begun, steps, threshold in zip(starts, self.steps, (*self.thresholds, 0.0), strict=False):
            waiting = torch.ones(begun, dtype=torch.float64)
            falling = torch.linspace(1, threshold, steps + 1, dtype=torch.float64)
            closing = torch.linspace(threshold, 0, starts[-1] - begun - steps + 1, dtype=torch.float64)
            columns.append(torch.cat((waiting, falling, closing[1:])))
        return torch.stack(columns, dim=1)


# ------------------------------------------------------------------------------------------------ the flow


class PyramidFlow:
    """Defines the flow of multi-scale models, where a state is the stages of an image side by side, (B, M).

    Each stage is at its own time.

    Args:
        shapes: (C, H_k, W_k) of every stage, the coarsest first.
        path: between data and noise.
        stages: how training draws stages and times.
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]], path: Path, stages: StageDensity | None = None) -> None:
        self.noise_shapes = [tuple(shape) for shape in shapes]
        self.path = path
        self.density = stages or StageDensity()
        self.sizes = [math.prod(shape) for shape in shapes]
        self.state_shape: tuple[int, ...] = (sum(self.sizes),)

    def draw_times(self, count: int, rng: np.random.Generator) -> tuple[Tensor, int]:
        """Draws times (count, S) and the number of active stages.

        Raises:
            ElitError: the density has weights for another number of stages.
        """
        if len(self.density.weights) != len(self.sizes):
            raise ElitError(
                f"stages.weights lists {len(self.density.weights)}, and the model has {len(self.sizes)} stages; "
                "give one weight for each"
            )
        return self.density.draw(count, self.path, rng)

    def loss(self, velocity: Velocity, x: Tensor, t: Tensor, noise: Sequence[Tensor], active: int = 1) -> Tensor:
        """Sums the flow-matching losses of the active stages; the others are masked: (B,)."""
        stages = decompose(x, len(noise))
        at = [times.view(-1, 1, 1, 1) for times in t.unbind(1)]
        states = [interpolate(self.path, *each) for each in zip(stages, noise, at, strict=True)]
        states = [state if k < active else torch.zeros_like(state) for k, state in enumerate(states)]
        targets = [target_velocity(self.path, *each) for each in zip(stages, noise, at, strict=True)]
        errors = [v.float() - target.float() for v, target in zip(velocity(states, t), targets, strict=True)]
        losses = torch.stack([error.square().flatten(1).mean(1) for error in errors])  # (S, B)
        # Sliced after the stack: heads of masked stages get a zero gradient; distributed training wants one of each.
        return losses[:active].sum(0)

    def times(self, solver: Solver, steps: int | StageSchedule) -> Tensor:
        """Returns the times of all steps: (steps + 1, S). The solver has no say in them.

        Raises:
            ElitError: a schedule of another number of stages, or fewer steps than stages.
        """
        stages = len(self.sizes)
        schedule = steps if isinstance(steps, StageSchedule) else StageSchedule.even(steps, stages)
        if len(schedule.steps) != stages:
            raise ElitError(f"the schedule has {len(schedule.steps)} stages; the model has {stages}")
        return schedule.times()

    def spread(self, t: Tensor) -> Tensor:
        sizes, total = to_device(self.sizes, t.device), self.state_shape[0]
        return t.repeat_interleave(sizes, dim=-1, output_size=total)

    def noise_level(self, t: Tensor) -> Tensor:
        """Averages times (..., S) over the elements of the state."""
        return self.spread(t).mean(-1)

    def to_model(self, x: Tensor, moves: Tensor) -> list[Tensor]:
        """Cuts a state (B, M) into stages (B, C, H_k, W_k), with zeros for those that have not begun to move."""
        parts = zip(x.split(self.sizes, 1), self.noise_shapes, moves.unbind(1), strict=True)
        return [(part * begun[:, None]).unflatten(1, shape) for part, shape, begun in parts]

    def from_model(self, v: Sequence[Tensor]) -> Tensor:
        return torch.cat([stage.flatten(1) for stage in v], dim=1)

    def to_samples(self, x: Tensor) -> Tensor:
        parts = zip(x.split(self.sizes, 1), self.noise_shapes, strict=True)
        return recompose([part.unflatten(1, shape) for part, shape in parts])
