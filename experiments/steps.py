"""Budgets against sampling steps at equal cost: few steps with all latents, or many with few?

    python experiments/steps.py     # docs/results/experiments.md

Error: how far samples are from those of the same noise with all latents and many steps. Accuracy: how often a
classifier trained on the crops takes a sample for the photograph that was asked for. Distance: Frechet's, in its
features.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import torch
from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table
from torch import Tensor

import elit
from common import ELASTIC, Setting, above, interval, shown, train, write_json
from elit.analysis import count_flops
from elit.analysis.plan import measure_error
from elit.analysis.plots import GREY, STYLE, STYLES, budget_label, save
from elit.evaluation import Judge, train_classifier
from elit.models import Model
from photographs import photographs

FULL_STEPS = (2, 4, 8)  # costs, in steps with all latents
STEP_BUDGETS = (1 / 16, 1 / 4, 1 / 2, 1.0)
MANY = 32  # steps with all latents that errors are measured to
SAMPLES = 200
CLASSIFIER_STEPS = 300


@dataclass(frozen=True)
class Mix:
    """A number of steps at a budget.

    Attributes:
        full_steps: what it costs, in steps with all latents, to the nearest step.
        flops: of one sample.
        error, accuracy, distance: one value per seed.
    """

    full_steps: int
    budget: float
    steps: int
    flops: int
    error: Sequence[float]
    accuracy: Sequence[float]
    distance: Sequence[float]


def draw(model: Model, steps: int, budget: float, count: int) -> Tensor:
    """Samples of all classes in turn, always from the same noise."""
    return elit.sample(model, torch.arange(count) % 3, steps=steps, budget=budget, batch_size=100).cpu()


def measure(models: Sequence[Model], solutions: Sequence[Tensor], judge: Judge, cost: int, budget: float) -> Mix:
    """Samples of every model at a cost in full steps, beside its solutions from the same noise."""
    step = count_flops(models[0].config, models[0].level(budget)).total
    steps = round(cost * count_flops(models[0].config).total / step)
    samples = [draw(model, steps, budget, len(solutions[0])) for model in models]
    quality = [judge(images, torch.arange(len(images)) % 3) for images in samples]
    return Mix(
        cost, budget, steps, steps * step,
        error=[measure_error(images, solution) for images, solution in zip(samples, solutions, strict=True)],
        accuracy=[each.accuracy for each in quality],
        distance=[each.frechet_distance for each in quality],
    )  # fmt: skip


def run(setting: Setting, samples: int = SAMPLES) -> None:
    models = [train(setting, ELASTIC, seed) for seed in range(setting.seeds)]
    solutions = [draw(model, MANY, 1.0, samples) for model in models]
    judge = Judge(train_classifier(photographs(), steps=CLASSIFIER_STEPS), photographs())
    mixes = [measure(models, solutions, judge, cost, budget) for cost in FULL_STEPS for budget in STEP_BUDGETS]
    held_out = photographs(held_out=True)
    real_accuracy = judge(held_out.images, held_out.labels).accuracy
    results: dict[str, Any] = {"mixes": [asdict(mix) for mix in mixes], "accuracy of held-out crops": real_accuracy}
    write_json(setting, "steps", results)
    print_table(mixes, real_accuracy)
    plot(setting.out / "steps.png", mixes)


def print_table(mixes: Sequence[Mix], real_accuracy: float) -> None:
    full = {mix.full_steps: mix for mix in mixes if mix.budget == 1}
    table = Table(
        "cost", "budget", "steps", "MFLOPs", "error", "above full", "accuracy", "distance", "above full", title="steps"
    )
    for mix in mixes:
        same_cost = full[mix.full_steps]
        table.add_row(
            f"{mix.full_steps}", budget_label(mix.budget), f"{mix.steps}", f"{mix.flops / 1e6:.0f}",
            shown(interval(mix.error)), shown(above(mix.error, same_cost.error), sign="+"),
            f"{interval(mix.accuracy)[0]:.1%}",
            shown(interval(mix.distance), 1), shown(above(mix.distance, same_cost.distance), 1, "+"),
        )  # fmt: skip
    console = Console(width=150)
    console.print(table)
    console.print(f"The classifier knows {real_accuracy:.1%} of the held-out crops.")


@mpl.rc_context(STYLE)
def plot(path: Path, mixes: Sequence[Mix]) -> None:
    """Error and distance above those of all latents at the same cost, seed by seed; one line per smaller budget."""
    full = {mix.full_steps: mix for mix in mixes if mix.budget == 1}
    figure, panels = plt.subplots(1, 2, figsize=(8.5, 3.6))
    for axes, measured in zip(panels, ("error", "distance"), strict=True):
        for i, (budget, (colour, marker)) in enumerate(zip(STEP_BUDGETS[:-1], STYLES, strict=False)):
            row = [mix for mix in mixes if mix.budget == budget]
            pairs = [above(getattr(mix, measured), getattr(full[mix.full_steps], measured)) for mix in row]
            means, half_widths = zip(*pairs, strict=True)
            places = [place + 0.08 * (i - 1) for place in range(len(row))]  # beside each other
            label = f"{budget_label(budget)} of the latents"
            axes.errorbar(places, means, yerr=half_widths, color=colour, marker=marker, capsize=3, label=label)
        axes.axhline(0, color=GREY, linewidth=0.8)
        axes.set_xticks(range(len(full)), [f"{cost} ({mix.flops / 1e6:.0f})" for cost, mix in full.items()])
        axes.set_xlabel("cost: steps with all latents (MFLOPs)")
    panels[0].set_ylabel("RMS error above full budget")
    panels[1].set_ylabel("Frechet distance above full budget")
    figure.legend(*panels[0].get_legend_handles_labels(), fontsize=9, loc="lower center", ncols=3)
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    save(figure, path)


if __name__ == "__main__":
    run(auto_cli(Setting))
