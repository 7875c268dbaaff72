"""Learning curves at equal training FLOPs: trainings that are kept, their held-out losses, tables and figures.

What costs less than the plain transformer takes more steps, so that all have its FLOPs. A training is continued where
it was stopped, and taken as it is where it is complete. Losses are on held-out data, the same samples with the same
times and noise for all variants of a seed.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import cycle
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor

from common import above, interval, shown
from elit.analysis import count_flops
from elit.analysis.environment import environment
from elit.analysis.plots import STYLE, STYLES, budget_label, save
from elit.atomic import write_json
from elit.commands.quickstart import BUDGETS, RECIPE
from elit.conditions import Condition
from elit.data import Data
from elit.flow import TrainingFlow
from elit.models import Model
from elit.models.registry import build_on_meta, config_for
from elit.training import ElasticConfig, ModelChoice, TrainConfig, Trainer, ValidationConfig
from elit.training.batch import TrainingDraws
from elit.training.budgets import TrainingLevels, training_levels
from elit.training.build import Task, build_task
from elit.training.objective import Objective

POINTS = 8  # of a curve


@dataclass(frozen=True)
class Variant:
    """What is trained. Trainings are kept by its name, so one that is changed needs another name.

    Attributes:
        fields: of the model, beside those of the scale.
        elit: the levels of training; None is a plain transformer.
        optimizer: what differs from the scale's.
        self_distillation: weight of the distance from the model's own answer at full budget; 0 is none.
        full_first: share of the steps that come first, at full budget alone; of variants with one level a step.
        change: what else is done to a new trainer.
        shown: whether figures have it.
    """

    fields: Mapping[str, Any] = field(default_factory=dict)
    elit: ElasticConfig | None = field(default_factory=ElasticConfig)
    optimizer: Mapping[str, Any] = field(default_factory=dict)
    self_distillation: float = 0.0
    full_first: float = 0.0
    change: Callable[[Trainer], None] = lambda trainer: None
    shown: bool = False


@dataclass(frozen=True)
class Scale:
    """How large the trainings are, and on what.

    Attributes:
        train, held_out: the data.
        fields: of every model.
        patch_size: of every model.
        steps: of the plain transformer.
        batch_size: samples of a step.
        out: where trainings, figure and numbers are kept.
        recipe: everything else.
    """

    train: Data
    held_out: Data
    fields: Mapping[str, Any]
    patch_size: int
    steps: int
    batch_size: int
    out: Path
    recipe: TrainConfig = field(default_factory=lambda: RECIPE)

    @property
    def name(self) -> str:
        """Of the folder of its trainings: what is trained at another scale is another training."""
        return f"{self.train.shape[-1]}px-batch-{self.batch_size}-steps-{self.steps}"


@dataclass(frozen=True)
class Curve:
    """What one training came to.

    Attributes:
        run: its folder.
        flops: of training, forward and backward, at each point.
        losses: by budget, held out, at each point.
    """

    run: str
    flops: Sequence[float]
    losses: Mapping[str, Sequence[float]]

    def final(self, budget: float) -> float | None:
        return self.losses[f"{budget:g}"][-1] if f"{budget:g}" in self.losses else None

    @property
    def best(self) -> float:
        """The last loss at the highest budget."""
        return list(self.losses.values())[-1][-1]


class OutOfTimeError(Exception):
    """The minutes of this call are over; the next one goes on."""


class FullFirst(TrainingLevels):
    """Levels of which none but the highest is drawn before a step ``begin``."""

    begin: int

    def draw(self, seed: int, step: int) -> int:
        return self.levels[-1] if step < self.begin else super().draw(seed, step)


class SelfDistillation(Objective):
    """Adds the distance of a lower budget's velocity from that at full budget, of the same weights, to the loss.

    Args:
        model: what is trained.
        flow: of the model.
        weight: of the distance.
    """

    def __init__(self, model: Model, flow: TrainingFlow, weight: float) -> None:
        super().__init__(model, flow)
        self.terms = {"loss": 1.0, "distance": weight}

    def forward(
        self, x: Tensor, y: Condition | None, draws: TrainingDraws, level: int, features: Tensor | None = None
    ) -> Tensor:
        """Returns the losses and the distances of samples, (2, B)."""
        distance = torch.zeros_like(draws.t)

        def velocity(x_t: Tensor, t: Tensor) -> Tensor:
            nonlocal distance
            predicted: Tensor = self.model(x_t, t, y=y, num_latents=level)
            if level < self.model.num_latents:
                with torch.no_grad():
                    at_full = self.model(x_t, t, y=y, num_latents=self.model.num_latents)
                distance = (predicted - at_full).square().flatten(1).mean(1)
            return predicted

        loss = self.flow.loss(velocity, x, draws.t, draws.noise, draws.active)
        return torch.stack((loss, distance))


def config_of(scale: Scale, variants: Mapping[str, Variant], name: str, seed: int) -> TrainConfig:
    """Returns the training of a variant, which has the FLOPs of so many steps of the plain transformer."""
    variant = variants[name]
    model_name = f"{'DiT' if variant.elit is None else 'ELIT-DiT'}-S/{scale.patch_size}"
    folder = scale.out / scale.name / name.replace(",", "").replace(" ", "-").replace("/", "-")
    config = replace(
        scale.recipe, out=str(folder / f"seed-{seed}"), data="(in memory)", batch_size=scale.batch_size,
        model=ModelChoice(model_name, {**scale.fields, **variant.fields}), elit=variant.elit or ElasticConfig(),
        optimizer=replace(scale.recipe.optimizer, **variant.optimizer), seed=seed,
    )  # fmt: skip
    flops, levels = forward_flops(scale, config, variant)
    plain = Variant(elit=None)
    of_plain = flops
    if variant != plain:
        of_plain, _ = forward_flops(scale, config_of(scale, {"": plain}, "", seed), plain)
    every = max(1, round(scale.steps * of_plain / flops) // POINTS)
    budgets = [budget for budget in BUDGETS if levels and round(budget * levels[1]) in levels[0]]
    validation = ValidationConfig(every=every, budgets=budgets or None, samples=1024, images=0)
    return replace(
        config, steps=every * POINTS, validation=validation, checkpoint_every=every, snapshot_every=every * POINTS // 4
    )


def forward_flops(
    scale: Scale, config: TrainConfig, variant: Variant
) -> tuple[float, tuple[tuple[int, ...], int] | None]:
    """Counts the FLOPs of a forward of one training sample, on average over the levels that steps draw.

    A forward with its backward counts as three forwards, so one at full budget that only teaches is a third of one.

    Returns:
        These, and the levels with J; None of a plain transformer.
    """
    channels, side = scale.train.shape[0], scale.train.shape[-1]
    fields = {**config.model.fields, "in_channels": channels, "num_classes": scale.train.num_classes}
    model = build_on_meta(config_for(config.model.name, resolution=side, downsample=1, **fields))
    if model.interface is None:
        return count_flops(model.config).total, None
    levels = training_levels(config.elit, model)
    drawn = [
        level
        for step in range(400)
        for level in levels.draw_for(config.batch_size, 0, step, config.elit.levels_per_step)
    ]
    full = model.num_latents
    of_level: dict[int, float] = {level: count_flops(model.config, level).total for level in {*drawn, full}}
    teaching = of_level[full] / 3 if variant.self_distillation else 0.0
    of_drawn = mean(of_level[level] + teaching * (level < full) for level in drawn)
    return variant.full_first * of_level[full] + (1 - variant.full_first) * of_drawn, (levels.levels, full)


def train(scale: Scale, variants: Mapping[str, Variant], name: str, seed: int, until: float | None = None) -> Curve:
    """Trains a variant to the end, and reads the held-out losses from the log.

    Args:
        until: the time of the clock at which to stop.

    Raises:
        OutOfTimeError: that time came first. What was trained is kept.
    """
    variant, config = variants[name], config_of(scale, variants, name, seed)

    def build(config: TrainConfig, data: Data) -> Task:
        task = build_task(config, data)
        if variant.full_first:
            levels = FullFirst(*task.levels)
            levels.begin = round(variant.full_first * config.steps)
            task = replace(task, levels=levels)
        if variant.self_distillation:
            objective = SelfDistillation(task.model, task.flow, variant.self_distillation)
            task = replace(task, objective=lambda device: objective)
        return task

    trainer = Trainer(config, scale.train, scale.held_out, build=build)
    variant.change(trainer)
    for _ in trainer:
        if until is not None and time.monotonic() > until:
            trainer.request_stop()
    if trainer.step < config.steps:
        raise OutOfTimeError
    lines = [json.loads(line) for line in (Path(config.out) / "log.jsonl").read_text().splitlines()]
    points = [line for line in lines if any(key.startswith("held_out_loss") for key in line)]
    per_step = 3 * forward_flops(scale, config, variant)[0] * config.batch_size
    budgets = [key.partition("/")[2] for key in points[0] if key.startswith("held_out_loss")]
    losses = {budget: [point[f"held_out_loss/{budget}"] for point in points] for budget in budgets}
    return Curve(config.out, [per_step * point["step"] for point in points], losses)


def train_all(
    scale: Scale, variants: Mapping[str, Variant], names: Sequence[str], seeds: int, until: float | None = None
) -> dict[str, list[Curve]]:
    """Trains every variant with the seeds 0, 1, ..., all of one seed before the next, until a time of the clock.

    Raises:
        OutOfTimeError: see :func:`train`.
    """
    unknown = [name for name in names if name not in variants]
    if unknown:
        raise SystemExit(f"no variant is named {unknown[0]!r}; there are {', '.join(variants)}")
    if not names or seeds < 1 or scale.steps < POINTS:
        raise SystemExit(
            f"names are {names}, seeds {seeds} and steps {scale.steps}; give a name, a seed and {POINTS} steps"
        )
    for name in names:
        wanted = (variants[name].elit or ElasticConfig()).levels_per_step
        if wanted > scale.batch_size:
            raise SystemExit(f"{name} has {wanted} levels in a step of batch_size {scale.batch_size}; raise it")
    curves: dict[str, list[Curve]] = {name: [] for name in names}
    for seed in range(seeds):
        for name in curves:
            curve = train(scale, variants, name, seed, until)
            curves[name].append(curve)
            print(f"seed {seed}: {name}, {curve.flops[-1]:.3g} FLOPs, loss {curve.best:.4f}", flush=True)
    return curves


def print_curves(curves: Mapping[str, Sequence[Curve]], title: str) -> None:
    """Prints final losses by budget, and the best one of each beside the plain transformer of the same seed."""
    plain = [curve.best for curve in curves.get("plain", [])]
    table = Table("variant", "FLOPs", *map(budget_label, BUDGETS), "above plain", title=title, title_justify="left")
    for name, of_seeds in curves.items():
        cells = []
        for budget in BUDGETS:
            values = [loss for curve in of_seeds if (loss := curve.final(budget)) is not None]
            cells.append(shown(interval(values)) if values else "")
        beside = shown(above([curve.best for curve in of_seeds], plain), sign="+") if plain and name != "plain" else ""
        table.add_row(name, f"{of_seeds[0].flops[-1]:.3g}", *cells, beside)
    Console(width=160).print(table)


@mpl.rc_context(STYLE)
def plot_curves(curves: Mapping[str, Sequence[Curve]], variants: Mapping[str, Variant], path: Path) -> None:
    """Draws the loss at the highest budget over training FLOPs, and the loss at the end over the budget."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 4.2))
    drawn = [name for name in curves if variants[name].shown] or list(curves)
    draw_losses(left, {name: curves[name] for name in drawn})
    for number, (name, (colour, marker)) in enumerate(zip(drawn, cycle(STYLES), strict=False)):
        of_seeds = curves[name]
        budgets = [budget for budget in BUDGETS if f"{budget:g}" in of_seeds[0].losses]
        if len(budgets) > 1:
            ends = [interval(curve.losses[f"{budget:g}"][-1] for curve in of_seeds) for budget in budgets]
            beside = [budget * 1.06 ** (number - len(drawn) / 2) for budget in budgets]  # no interval is hidden
            draw_intervals(right, beside, ends, colour, marker)
        else:
            right.axhline(mean(curve.best for curve in of_seeds), color=colour, linewidth=1, linestyle="--")
    right.set_xscale("log", base=2)
    right.set_xticks(BUDGETS, [budget_label(budget) for budget in BUDGETS])
    right.set_xlabel("budget (dashed: no budgets)")
    right.set_ylabel("held-out loss at the end")
    save_with_legend(figure, path)


def draw_losses(axes: Axes, curves: Mapping[str, Sequence[Curve]]) -> None:
    """Draws the mean loss at the highest budget over training FLOPs, from the second point on."""
    for (name, of_seeds), (colour, marker) in zip(curves.items(), cycle(STYLES), strict=False):
        highest = list(of_seeds[0].losses)[-1]
        means = [mean(losses) for losses in zip(*(curve.losses[highest] for curve in of_seeds), strict=True)]
        axes.plot(of_seeds[0].flops[1:], means[1:], color=colour, marker=marker, markersize=4, label=name)
    axes.set_xlabel("training FLOPs")
    axes.set_ylabel("held-out loss at the highest budget")


def draw_intervals(
    axes: Axes, x: Sequence[float], intervals: Sequence[tuple[float, float]], colour: str, marker: str
) -> None:
    """Draws means with their 95 % intervals."""
    means, half_widths = zip(*intervals, strict=True)
    axes.errorbar(x, means, half_widths, color=colour, marker=marker, markersize=4, capsize=3, elinewidth=1)


def save_with_legend(figure: Figure, path: Path) -> None:
    """Saves a figure with one legend below its axes."""
    figure.legend(loc="lower center", ncols=4, frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.09, 1, 1))
    save(figure, path)


def write_curves(curves: Mapping[str, Sequence[Curve]], path: Path, **results: Any) -> None:
    """Writes the curves and further results as JSON, with how they were made."""
    numbers = {name: [vars(curve) for curve in of_seeds] for name, of_seeds in curves.items()}
    write_json(path, {"curves": numbers, **results, "environment": environment()})
