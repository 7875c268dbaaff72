"""`sample`: from seeds and labels to tensors in the model's space."""

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from elit.conditions import Condition, condition_size, map_condition
from elit.errors import ElitError
from elit.flow.guidance import Guidance, model_velocity, weak_budget
from elit.flow.paths import path_named
from elit.flow.pyramid import FlatModel, StageSchedule, recompose
from elit.flow.solvers import Callback, Draw, StepInfo, solver_named, time_grid
from elit.interface import Budget, budget_per_step
from elit.models.base import Model
from elit.models.dfm import DFM
from elit.seeding import normals


@torch.inference_mode()
def sample(
    model: Model,
    labels: Condition | Sequence[int] | None = None,
    *,
    seeds: Tensor | Sequence[int] | None = None,
    noise: Tensor | None = None,
    steps: int | StageSchedule = 40,
    solver: str = "euler",
    budget: Budget | None = None,
    guidance: Guidance | None = None,
    path: str = "linear",
    batch_size: int = 64,
    callback: Callback | None = None,
    progress: bool = False,
) -> Tensor:
    """Draws samples. Each is a function of its seed and label: not of the batch size, the order or the other samples.

    Args:
        model: any model of this library.
        labels: one class per sample, (B,), or for a model of text its prompts; None for an unconditional model.
        seeds: one per sample, (B,); default 0, 1, 2, ...
        noise: starting noise (B, C, H, W) in place of that of the seeds (which then serve the draws of ``sde``); of a
            multi-scale model (B, M), its stages flattened side by side.
        steps: number of steps; of a multi-scale model also a :class:`~elit.flow.pyramid.StageSchedule`, which a number
            means evenly, with thresholds of 0.1.
        solver: ``euler``, ``heun`` (two evaluations per step) or ``sde`` (Euler-Maruyama).
        budget: fraction of latents in (0, 1], one per step, or a function of the noise level (of a multi-scale model
            the mean over its elements); None is all.
        guidance: see :class:`Guidance`; None is none.
        path: ``linear`` or ``cosine``, the one of training.
        batch_size: samples per forward.
        callback: called after each step of each batch; a multi-scale model tells its flat state and times (M,).
        progress: show a bar of steps.

    Returns:
        Samples (B, C, H, W), float32, on the model's device; of a multi-scale model recomposed from its stages.

    Raises:
        ElitError: an input that is not as said above.
    """
    y, count = _labels(model, labels, seeds, noise)
    solve = solver_named(solver)
    problem = _problem(model, solver, steps)
    times = problem.times
    start = _start(problem.shape, count, seeds, noise)
    budgets = budget_per_step(budget, times[:-1].view(len(times) - 1, -1).mean(1).tolist())
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ElitError(f"batch_size is {batch_size!r}; it must be a whole number, at least 1")
    for each in set(budgets):
        model.level(each)
    weak = weak_budget(model, guidance) if guidance else None
    seed_list = range(count) if seeds is None else [int(s) for s in seeds]

    def draw_for(part: slice) -> Draw:
        def draw(step: int) -> Tensor:
            return _normal(seed_list[part], f"step {step}", problem.shape).to(model.device, torch.float64)

        return draw

    samples = []
    total = (len(times) - 1) * -(-count // batch_size)
    with tqdm(total=total, desc="sampling", unit="step", disable=not progress) as bar:

        def after_step(info: StepInfo) -> None:
            bar.update()
            if callback:
                callback(info)

        for at in range(0, count, batch_size):
            part = slice(at, at + batch_size)
            condition = None if y is None else map_condition(itemgetter(part), y)
            null = None if condition is None else model.null_condition(condition)
            velocity = model_velocity(problem.model, condition, null, budgets, guidance, weak, problem.active)
            x = start[part].to(model.device, torch.float64)
            x = solve(velocity, x, times, path_named(path), draw_for(part), after_step)
            samples.append(problem.image(x.float()))
    return torch.cat(samples)


class _Problem(NamedTuple):
    """What a solver is given: a model, states of a shape, times; and how the last state becomes an image."""

    model: Callable[..., Tensor]
    shape: tuple[int, ...]
    times: Tensor
    active: list[int] | None
    image: Callable[[Tensor], Tensor]


def _problem(model: Model, solver: str, steps: int | StageSchedule) -> _Problem:
    if not isinstance(model, DFM):
        if isinstance(steps, StageSchedule):
            raise ElitError("a stage schedule is for multi-scale models (DFM); give a number of steps")
        return _Problem(model, model.input_shape(), time_grid(solver, steps), None, lambda x: x)
    stages = model.config.stages
    schedule = steps if isinstance(steps, StageSchedule) else StageSchedule.even(steps, stages)
    if len(schedule.steps) != stages:
        raise ElitError(f"the schedule has {len(schedule.steps)} stages; the model has {stages}")
    flat = FlatModel(model)
    times = flat.per_element(schedule.times())
    return _Problem(flat, (sum(flat.sizes),), times, schedule.active(), lambda x: recompose(flat.unflatten(x)))


def _normal(seeds: Sequence[int], purpose: str, shape: tuple[int, ...]) -> Tensor:
    """Standard normal draws (len(seeds), *shape), each from its own seed."""
    return normals([(seed, purpose) for seed in seeds], shape)


def _labels(
    model: Model, labels: Condition | Sequence[int] | None, seeds: Tensor | Sequence[int] | None, noise: Tensor | None
) -> tuple[Condition | None, int]:
    """Labels (or text) on the model's device, and the number of samples."""
    counts = {
        name: condition_size(v) for name, v in (("labels", labels), ("seeds", seeds), ("noise", noise)) if v is not None
    }
    if len(set(counts.values())) > 1:
        raise ElitError("one of each per sample, not " + ", ".join(f"{n} {name}" for name, n in counts.items()))
    if not counts or min(counts.values()) == 0:
        raise ElitError("nothing to sample: give labels, seeds or noise, one per sample")
    if (labels is None) == model.conditional:
        classes = model.config.num_classes
        has = f"{classes} classes: give labels" if classes else "a text stream: give text"
        raise ElitError(f"the model has {has if labels is None else 'no classes: give no labels'}")
    return None if labels is None else model.as_condition(labels), next(iter(counts.values()))


def _start(shape: tuple[int, ...], count: int, seeds: Tensor | Sequence[int] | None, noise: Tensor | None) -> Tensor:
    if noise is None:
        return _normal(range(count) if seeds is None else [int(s) for s in seeds], "start", shape)
    if tuple(noise.shape) != (count, *shape):
        raise ElitError(f"noise has shape {tuple(noise.shape)}; the model takes {(count, *shape)}")
    return noise
