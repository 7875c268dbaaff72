"""Why does the interface learn slowly in small, and what helps? Variants beside each other, at equal training FLOPs.

    python experiments/learning.py                                  # docs/results/learning.md
    python experiments/learning.py --names '[plain, learned/2]' --seeds 1

Every training sees scenes, with the recipe and batch of the quickstart. Pieces of the whole can run one by one.

Names: where latents begin (`learned` vectors, or `anchored` to tokens), then how many levels share a step: 1 is one
drawn at random, 2 adds full budget, 3 the lowest too, 32 is a level for every sample; `full` trains full budget alone,
and `full first` does so in the first half of the steps. `self-distilled` adds the distance from the model's own answer
at full budget. `rates` are those of learning, of Muon and AdamW, for all layers or the interface alone; with `whole
matrices` Muon takes queries, keys and values for one matrix. Positions are rotary in all blocks; with `sincos` tokens
have a table added instead, and only the core of an ELIT has rotary ones.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table
from torch import Tensor

from curves import Curve, Scale, Variant, config_of, plot_curves, print_curves, train_all, write_curves
from elit.commands.quickstart import RECIPE
from elit.data import scenes
from elit.flow import flow_matching_loss, path_named
from elit.flow.paths import interpolate
from elit.models import Transformer
from elit.seeding import generator, normal
from elit.training import ElasticConfig, Trainer, ValidationConfig
from elit.training.optim import SplitMuon

FIELDS = {"width": 64, "depth": 6, "num_heads": 4, "label_std": 1.0, "positions": "rotary"}
PROBED = (0, 10, 30, 100, 300)  # steps


def elastic(begin: str, levels: int, shown: bool = False, **fields: Any) -> Variant:
    """Makes a variant of some levels a step; with 0 of them, full budget alone."""
    elit = ElasticConfig(levels_per_step=levels) if levels else ElasticConfig(min_mask_prob=0.0, max_mask_prob=0.0)
    variant = {"learned": "paper", "anchored": "anchored"}[begin]
    split = {"group_size": 4, "head_depth": 1, "tail_depth": 1}
    return Variant({**split, "variant": variant, **fields}, elit, shown=shown)


def whole_matrices(trainer: Trainer) -> None:
    """Lets Muon take queries, keys and values that share a weight for one matrix."""
    muon = trainer.trained.optimizers["muon"]
    assert isinstance(muon, SplitMuon)
    muon.parts = dict.fromkeys(muon.parts, 1)


def scale_interface(trainer: Trainer, factor: float) -> None:
    """Multiplies each update of latents, Read and Write, as a factor on their learning rates does."""
    named = trainer.model.named_parameters()
    interface: list[Tensor] = [p for name, p in named if name.startswith("interface.") and p.requires_grad]
    before: list[Tensor] = []

    def keep(*_: Any) -> None:
        before[:] = [p.detach().clone() for p in interface]

    def scale(*_: Any) -> None:
        with torch.no_grad():
            torch._foreach_lerp_(before, [p.detach() for p in interface], factor)
            torch._foreach_copy_(interface, before)

    for optimizer in trainer.trained.optimizers.values():
        optimizer.register_step_pre_hook(keep)
        optimizer.register_step_post_hook(scale)


def interface_at(factor: float, variant: Variant) -> Variant:
    return replace(variant, change=partial(scale_interface, factor=factor))


HALF, TWICE = ({"lr": k * RECIPE.optimizer.lr, "muon_lr": k * RECIPE.optimizer.muon_lr} for k in (0.5, 2.0))

VARIANTS: dict[str, Variant] = {
    "plain": Variant(elit=None, shown=True),
    "plain, 8 blocks": Variant({"depth": 8}, elit=None),
    "plain, sincos": Variant({"positions": "sincos"}, elit=None),
    "learned/full": elastic("learned", 0),
    "learned/1": elastic("learned", 1, shown=True),
    "learned/2": elastic("learned", 2, shown=True),
    "learned/3": elastic("learned", 3),
    "anchored/full": elastic("anchored", 0, shown=True),
    "anchored/1": elastic("anchored", 1, shown=True),
    "anchored/2": elastic("anchored", 2, shown=True),
    "anchored/3": elastic("anchored", 3, shown=True),
    "learned/1, sincos": elastic("learned", 1, positions="sincos"),
    "learned/2, sincos": elastic("learned", 2, positions="sincos"),
    "anchored/2, sincos": elastic("anchored", 2, positions="sincos"),
    "anchored/full, sincos": elastic("anchored", 0, positions="sincos"),
    "anchored/2, windows of 2x2": elastic("anchored", 2, group_size=2),
    "anchored/2, windows of 8x8": elastic("anchored", 2, group_size=8),
    "anchored/2, head and tail of 2": elastic("anchored", 2, head_depth=2, tail_depth=2),
    "anchored/1, full first": replace(elastic("anchored", 1), full_first=0.5),
    "anchored/1, full in half of the steps": replace(
        elastic("anchored", 1), elit=ElasticConfig(weights=[1.0] * 15 + [15.0])
    ),
    "anchored/32": elastic("anchored", 32),
    "learned/2, self-distilled": replace(elastic("learned", 2), self_distillation=1.0),
    "anchored/2, self-distilled": replace(elastic("anchored", 2), self_distillation=1.0),
    "plain, half the rates": Variant(elit=None, optimizer=HALF),
    "plain, twice the rates": Variant(elit=None, optimizer=TWICE),
    "learned/1, half the rates": replace(elastic("learned", 1), optimizer=HALF),
    "learned/1, twice the rates": replace(elastic("learned", 1), optimizer=TWICE),
    "anchored/2, half the rates": replace(elastic("anchored", 2), optimizer=HALF),
    "anchored/2, twice the rates": replace(elastic("anchored", 2), optimizer=TWICE),
    "learned/1, interface at half the rates": interface_at(0.5, elastic("learned", 1)),
    "learned/1, interface at twice the rates": interface_at(2.0, elastic("learned", 1)),
    "anchored/2, interface at half the rates": interface_at(0.5, elastic("anchored", 2)),
    "anchored/2, interface at twice the rates": interface_at(2.0, elastic("anchored", 2)),
    "plain, whole matrices": Variant(elit=None, change=whole_matrices),
    "learned/1, whole matrices": replace(elastic("learned", 1), change=whole_matrices),
    "anchored/2, whole matrices": replace(elastic("anchored", 2), change=whole_matrices),
    "learned/2, AdamW": replace(elastic("learned", 2), optimizer={"name": "adamw"}),
    "anchored/2, AdamW": replace(elastic("anchored", 2), optimizer={"name": "adamw"}),
    "plain, AdamW": Variant(elit=None, optimizer={"name": "adamw"}),
}


def probe(model: Transformer, level: int) -> dict[str, float]:
    """Measures how much the interface changes the tokens that the tail sees, and gradients part by part (both RMS)."""
    assert model.interface is not None
    x, y = scenes(held_out=True).batch(torch.arange(64))
    rng, path = generator("probe"), path_named(RECIPE.path)
    t, noise = RECIPE.times.draw(len(x), path, rng), normal(rng, x.shape)
    with torch.no_grad():
        encoded = model.encode(interpolate(path, x, noise, t[:, None, None, None]), t, y)
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


def follow(scale: Scale, name: str) -> list[dict[str, float]]:
    """Probes a training of seed 0 over its first steps, at full budget."""
    config = replace(config_of(scale, VARIANTS, name, 0), validation=ValidationConfig(), checkpoint_every=10**6)
    with TemporaryDirectory() as folder:
        trainer = Trainer(replace(config, out=folder), scale.train)
        assert isinstance(trainer.model, Transformer)
        rows = [{"step": 0.0, **probe(trainer.model, trainer.model.num_latents)}]
        for report in trainer:
            if report.step in PROBED:
                rows.append({"step": report.step, **probe(trainer.model, trainer.model.num_latents)})
            if report.step == PROBED[-1]:
                break
    return rows


def report(curves: Mapping[str, Sequence[Curve]], scale: Scale, probes: bool = False) -> None:
    """Prints tables of losses and probes, and writes figure and numbers."""
    print_curves(curves, "held-out loss at the end")
    plot_curves(curves, VARIANTS, scale.out / "learning.png")
    followed = {name: follow(scale, name) for name in ("learned/1", "anchored/1")} if probes else {}
    for name, rows in followed.items():
        table = Table(*rows[0], title=name, title_justify="left")
        for row in rows:
            table.add_row(*(f"{value:.3g}" for value in row.values()))
        Console(width=160).print(table)
    write_curves(curves, scale.out / "learning.json", probes=followed)


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
    scale = Scale(scenes(), scenes(held_out=True), FIELDS, 4, steps, batch_size, out)
    curves = train_all(scale, VARIANTS, list(VARIANTS) if names is None else names, seeds)
    report(curves, scale, probes)


if __name__ == "__main__":
    auto_cli(run)
