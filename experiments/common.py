"""What the experiments share: trainings that are kept, losses with intervals over seeds, tables and figures."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import torch
from rich.console import Console
from rich.table import Table
from scipy.stats import t as student

from elit import atomic
from elit.analysis import count_flops
from elit.analysis.environment import environment
from elit.analysis.plots import GREY, STYLE, STYLES, budget_label, save
from elit.commands.quickstart import BUDGETS, RECIPE
from elit.data import Data
from elit.evaluation import held_out_loss
from elit.models import Model
from elit.training import ElasticConfig, ModelChoice, Trainer
from photographs import photographs

DIGITS = replace(
    RECIPE,
    data="digits",
    steps=1200,
    batch_size=64,
    checkpoint_every=400,
    model=ModelChoice(
        "ELIT-DiT-S/2",
        {name: value for name, value in RECIPE.model.fields.items() if name != "variant"} | {"positions": "sincos"},
    ),
    elit=ElasticConfig(group_size=4, min_mask_prob=0.0, max_mask_prob=0.9375),
)
"""``configs/train/digits.yaml``: the quickstart's optimizer, with learned latents, one budget a step and a table of
positions."""


@dataclass(frozen=True)
class Setting:
    """How large an experiment is. The defaults are minutes on a CPU.

    Attributes:
        seeds: trainings of every variant, with the seeds 0, 1, ...
        steps: of a training, each of 32 images.
        width: of every model; heads are 16 wide.
        out: where trainings, tables and figures are kept; a training that is there is not repeated.
    """

    seeds: int = 3
    steps: int = 250
    width: int = 64
    out: Path = Path("runs/experiments")


@dataclass(frozen=True)
class Variant:
    """What is trained, once per seed, and at which budgets it is looked at.

    Attributes:
        name: of its folder.
        fields: of the model that differ from the quickstart's.
        elit: the budgets of training.
        budgets: those of the measurement.
        change: what else is done to a new trainer.
    """

    name: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    elit: ElasticConfig = field(default_factory=lambda: DIGITS.elit)
    budgets: Sequence[float] = BUDGETS
    change: Callable[[Trainer], None] = lambda trainer: None


ELASTIC = Variant("elastic")
"""Six blocks, split 1-4-1, and 64 tokens in four windows of 16 latents. The other variants differ from it."""


@dataclass(frozen=True)
class Point:
    """One measurement of a variant: the loss of each seed, on the same images, times and noises."""

    budget: float
    flops: int
    losses: Sequence[float]


def train(
    setting: Setting, variant: Variant, seed: int, data: Data | None = None, model: str = "ELIT-DiT-S/2"
) -> Model:
    """The averaged weights of a training, continued or taken as they are where its folder has them.

    Args:
        data: default the photographs.
    """
    fields = {"width": setting.width, "num_heads": setting.width // 16}
    scale = f"width-{setting.width}-steps-{setting.steps}"
    config = replace(  # of digits.yaml, with half its batch
        DIGITS, out=str(setting.out / scale / variant.name / f"seed-{seed}"), data="photographs",
        model=ModelChoice(model, {**DIGITS.model.fields, **fields, **variant.fields}), elit=variant.elit,
        steps=setting.steps, batch_size=32, seed=seed, checkpoint_every=setting.steps,
    )  # fmt: skip
    trainer = Trainer(config, photographs() if data is None else data)
    variant.change(trainer)
    trainer.run_to_end()
    averaged = trainer.ema.module.eval()
    assert isinstance(averaged, Model)
    return averaged


def measure(setting: Setting, variant: Variant) -> list[Point]:
    """Trains a variant with every seed: held-out loss at its budgets."""
    models = [train(setting, variant, seed) for seed in range(setting.seeds)]
    held_out = photographs(held_out=True)
    return [
        Point(
            budget,
            count_flops(models[0].config, models[0].level(budget)).total,
            [held_out_loss(model, held_out, budget, DIGITS.times).mean().item() for model in models],
        )
        for budget in variant.budgets
    ]


def interval(values: Iterable[float]) -> tuple[float, float]:
    """Mean and 95 % half-width over seeds (Student's t); one seed has no half-width."""
    seeds = torch.tensor(list(values), dtype=torch.float64)
    if len(seeds) < 2:
        return seeds.mean().item(), math.nan
    half_width = student.ppf(0.975, len(seeds) - 1) * seeds.std().item() / len(seeds) ** 0.5
    return seeds.mean().item(), float(half_width)


def above(losses: Sequence[float], others: Sequence[float]) -> tuple[float, float]:
    """Mean and 95 % half-width of the differences, seed by seed: what a seed does to both is gone."""
    return interval(a - b for a, b in zip(losses, others, strict=True))


def compare(setting: Setting, name: str, series: Mapping[str, Sequence[Variant]]) -> None:
    """Trains and measures series of variants; prints the table, and writes it as JSON and as a figure.

    Args:
        name: of the files.
        series: the points of all variants of one are joined. The last point of the first series, the elastic model at
            full budget, is what all are compared with.
    """
    points = {title: list(chain(*(measure(setting, v) for v in variants))) for title, variants in series.items()}
    write_json(setting, name, {title: [asdict(p) for p in row] for title, row in points.items()})
    print_losses(name, points)
    full = next(iter(points.values()))[-1].losses
    plot_losses(setting.out / f"{name}.png", points, full, "loss above the first at full budget")


def print_losses(title: str, points: Mapping[str, Sequence[Point]]) -> None:
    """Losses, how far they are above the series' own at full budget, and above the first series; all with intervals."""
    first = next(iter(points.values()))
    at_budget = {point.budget: point for point in first}
    table = Table("", "budget", "MFLOPs", "held-out loss", "above its full", "above the first", title=title)
    for series, row in points.items():
        for point in row:
            same = at_budget.get(point.budget)
            table.add_row(
                series, budget_label(point.budget), f"{point.flops / 1e6:.1f}", shown(interval(point.losses)),
                shown(above(point.losses, row[-1].losses), sign="+"),
                "" if row is first or same is None else shown(above(point.losses, same.losses), sign="+"),
            )  # fmt: skip
    Console(width=120).print(table)


def shown(value: tuple[float, float], digits: int = 4, sign: str = "") -> str:
    """``0.1139 ± 0.0111``; with the sign ``+`` a difference, ``+0.0012 ± 0.0003``."""
    return f"{value[0]:{sign}.{digits}f} ± {value[1]:.{digits}f}"


@mpl.rc_context(STYLE)
def plot_losses(path: Path, points: Mapping[str, Sequence[Point]], others: Sequence[float], label: str) -> None:
    """Differences to the losses of others, seed by seed, over the cost of a forward."""
    figure, axes = plt.subplots(figsize=(5.6, 3.6))
    for i, ((series, row), (colour, marker)) in enumerate(zip(points.items(), STYLES, strict=False)):
        means, half_widths = zip(*(above(point.losses, others) for point in row), strict=True)
        cost = [point.flops / 1e6 * (1 + i / 100) for point in row]  # a little beside the others: no interval is hidden
        style: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 5, "capsize": 3, "elinewidth": 1}
        axes.errorbar(cost, means, yerr=half_widths, label=series, **style)
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.set_xlim(left=0)
    axes.set_xlabel("cost of a forward (MFLOPs)")
    axes.set_ylabel(label)
    axes.legend(fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=3)
    save(figure, path)


def write_json(setting: Setting, name: str, results: Mapping[str, Any]) -> None:
    """Results, with how they were made."""
    record = {"setting": asdict(setting) | {"out": str(setting.out)}, "environment": environment(), "results": results}
    atomic.write_json(setting.out / f"{name}.json", record)
