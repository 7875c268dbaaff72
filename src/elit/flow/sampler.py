"""`sample`: from seeds and labels to tensors in the model's space."""

from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from elit.errors import ElitError
from elit.flow.guidance import Guidance, model_velocity, weak_budget
from elit.flow.paths import path_named
from elit.flow.solvers import SOLVERS, Callback, Draw, StepInfo, time_grid
from elit.interface import Budget, budget_per_step
from elit.models.base import Model
from elit.seeding import generator


@torch.inference_mode()
def sample(
    model: Model,
    labels: Tensor | Sequence[int] | None = None,
    *,
    seeds: Tensor | Sequence[int] | None = None,
    noise: Tensor | None = None,
    steps: int = 40,
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
        labels: one class per sample, (B,); None for an unconditional model.
        seeds: one per sample, (B,); default 0, 1, 2, ...
        noise: starting noise (B, C, H, W) in place of that of the seeds (which then serve the draws of ``sde``).
        steps: number of steps.
        solver: ``euler``, ``heun`` (two evaluations per step) or ``sde`` (Euler-Maruyama).
        budget: fraction of latents in (0, 1], one per step, or a function of the noise level; None is all.
        guidance: see :class:`Guidance`; None is none.
        path: ``linear`` or ``cosine``, the one of training.
        batch_size: samples per forward.
        callback: called after each step of each batch.
        progress: show a bar of steps.

    Returns:
        Samples (B, C, H, W), float32, on the model's device.

    Raises:
        ElitError: an input that is not as said above.
    """
    y, count = _labels(model, labels, seeds, noise)
    start = _start(model, count, seeds, noise)
    times = time_grid(solver, steps)
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ElitError(f"batch_size is {batch_size!r}; it must be a whole number, at least 1")
    budgets = budget_per_step(budget, times[:-1].tolist())
    for each in set(budgets):
        model.level(each)
    weak = weak_budget(model, guidance) if guidance else None
    seed_list = range(count) if seeds is None else [int(s) for s in seeds]

    def draw_for(part: slice) -> Draw:
        def draw(step: int) -> Tensor:
            return _normal(seed_list[part], f"step {step}", model.input_shape()).to(model.device, torch.float64)

        return draw

    samples = []
    with tqdm(total=steps * -(-count // batch_size), desc="sampling", unit="step", disable=not progress) as bar:

        def after_step(info: StepInfo) -> None:
            bar.update()
            if callback:
                callback(info)

        for at in range(0, count, batch_size):
            part = slice(at, at + batch_size)
            condition = None if y is None else y[part]
            null = None if condition is None else model.null_condition(condition)
            velocity = model_velocity(model, condition, null, budgets, guidance, weak)
            x = start[part].to(model.device, torch.float64)
            samples.append(SOLVERS[solver](velocity, x, times, path_named(path), draw_for(part), after_step).float())
    return torch.cat(samples)


def _normal(seeds: Sequence[int], purpose: str, shape: tuple[int, ...]) -> Tensor:
    """Standard normal draws (len(seeds), *shape), each from its own seed; on the CPU, so that devices agree."""
    return torch.stack([torch.randn(shape, generator=generator(seed, purpose)) for seed in seeds])


def _labels(
    model: Model, labels: Tensor | Sequence[int] | None, seeds: Tensor | Sequence[int] | None, noise: Tensor | None
) -> tuple[Tensor | None, int]:
    """Labels on the model's device, and the number of samples."""
    counts = {name: len(v) for name, v in (("labels", labels), ("seeds", seeds), ("noise", noise)) if v is not None}
    if len(set(counts.values())) > 1:
        raise ElitError("one of each per sample, not " + ", ".join(f"{n} {name}" for name, n in counts.items()))
    if not counts or min(counts.values()) == 0:
        raise ElitError("nothing to sample: give labels, seeds or noise, one per sample")
    if (labels is None) != (model.config.num_classes == 0):
        has = f"{model.config.num_classes} classes: give labels" if labels is None else "no classes: give no labels"
        raise ElitError(f"the model has {has}")
    count = next(iter(counts.values()))
    if labels is None:
        return None, count
    try:
        y = torch.as_tensor(labels)
    except (TypeError, ValueError) as error:
        raise ElitError(f"labels must be whole numbers, one per sample, not {labels!r}") from error
    if y.is_floating_point() or y.dim() != 1:
        raise ElitError(f"labels must be whole numbers, one per sample, not {y.dtype} of shape {tuple(y.shape)}")
    model.check_labels(y)
    return y.to(model.device), count


def _start(model: Model, count: int, seeds: Tensor | Sequence[int] | None, noise: Tensor | None) -> Tensor:
    shape = (count, *model.input_shape())
    if noise is None:
        return _normal(range(count) if seeds is None else [int(s) for s in seeds], "start", shape[1:])
    if tuple(noise.shape) != shape:
        raise ElitError(f"noise has shape {tuple(noise.shape)}; the model takes {shape}")
    return noise
