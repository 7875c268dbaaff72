"""Samples one model from the same noise at many settings, to see what each costs and how good it is."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from elit.analysis.flops import sampling_flops
from elit.conditions import Condition, Text, map_condition
from elit.errors import ElitError
from elit.flow import Guidance, sample
from elit.flow.solvers import check_steps
from elit.models import Model


@dataclass(frozen=True)
class SamplerSettings:
    """How samples are drawn: the number of Euler steps, one budget for all of them, and guidance or none."""

    steps: int
    budget: float | None = None
    guidance: Guidance | None = None


@dataclass(frozen=True)
class SamplePoint:
    """Samples that were drawn with some settings, what they cost and how good they are.

    Attributes:
        flops: of one sample, all steps; ``flops_per_step`` of one step, the weak term of guidance included.
        seconds: per sample, in batches, of this one run: a rough figure beside the FLOPs.
        quality: what the judge says, such as :class:`elit.evaluation.Quality`; None without one.
        saturation: mean saturation of the samples in HSL; None where they are not RGB.
        images: the first samples (M, C, H, W), decoded where there is a decoder.
    """

    setting: SamplerSettings
    flops: int
    flops_per_step: int
    seconds: float
    quality: Any
    saturation: float | None
    images: Tensor = field(repr=False)


@dataclass(frozen=True)
class SweepConfig:
    """What all settings of a sweep share: conditions and seeds, hence the noise.

    Attributes:
        count: number of samples, with the seeds ``first_seed``, ``first_seed + 1``, ...
        text: prompts in turn, for models of text; classes come in turn by themselves.
        shown: how many samples a :class:`SamplePoint` keeps.
        batch_size: samples at a time.
        path: the path that the model was trained on.
    """

    count: int
    first_seed: int = 0
    text: Text | None = None
    shown: int = 10
    batch_size: int = 64
    path: str = "linear"

    def conditions(self, model: Model) -> Condition | None:
        """Returns one condition per sample: all classes in turn, or all prompts; None for an unconditional model.

        Raises:
            ElitError: a model of text without prompts.
        """
        if not model.conditional:
            return None
        if model.config.num_classes:
            return torch.arange(self.count) % model.config.num_classes
        if self.text is None:
            raise ElitError("the model takes text: give data whose samples have captions")
        which = torch.arange(self.count) % len(self.text.mask)
        return map_condition(lambda values: values[which], self.text)


def sweep(
    model: Model,
    settings: Iterable[SamplerSettings],
    config: SweepConfig,
    judge: Callable[[Tensor, Tensor], Any] | None = None,
    decode: Callable[[Tensor], Tensor] | None = None,
) -> Iterator[SamplePoint]:
    """Draws the same samples with each of several settings, one point at a time.

    Args:
        judge: (samples in the model's own space, labels) -> quality, such as :class:`elit.evaluation.Judge`; for models
            with classes.
        decode: latents to images, for models on latents.

    Raises:
        ElitError: settings or conditions that :func:`elit.sample` refuses.
    """
    conditions = config.conditions(model)
    seeds = range(config.first_seed, config.first_seed + config.count)
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
            path=config.path,
            batch_size=config.batch_size,
        )
        seconds = (time.perf_counter() - start) / config.count
        quality = judge(samples.cpu(), conditions) if judge and isinstance(conditions, Tensor) else None
        images = samples if decode is None else decode(samples)
        saturation = hsl_saturation(images).mean().item() if images.dim() == 4 and images.shape[1] == 3 else None
        yield SamplePoint(
            setting, flops, flops // setting.steps, seconds, quality, saturation, images[: config.shown].cpu()
        )


def hsl_saturation(images: Tensor) -> Tensor:
    """Returns the mean saturation, in HSL, of RGB images (B, 3, H, W) in [-1, 1]: (B,) in [0, 1].

    Black, white and grey have 0.
    """
    rgb = (images.clamp(-1, 1) + 1) / 2
    high, low = rgb.amax(1), rgb.amin(1)
    room = 1 - (high + low - 1).abs()  # the largest difference that the lightness leaves
    return torch.where(room > 0, (high - low) / room.clamp_min(torch.finfo(rgb.dtype).tiny), 0).flatten(1).mean(1)


# ------------------------------------------------------------------------------------------------ settings


def guidance_settings(
    model: Model, scales: Sequence[float], steps: int, budget: float | None = None, weak_budget: float | None = None
) -> list[SamplerSettings]:
    """Lists settings without guidance, and with every kind that the model allows at every scale.

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
    return [SamplerSettings(steps, budget), *(SamplerSettings(steps, budget, guidance) for guidance in kinds)]


def equal_cost_settings(
    model: Model, steps: Sequence[int], budgets: Sequence[float], guidance: Guidance | None = None
) -> list[list[SamplerSettings]]:
    """Lists settings of equal cost: for each number of steps at full budget, every budget with as many steps as cost
    nearest to the same.

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
    return [[SamplerSettings(max(1, round(n / relative[b])), b, guidance) for b in budgets] for n in steps]


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Returns the indices of those (cost, badness) points that no other beats in both, by rising cost."""
    front: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: points[i]):
        if not front or points[i][1] < points[front[-1]][1]:
            front.append(i)
    return front
