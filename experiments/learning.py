"""Why does the interface learn slowly in small, and what helps? One change at a time, at equal training FLOPs.

    python experiments/learning.py                                  # docs/results/learning.md
    python experiments/learning.py --names '[plain, learned/2]' --seeds 1

Every training sees scenes  for the FLOPs of so many steps of the plain transformer: what costs less takes
more steps. It is continued where it was stopped, and taken as it is where it is complete, so that pieces of the whole
can run one by one. Losses are on held-out scenes, the same ones with the same noise for all variants of a seed.

Names: where latents begin (`learned` vectors, or `anchored` to tokens), then how many levels share a step: 1 is one
drawn at random, 2 adds full budget, 3 the lowest too; `full` trains full budget alone.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import torch
from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table

from common import above, interval, shown
from elit.analysis import count_flops
from elit.analysis.environment import environment
from elit.analysis.plots import STYLE, STYLES, budget_label, save
from elit.atomic import write_json
from elit.commands.quickstart import BUDGETS, RECIPE
from elit.data import scenes
from elit.flow import flow_matching_loss, path_named
from elit.models import Transformer
from elit.seeding import generator, normal
from elit.training import ElasticConfig, ModelChoice, TrainConfig, Trainer, ValidationConfig

CURVE = 8  # points of a learning curve
FIELDS = {name: value for name, value in RECIPE.model.fields.items() if name not in ("head_depth", "tail_depth")}
PROBED = (0, 10, 30, 100, 300)  # steps


@dataclass(frozen=True)
class Variant:
    """What is trained.

    Attributes:
        fields: of the model that differ from six blocks, split 1-4-1, and 64 tokens in four windows.
        elit: the levels of training; None is a plain transformer.
        optimizer: what differs from the quickstart's.
        shown: whether the figure has it.
    """

    fields: Mapping[str, Any] = field(default_factory=dict)
    elit: ElasticConfig | None = field(default_factory=ElasticConfig)
    optimizer: Mapping[str, Any] = field(default_factory=dict)
    shown: bool = False


def elastic(begin: str, levels: int, shown: bool = False, **fields: Any) -> Variant:
    """A variant of some levels a step; with 0 of them, full budget alone."""
    elit = ElasticConfig(levels_per_step=levels) if levels else ElasticConfig(min_mask_prob=0.0, max_mask_prob=0.0)
    variant = {"learned": "paper", "anchored": "anchored"}[begin]
    return Variant({"group_size": 4, "head_depth": 1, "tail_depth": 1, "variant": variant, **fields}, elit, shown=shown)


VARIANTS: dict[str, Variant] = {
    "plain": Variant(elit=None, shown=True),
    "learned/full": elastic("learned", 0),
    "learned/1": elastic("learned", 1, shown=True),
    "learned/2": elastic("learned", 2, shown=True),
    "learned/3": elastic("learned", 3),
    "anchored/full": elastic("anchored", 0),
    "anchored/1": elastic("anchored", 1, shown=True),
    "anchored/2": elastic("anchored", 2, shown=True),
    "anchored/3": elastic("anchored", 3, shown=True),
    "anchored/2, windows of 2x2": elastic("anchored", 2, group_size=2),
    "anchored/2, windows of 8x8": elastic("anchored", 2, group_size=8),
    "anchored/2, head and tail of 2": elastic("anchored", 2, head_depth=2, tail_depth=2),
    "anchored/2, AdamW": replace(elastic("anchored", 2), optimizer={"name": "adamw"}),
    "learned/2, AdamW": replace(elastic("learned", 2), optimizer={"name": "adamw"}),
    "plain, AdamW": Variant(elit=None, optimizer={"name": "adamw"}),
}


def config_of(name: str, seed: int, steps: int, batch_size: int, out: Path) -> TrainConfig:
    """The training of a variant, which has the FLOPs of so many steps of the plain transformer."""
    variant = VARIANTS[name]
    model = ModelChoice(
        "DiT-S/2" if variant.elit is None else "ELIT-DiT-S/2", {**FIELDS, "patch_size": 4, **variant.fields}
    )
    config = replace(
        RECIPE, out=str(out / name.replace(" ", "-").replace(",", "").replace("/", "-") / f"seed-{seed}"),
        data="scenes", model=model, elit=variant.elit or ElasticConfig(), batch_size=batch_size, seed=seed,
        optimizer=replace(RECIPE.optimizer, **variant.optimizer),
    )  # fmt: skip
    if variant.elit is not None:
        steps = round(steps * step_flops(config_of("plain", seed, steps, batch_size, out)) / step_flops(config))
    every = steps // CURVE
    budgets = None if variant.elit is None or variant.elit.max_mask_prob == 0 else list(BUDGETS)
    validation = ValidationConfig(every=every, budgets=budgets, samples=1024, images=0)
    return replace(config, steps=every * CURVE, validation=validation, checkpoint_every=every)


def step_flops(config: TrainConfig) -> float:
    """FLOPs of a forward of one training sample, on average over the levels that steps draw."""
    trainer = Trainer(replace(config, out=config.out + "-unused"), scenes(held_out=True))
    levels = trainer.levels
    if not levels.levels:
        return count_flops(trainer.model.config).total
    drawn = [
        level for step in range(400) for level in levels.draw_for(12, config.seed, step, config.elit.levels_per_step)
    ]
    return mean(count_flops(trainer.model.config, level).total for level in drawn)


@dataclass(frozen=True)
class Curve:
    """What one training came to.

    Attributes:
        flops: of training, forward and backward, at each point.
        losses: by budget, held out, at each point.
    """

    flops: Sequence[float]
    losses: Mapping[str, Sequence[float]]

    @property
    def at_full(self) -> float:
        return self.losses["1"][-1]


def train(config: TrainConfig) -> Curve:
    """Trains to the end, and reads the held-out losses from the log."""
    Trainer(config, scenes()).run_to_end()
    lines = [json.loads(line) for line in (Path(config.out) / "log.jsonl").read_text().splitlines()]
    points = [line for line in lines if any(key.startswith("held_out_loss") for key in line)]
    per_step = 3 * step_flops(config) * config.batch_size
    budgets = [key.partition("/")[2] for key in points[0] if key.startswith("held_out_loss")]
    return Curve(
        [per_step * point["step"] for point in points],
        {budget: [point[f"held_out_loss/{budget}"] for point in points] for budget in budgets},
    )


# ------------------------------------------------------------------------------------------------ signal and gradient


def probe(model: Transformer, level: int) -> dict[str, float]:
    """How much the interface changes the tokens that the tail sees, and how large gradients are, part by part."""
    assert model.interface is not None
    x, y = scenes(held_out=True).batch(torch.arange(64))
    rng, path = generator("probe"), path_named(RECIPE.path)
    t, noise = RECIPE.times.draw(len(x), path, rng), normal(rng, x.shape)
    columns = t[:, None, None, None]
    noisy = path.alpha(columns) * x + path.sigma(columns) * noise
    with torch.no_grad():
        encoded = model.encode(noisy, t, y)
        before = encoded.stream.tokens
        change = model.interface.write(before, model.core(encoded, level).latents) - before
    model.zero_grad()
    flow_matching_loss(partial(model, y=y, num_latents=level), x, t, noise, path).mean().backward()
    config = model.config
    head, end = config.head_depth, config.depth - config.tail_depth
    parts = {
        "head": model.blocks[:head], "Read": model.interface.read_layer, "core": model.blocks[head:end],
        "Write": model.interface.write_layers, "tail": model.blocks[end:],
    }  # fmt: skip
    found = {"change by the interface": (change.square().mean() / before.square().mean()).sqrt().item()}
    for name, part in parts.items():
        gradients = torch.cat([p.grad.flatten() for p in part.parameters() if p.grad is not None])
        found[f"gradient, {name}"] = gradients.square().mean().sqrt().item()
    model.zero_grad()
    return found


def follow(name: str, batch_size: int, out: Path) -> list[dict[str, float]]:
    """Probes a training of seed 0 over its first steps, at full budget."""
    config = config_of(name, 0, 10 * PROBED[-1], batch_size, out)
    config = replace(
        config, out=str(out / "probes" / name.replace("/", "-")), validation=ValidationConfig(), checkpoint_every=10**6
    )
    trainer = Trainer(config, scenes())
    rows = [{"step": 0.0, **probe(trainer.model, trainer.model.num_latents)}]  # type: ignore[arg-type]
    for report in trainer:
        if report.step in PROBED:
            rows.append({"step": report.step, **probe(trainer.model, trainer.model.num_latents)})  # type: ignore[arg-type]
        if report.step == PROBED[-1]:
            break
    return rows


# ------------------------------------------------------------------------------------------------ what is shown


def print_table(curves: Mapping[str, Sequence[Curve]]) -> None:
    """Final losses by budget, and at full budget above the plain transformer of the same seed and FLOPs."""
    plain = [curve.at_full for curve in curves.get("plain", [])]
    table = Table("variant", "steps' FLOPs", *map(budget_label, BUDGETS), "above plain", title="held-out loss")
    for name, of_seeds in curves.items():
        cells = []
        for budget in BUDGETS:
            values = [curve.losses[f"{budget:g}"][-1] for curve in of_seeds if f"{budget:g}" in curve.losses]
            cells.append(shown(interval(values)) if values else "")
        same = plain[: len(of_seeds)]
        beside = (
            shown(above([curve.at_full for curve in of_seeds], same), sign="+") if len(same) == len(of_seeds) else ""
        )
        table.add_row(name, f"{of_seeds[0].flops[-1]:.3g}", *cells, "" if name == "plain" else beside)
    Console(width=160).print(table)


@mpl.rc_context(STYLE)
def plot(curves: Mapping[str, Sequence[Curve]], path: Path) -> None:
    """Loss at full budget over training FLOPs, and at the end over the budget."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.8))
    chosen = [name for name in curves if VARIANTS[name].shown]
    for name, (colour, marker) in zip(chosen, STYLES, strict=False):
        of_seeds = curves[name]
        flops = of_seeds[0].flops
        means = [mean(curve.losses["1"][i] for curve in of_seeds) for i in range(len(flops))]
        left.plot(flops[1:], means[1:], color=colour, marker=marker, markersize=4, label=name)
        budgets = [budget for budget in BUDGETS if f"{budget:g}" in of_seeds[0].losses]
        if len(budgets) > 1:
            at_end = [interval(curve.losses[f"{budget:g}"][-1] for curve in of_seeds) for budget in budgets]
            value, half = zip(*at_end, strict=True)
            style: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 4, "capsize": 3, "elinewidth": 1}
            right.errorbar(budgets, value, yerr=half, **style)
        else:
            right.axhline(mean(curve.at_full for curve in of_seeds), color=colour, linewidth=1, linestyle="--")
    left.set_xlabel("training FLOPs")
    left.set_ylabel("held-out loss at full budget")
    right.set_xscale("log", base=2)
    right.set_xticks(BUDGETS, [budget_label(budget) for budget in BUDGETS])
    right.set_xlabel("budget")
    right.set_ylabel("held-out loss at the end")
    figure.legend(loc="lower center", ncols=6, frameon=False)
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    save(figure, path)


def run(
    names: list[str] | None = None,
    seeds: int = 3,
    steps: int = 800,
    batch_size: int = 32,
    probes: bool = True,
    out: Path = Path("runs/learning"),
) -> None:
    """Train, print the tables, and write figure and numbers.

    Args:
        names: of variants; default all.
        seeds: trainings of every variant, with the seeds 0, 1, ...
        steps: of the plain transformer; the others take as many as have the same FLOPs.
        batch_size: scenes of a step.
        probes: whether to follow signal and gradient over the first steps.
        out: where trainings, figure and numbers are kept.
    """
    curves: dict[str, list[Curve]] = {name: [] for name in names or VARIANTS}
    for seed in range(seeds):
        for name in curves:
            curves[name].append(train(config_of(name, seed, steps, batch_size, out)))
            print(name, seed, f"{curves[name][-1].at_full:.4f}", flush=True)
    print_table(curves)
    plot(curves, out / "learning.png")
    followed = {name: follow(name, batch_size, out) for name in ("learned/1", "anchored/1")} if probes else {}
    for name, rows in followed.items():
        table = Table(*rows[0], title=name)
        for row in rows:
            table.add_row(*(f"{value:.3g}" for value in row.values()))
        Console(width=160).print(table)
    results = {name: [vars(curve) for curve in of_seeds] for name, of_seeds in curves.items()}
    write_json(out / "learning.json", {"curves": results, "probes": followed, "environment": environment()})


if __name__ == "__main__":
    auto_cli(run)
