"""Decomposable flow matching (Haji-Ali et al. 2025): an image as the stages of a Laplacian pyramid, each with its own
time.

Stage 0 is the coarsest of S; x_k (B, C, H_k, W_k) is a stage. Training sees the first stages only, up to a drawn one;
sampling starts them one after the other. Solvers and guidance need not know: they work on all stages laid side by
side, (B, M), at one time per element, (M,).
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from elit.errors import ElitError
from elit.flow.paths import Path, interpolate, velocity
from elit.flow.solvers import check_steps
from elit.flow.times import TimeDensity
from elit.models.dfm import DFM

# ------------------------------------------------------------------------------------------------ the pyramid


def halve(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=0.5, mode="bilinear", align_corners=False)


def double(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


def decompose(x: Tensor, stages: int) -> list[Tensor]:
    """An image (B, C, H, W) as its Laplacian pyramid: the image at 1 / 2^(S - 1) of its size, then what each doubling
    lacks.

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
    """The inverse of :func:`decompose`."""
    x, *details = stages
    for detail in details:
        x = double(x) + detail
    return x


# ------------------------------------------------------------------------------------------------ training


@dataclass(frozen=True)
class StageDensity:
    """How training draws which stages are active, once per batch, and their times.

    Attributes:
        weights: ``weights[k]`` is the chance that k is the last active stage (they are scaled to sum to 1).
        last: times of the last active stage.
        earlier: times of the stages before it, which are mostly clean by then.

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
        """Draws times (count, S), float32, 1 for the stages that are masked, and the number of active stages."""
        weights = np.array(self.weights, dtype=np.float64)
        last = int(rng.choice(len(weights), p=weights / weights.sum()))
        times = torch.ones(count, len(weights))
        for stage in range(last + 1):
            density = self.last if stage == last else self.earlier
            times[:, stage] = density.draw(count, path, rng)
        return times, last + 1


def pyramid_loss(
    model: Callable[[list[Tensor], Tensor, int], Sequence[Tensor]],
    x: Tensor,
    t: Tensor,
    noise: Sequence[Tensor],
    path: Path,
    active: int,
) -> Tensor:
    """One loss per sample, (B,): the flow-matching losses of the active stages, summed.

    Args:
        model: (stages of x_t, t, active) -> velocities of the stages; labels and budget are bound by the caller.
        x: images (B, C, H, W).
        t: (B, S), and ``active``: from :meth:`StageDensity.draw`.
        noise: like the stages of the pyramid.
    """
    stages = decompose(x, len(noise))
    at = [times.view(-1, 1, 1, 1) for times in t.unbind(1)]
    states = [interpolate(path, *each) for each in zip(stages, noise, at, strict=True)]
    targets = [velocity(path, *each) for each in zip(stages, noise, at, strict=True)]
    errors = [v.float() - target.float() for v, target in zip(model(states, t, active), targets, strict=True)]
    losses = torch.stack([error.square().flatten(1).mean(1) for error in errors])  # (S, B)
    # Sliced after the stack: heads of masked stages get a zero gradient, and distributed training wants one of each.
    return losses[:active].sum(0)


# ------------------------------------------------------------------------------------------------ sampling

THRESHOLD = 0.1  # the published one


@dataclass(frozen=True)
class StageSchedule:
    """When each stage is sampled: ``steps[k]`` equal steps bring stage k from 1 to ``thresholds[k]`` while later stages
    wait at 1, masked; equal steps until the end then bring it to 0.

    So the coarse stages are mostly done, but can still adapt, when a finer one starts. The last stage has no threshold:
    it goes to 0 at once. For two stages this is the published schedule.

    Attributes:
        steps: at least 1 for each stage.
        thresholds: in [0, 1), one for each stage but the last.

    Raises:
        ElitError: other counts or values.
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
        """``steps`` shared out evenly, the coarser stages taking the rest.

        Raises:
            ElitError: fewer steps than stages.
        """
        if check_steps(steps) < stages:
            raise ElitError(f"{steps} steps are too few for {stages} stages; take at least one for each")
        return cls([(steps + stages - 1 - k) // stages for k in range(stages)], [threshold] * (stages - 1))

    def times(self) -> Tensor:
        """(steps + 1, S) in float64. No column rises, and each ends at 0."""
        starts = [0, *itertools.accumulate(self.steps)]
        columns = []
        for begun, steps, threshold in zip(starts, self.steps, (*self.thresholds, 0.0), strict=False):
            waiting = torch.ones(begun, dtype=torch.float64)
            falling = torch.linspace(1, threshold, steps + 1, dtype=torch.float64)
            closing = torch.linspace(threshold, 0, starts[-1] - begun - steps + 1, dtype=torch.float64)
            columns.append(torch.cat((waiting, falling, closing[1:])))
        return torch.stack(columns, dim=1)

    def active(self) -> list[int]:
        """How many stages have begun, for each step."""
        return [stage + 1 for stage, steps in enumerate(self.steps) for _ in range(steps)]


class FlatModel:
    """A multi-scale model as solvers take one: stages side by side, (B, M), with a time for each element."""

    def __init__(self, model: DFM) -> None:
        self.model = model
        self.shapes = model.stage_shapes
        self.sizes = [math.prod(shape) for shape in self.shapes]
        self.starts = [0, *itertools.accumulate(self.sizes)][:-1]

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    def __call__(self, x: Tensor, t: Tensor, y: Tensor | None, budget: float | None, active: int) -> Tensor:
        """x and t (B, M) -> velocity (B, M)."""
        return flatten(self.model(self.unflatten(x), t[:, self.starts], y, budget, active))

    def unflatten(self, x: Tensor) -> list[Tensor]:
        """(B, M) -> one (B, C, H_k, W_k) per stage."""
        return [part.unflatten(1, shape) for part, shape in zip(x.split(self.sizes, 1), self.shapes, strict=True)]

    def per_element(self, times: Tensor) -> Tensor:
        """Times of the stages (steps + 1, S) -> of their elements (steps + 1, M)."""
        return times.repeat_interleave(torch.tensor(self.sizes), dim=1).to(self.model.device)


def flatten(stages: Sequence[Tensor]) -> Tensor:
    """Stages side by side, (B, M)."""
    return torch.cat([stage.flatten(1) for stage in stages], dim=1)
