"""`sample`: from seeds and labels to tensors in the model's space."""

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from elit.conditions import Condition, condition_size, select_condition
from elit.errors import ElitError
from elit.flow.caching import Cache, embedding_changes
from elit.flow.guidance import Guidance, weak_level
from elit.flow.pyramid import StageSchedule
from elit.flow.solvers import solver_named
from elit.flow.trajectory import Trajectory, advance, flow_of
from elit.interface import Budget, budget_schedules
from elit.models.base import Model
from elit.seeding import normals

Steps = int | StageSchedule


class StepInfo(NamedTuple):
    """Tells a callback about the step that some samples have just done.

    Attributes:
        step: index of the step, from 0.
        steps: number of steps.
        t: times at the end of the step, (B,); for a multi-scale model (B, S).
        x: states at the end of the step, (B, C, H, W) in float64; for a multi-scale model (B, M), its stages flattened
            side by side.
        samples: which samples these are, as indices into what :func:`sample` returns.
    """

    step: int
    steps: int
    t: Tensor
    x: Tensor
    samples: Sequence[int]


Callback = Callable[[StepInfo], None]


@torch.no_grad()
def sample(
    model: Model,
    labels: Condition | Sequence[int] | None = None,
    *,
    seeds: Tensor | Sequence[int] | None = None,
    noise: Tensor | None = None,
    steps: Steps | Sequence[Steps] = 40,
    solver: str = "euler",
    budget: Budget | None = None,
    guidance: Guidance | Sequence[Guidance | None] | None = None,
    path: str = "linear",
    cache: Cache | None = None,
    batch_size: int = 64,
    callback: Callback | None = None,
    progress: bool = False,
) -> Tensor:
    """Draws samples from a model, from noise to data.

    Each sample is a function of its own seed, label and settings. It does not depend on the batch size, the order or
    the other samples (up to the rounding of the matrix kernels).

    Args:
        model: any model of this library.
        labels: one class per sample, (B,); for a model of text an :class:`~elit.conditions.Text`; None for an
            unconditional model.
        seeds: one whole number per sample, (B,); default 0, 1, 2, ...
        noise: starting noise (B, C, H, W) in place of that of the seeds, which then only serve the draws of ``sde``;
            for a multi-scale model (B, M), its stages flattened side by side.
        steps: number of steps, or a list with one per sample. A multi-scale model also takes a
            :class:`~elit.flow.pyramid.StageSchedule`; a number is divided evenly among its stages, with thresholds of
            0.1.
        solver: ``euler``, ``heun`` (two evaluations per step) or ``sde`` (Euler-Maruyama).
        budget: fraction of the latents to use, in (0, 1]; a list with one per step; a function of the noise level (for
            a multi-scale model the mean over its elements); a tensor with one per sample, (B,), or one per sample and
            step, (B, steps). None is the most that was trained, and so is a budget above it.
        guidance: a :class:`Guidance` for all samples, or a list with one (or None) per sample; None is no guidance.
        path: ``linear`` or ``cosine``, as in training.
        cache: when to skip the core and use its earlier effect again, see :class:`Cache`; None runs it at every step.
        batch_size: number of samples in one forward.
        callback: called after each step with a :class:`StepInfo`.
        progress: show a bar of steps.

    Returns:
        Samples (B, C, H, W) in the model's space, pixels in [-1, 1] or latents: float32, on the model's device.
        :func:`elit.to_pil` turns them into pictures.

    Raises:
        ElitError: an argument is not as described above, or the model was not trained for a budget.
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ElitError(f"batch_size is {batch_size!r}; it must be a whole number, at least 1")
    wanted = _Wanted(model, labels, seeds, noise, steps, solver, budget, guidance, path, cache)
    samples: list[Tensor] = [torch.empty(0)] * wanted.count
    batches = [range(wanted.count)[start : start + batch_size] for start in range(0, wanted.count, batch_size)]
    total = sum(len(wanted.times[group[0]]) - 1 for batch in batches for group in wanted.together(batch))
    with tqdm(total=total, desc="sampling", unit="step", disable=not progress) as bar:
        for indices_of_batch in batches:
            batch = [(wanted.trajectory(group), group) for group in wanted.together(indices_of_batch)]
            while not all(trajectory.is_done for trajectory, _ in batch):
                before = [trajectory.step for trajectory, _ in batch]
                advance(model, [trajectory for trajectory, _ in batch])
                for (trajectory, indices), done in zip(batch, before, strict=True):
                    if trajectory.step > done:
                        bar.update()
                        if callback:
                            t = trajectory.times[trajectory.step]
                            callback(StepInfo(done, trajectory.steps, t, trajectory.x, indices))
            for trajectory, indices in batch:
                for index, image in zip(indices, trajectory.samples(), strict=True):
                    samples[index] = image
    return torch.stack(samples)


def trajectories(
    model: Model,
    labels: Condition | Sequence[int] | None = None,
    *,
    seeds: Tensor | Sequence[int] | None = None,
    noise: Tensor | None = None,
    steps: Steps | Sequence[Steps] = 40,
    solver: str = "euler",
    budget: Budget | None = None,
    guidance: Guidance | Sequence[Guidance | None] | None = None,
    path: str = "linear",
    cache: Cache | None = None,
) -> list[Trajectory]:
    """Starts one trajectory per sample, for callers that advance them on their own (:func:`~elit.flow.advance`).

    It computes nothing yet. Trajectories may be advanced together with others, which may have begun earlier.

    Args:
        model, labels, seeds, noise, steps, solver, budget, guidance, path, cache: as for :func:`sample`.

    Returns:
        One :class:`Trajectory` per sample, in their order. When :func:`~elit.flow.advance` has brought one to its end,
        ``trajectory.is_done`` is True, and ``trajectory.samples()`` is its sample, (1, C, H, W).

    Raises:
        ElitError: as for :func:`sample`.
    """
    wanted = _Wanted(model, labels, seeds, noise, steps, solver, budget, guidance, path, cache)
    return [wanted.trajectory([index]) for index in range(wanted.count)]


class _Wanted:
    """Checks the arguments of :func:`sample` and holds them sample by sample."""

    def __init__(
        self,
        model: Model,
        labels: Condition | Sequence[int] | None,
        seeds: Tensor | Sequence[int] | None,
        noise: Tensor | None,
        steps: Steps | Sequence[Steps],
        solver: str,
        budget: Budget | None,
        guidance: Guidance | Sequence[Guidance | None] | None,
        path: str,
        cache: Cache | None,
    ) -> None:
        self.model = model
        self.y, self.count = _conditions(model, labels, seeds, noise)
        self.seeds = list(range(self.count)) if seeds is None else [_seed(seed) for seed in seeds]
        self.flow, self.solver = flow_of(model, path), solver_named(solver)
        each_steps = _one_each("steps", steps, self.count)
        grids = {id(each): self.flow.times(self.solver, each) for each in each_steps}
        noise_levels = {key: self.flow.noise_level(times[:-1]).tolist() for key, times in grids.items()}
        self.times = [grids[id(each)] for each in each_steps]
        schedules = budget_schedules(budget, [noise_levels[id(each)] for each in each_steps])
        level_of = {each: model.level(each) for schedule in schedules for each in set(schedule)}
        self.levels = [[level_of[each] for each in schedule] for schedule in schedules]
        self.guidance: list[Guidance | None] = _one_each("guidance", guidance, self.count)
        wrong = [each for each in self.guidance if not isinstance(each, Guidance | None)]
        if wrong:
            raise ElitError(f"guidance is {wrong[0]!r}; it must be an elit.Guidance, or a list with one (or None) each")
        self.null = None if self.y is None else model.null_condition(self.y)
        self.weak_levels = [None if each is None else weak_level(model, each) for each in self.guidance]
        if noise is not None and tuple(noise.shape) != (self.count, *self.flow.state_shape):
            raise ElitError(
                f"noise has shape {tuple(noise.shape)}; the model takes {(self.count, *self.flow.state_shape)}"
            )
        self.noise = noise
        if not isinstance(cache, Cache | None):
            raise ElitError(f"cache is {cache!r}; it must be an elit.Cache")
        self.cache = cache
        self.core_runs: dict[int, list[bool]] = {}
        if cache is not None:
            changes = {key: embedding_changes(model, times) for key, times in grids.items()}
            self.core_runs = {key: cache.steps_that_run(of_grid) for key, of_grid in changes.items()}
        self.each_steps = each_steps

    def together(self, indices: Sequence[int]) -> list[list[int]]:
        """Groups samples by their number of steps: those that one trajectory can hold."""
        groups: dict[int, list[int]] = {}
        for index in indices:
            groups.setdefault(len(self.times[index]), []).append(index)
        return list(groups.values())

    def _core_runs(self, indices: list[int]) -> list[tuple[bool, ...]]:
        """Tells for each step and sample whether the core runs."""
        return list(zip(*(self.core_runs[id(self.each_steps[index])] for index in indices), strict=True))

    def trajectory(self, indices: list[int]) -> Trajectory:
        """Starts samples that take the same number of steps."""
        rows = torch.tensor(indices)
        on_device = rows.to(self.model.device)
        seeds = [self.seeds[index] for index in indices]
        if self.noise is None:
            noise = normals([(seed, "start") for seed in seeds], self.flow.state_shape)
        else:
            noise = self.noise[rows.to(self.noise.device)]
        return Trajectory(
            self.flow,
            self.solver,
            noise,
            times=torch.stack([self.times[index] for index in indices], dim=1),
            levels=list(zip(*(self.levels[index] for index in indices), strict=True)),
            y=None if self.y is None else select_condition(self.y, on_device),
            null=None if self.null is None else select_condition(self.null, on_device),
            guidance=[self.guidance[index] for index in indices],
            weak_levels=[self.weak_levels[index] for index in indices],
            seeds=seeds,
            cache=self.cache,
            core_runs=[] if self.cache is None else self._core_runs(indices),
            device=self.model.device,
        )


def _seed(seed: Any) -> int:
    try:
        return operator.index(seed)
    except TypeError as error:
        raise ElitError(f"a seed is {seed!r}; seeds must be whole numbers, one per sample") from error


def _one_each(name: str, given: Any, count: int) -> list[Any]:
    """Returns a setting once per sample, where it is one for all samples or a list with one for each."""
    if not isinstance(given, Sequence) or isinstance(given, str):
        return [given] * count
    if len(given) != count:
        raise ElitError(f"{name} lists {len(given)} values for {count} samples; give one per sample, or one for all")
    return list(given)


def _conditions(
    model: Model, labels: Condition | Sequence[int] | None, seeds: Tensor | Sequence[int] | None, noise: Tensor | None
) -> tuple[Condition | None, int]:
    """Returns labels (or text) on the model's device, and the number of samples."""
    counts = {
        name: condition_size(v) for name, v in (("labels", labels), ("seeds", seeds), ("noise", noise)) if v is not None
    }
    if len(set(counts.values())) > 1:
        raise ElitError("one of each per sample, not " + ", ".join(f"{n} {name}" for name, n in counts.items()))
    if not counts or min(counts.values()) == 0:
        raise ElitError("nothing to sample: give labels, seeds or noise, one per sample")
    if (labels is None) == model.conditional:
        has = "takes text: give text" if model.takes_text else f"has {model.config.num_classes} classes: give labels"
        raise ElitError(f"the model {has if labels is None else 'has no classes: give no labels'}")
    return None if labels is None else model.as_condition(labels), next(iter(counts.values()))
