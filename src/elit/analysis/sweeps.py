"""Samples of one model from the same noise at many settings: what each costs, and how good it is."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from elit.analysis.cost import sampling_flops
from elit.conditions import Condition, Text, map_condition
from elit.errors import ElitError
from elit.evaluation import Judge, Quality
from elit.flow import Guidance, sample
from elit.flow.solvers import check_steps
from elit.models import Model


@dataclass(frozen=True)
class Setting:
    """Of the sampler: Euler steps, one budget, guidance or none."""

    steps: int
    budget: float | None = None
    guidance: Guidance | None = None


@dataclass(frozen=True)
class SamplePoint:
    """Samples at a setting.

    Attributes:
        flops: of one sample, all steps; ``flops_per_step`` of one step, the weak term of guidance included.
        seconds: per sample, in batches, of this one run: a rough figure beside the FLOPs.
        quality: where there is a judge.
        saturation: mean of the samples in HSL; None where they are not RGB.
        images: the first samples (M, C, H, W), decoded where there is a decoder.
    """

    setting: Setting
    flops: int
    flops_per_step: int
    seconds: float
    quality: Quality | None
    saturation: float | None
    images: Tensor = field(repr=False)


@dataclass(frozen=True)
class Draws:
    """What all settings of a sweep share: conditions and seeds, hence the noise.

    Attributes:
        count: number of samples, with the seeds ``first_seed``, ``first_seed + 1``, ...
        text: prompts in turn, for models of text; classes come in turn by themselves.
        shown: how many samples a :class:`SamplePoint` keeps.
        path: that of training.
    """

    count: int
    first_seed: int = 0
    text: Text | None = None
    shown: int = 10
    batch_size: int = 64
    path: str = "linear"

    def conditions(self, model: Model) -> Condition | None:
        """One per sample: all classes in turn, or all prompts.

        Raises:
            ElitError: a model of text without prompts.
        """
        if not model.conditional:
            return None
        if model.config.num_classes:
            return torch.arange(self.count) % model.config.num_classes
        if self.text is None:
            raise ElitError("the model has a text stream: give data whose samples have captions")
        which = torch.arange(self.count) % len(self.text.mask)
        return map_condition(lambda values: values[which], self.text)


def sweep(
    model: Model,
    settings: Iterable[Setting],
    draws: Draws,
    judge: Judge | None = None,
    decode: Callable[[Tensor], Tensor] | None = None,
) -> Iterator[SamplePoint]:
    """Draws the same samples at every setting, one point at a time.

    Args:
        judge: of the model's own space; it needs labels.
        decode: latents to images, for models on latents.

    Raises:
        ElitError: settings or conditions that :func:`elit.sample` refuses.
    """
    conditions = draws.conditions(model)
    seeds = range(draws.first_seed, draws.first_seed + draws.count)
    for setting in settings:
        flops = sampling_flops(model, setting.steps, setting.budget, setting.guidance)
        start = time.perf_counter()
        samples = sample(
            model,
            conditions,
            seeds=seeds,
            steps=setting.steps,
            budget=setting.budget,
            guidance=setting.guidance,
            path=draws.path,
            batch_size=draws.batch_size,
        )
        seconds = (time.perf_counter() - start) / draws.count
        quality = judge(samples.cpu(), conditions) if judge and isinstance(conditions, Tensor) else None
        images = samples if decode is None else decode(samples)
        saturation = hsl_saturation(images).mean().item() if images.dim() == 4 and images.shape[1] == 3 else None
        yield SamplePoint(
            setting, flops, flops // setting.steps, seconds, quality, saturation, images[: draws.shown].cpu()
        )


def hsl_saturation(images: Tensor) -> Tensor:
    """Mean saturation, in HSL, of RGB images (B, 3, H, W) in [-1, 1]: (B,) in [0, 1]. Black, white and grey have 0."""
    rgb = (images.clamp(-1, 1) + 1) / 2
    high, low = rgb.amax(1), rgb.amin(1)
    room = 1 - (high + low - 1).abs()  # the largest difference that the lightness leaves
    return torch.where(room > 0, (high - low) / room.clamp_min(torch.finfo(rgb.dtype).tiny), 0).flatten(1).mean(1)


# ------------------------------------------------------------------------------------------------ settings


def guidance_settings(
    model: Model, scales: Sequence[float], steps: int, budget: float | None = None, weak_budget: float | None = None
) -> list[Setting]:
    """No guidance, and every kind that the model allows at every scale.

    Args:
        weak_budget: of ``ag`` and ``ccfg``; None is the model's lowest.

    Raises:
        ElitError: scales that are no guidance, or a model that allows no kind.
    """
    if not scales or min(scales) <= 1:
        raise ElitError(f"guidance scales are {list(scales)}; give numbers above 1 (no guidance is always among them)")
    kinds = [Guidance("cfg", scale) for scale in scales] if model.conditional else []
    if model.levels:
        kinds += [Guidance("ag", scale, weak_budget) for scale in scales]
        kinds += [Guidance("ccfg", scale, weak_budget) for scale in scales if model.conditional]
    if not kinds:
        raise ElitError("the model has neither classes to drop nor budgets to lower, so it cannot be guided")
    return [Setting(steps, budget), *(Setting(steps, budget, guidance) for guidance in kinds)]


def equal_cost_settings(
    model: Model, steps: Sequence[int], budgets: Sequence[float], guidance: Guidance | None = None
) -> list[list[Setting]]:
    """For each number of steps at full budget: every budget, with as many steps as cost nearest to the same.

    Returns:
        One group of about equal cost per number of steps.

    Raises:
        ElitError: no steps, or fewer than 1.
    """
    if not steps:
        raise ElitError("give at least one number of steps to compare budgets at")
    for number in steps:
        check_steps(number)
    full = sampling_flops(model, 1, None, guidance)
    relative = {budget: sampling_flops(model, 1, budget, guidance) / full for budget in budgets}
    return [[Setting(max(1, round(n / relative[b])), b, guidance) for b in budgets] for n in steps]


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Of (cost, badness) points, the indices of those that no other beats in both, by rising cost."""
    front: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: points[i]):
        if not front or points[i][1] < points[front[-1]][1]:
            front.append(i)
    return front
