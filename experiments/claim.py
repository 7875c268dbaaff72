"""Is an ELIT better than a plain transformer of the same size at equal training FLOPs? Loss and samples over FLOPs.

    python experiments/claim.py
    python experiments/claim.py --steps 1280 --batch_size 8 --samples 200 --names '[plain, "learned, to 1/4"]'

The second is in docs/results/claim.md, with other batches and sizes.

The data are mosaics: by default 2x2 scenes of one class, each empty in half of all cases, 64x64 pixels in 256 tokens.
So there is much redundancy: large empty regions beside dense ones. Quality is the Frechet distance of samples in the
features of a classifier that was trained on mosaics, at the highest budget and with as many steps for all, after a
quarter, half and all of the training.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import torch
from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table

import elit
from common import above, interval, shown
from curves import (
    POINTS,
    Curve,
    Scale,
    Variant,
    draw_intervals,
    draw_losses,
    plot_curves,
    print_curves,
    save_with_legend,
    train_all,
    write_curves,
)
from elit.analysis.plots import STYLE, STYLES
from elit.data import ImageData, scenes
from elit.evaluation import Judge, train_classifier
from elit.seeding import generator, integers, uniform
from elit.training import ElasticConfig

FIELDS = {"width": 64, "depth": 8, "num_heads": 4, "label_std": 1.0, "positions": "rotary"}
TRAIN, HELD_OUT = 8000, 1024  # mosaics; the latter of 2x2 scenes, and fewer of more
QUARTERS = (1, 2, 4)  # of a training, after which samples are scored
Scores = Mapping[str, Sequence[Mapping[str, Sequence[float]]]]


def elastic(variant: str, largest: float, group_size: int = 8) -> Variant:
    """Makes a variant of two levels a step, from 1/16 of the latents to the largest budget."""
    elit = ElasticConfig(levels_per_step=2, max_mask_prob=15 / 16, min_mask_prob=1 - largest)
    fields = {"group_size": group_size, "head_depth": 1, "tail_depth": 1, "variant": variant}
    return Variant(fields, elit, shown=True)


VARIANTS: dict[str, Variant] = {
    "plain": Variant(elit=None, shown=True),
    "anchored, to 1": elastic("anchored", 1.0),
    "anchored, to 1/2": elastic("anchored", 1 / 2),
    "learned, to 1/2": elastic("paper", 1 / 2),
    "learned, to 1/4": elastic("paper", 1 / 4),
    "learned, 1/4 alone": replace(
        elastic("paper", 1 / 4), elit=ElasticConfig(max_mask_prob=3 / 4, min_mask_prob=3 / 4)
    ),
    "learned, to 1/4, one window": elastic("paper", 1 / 4, group_size=16),
}


@lru_cache(maxsize=4)
def mosaics(side: int, held_out: bool = False) -> ImageData:
    """Makes mosaics (1, S, S) of side x side scenes, of which half are empty but never all.

    There are 8,000 to train on; held out are as many as have 4,096 scenes.
    """
    source, rng = scenes(held_out), generator("mosaics", side, int(held_out))
    parts = side * side
    count = HELD_OUT * 4 // parts if held_out else TRAIN
    labels = torch.arange(count) % source.num_classes
    of_class = integers(rng, len(source) // source.num_classes, (count, parts))
    chosen = of_class * source.num_classes + labels[:, None]  # scene i shows class i mod 10
    filled = uniform(rng, count * parts).view(count, parts) < 0.5
    filled[torch.arange(count), integers(rng, parts, count)] = True
    tiles = torch.where(filled[:, :, None, None], source.images[chosen][:, :, 0], -1.0)  # (M, parts, 32, 32)
    rows = tiles.unflatten(1, (side, side)).transpose(2, 3)  # (M, side, 32, side, 32)
    return ImageData(rows.flatten(3).flatten(1, 2)[:, None].contiguous(), labels, source.num_classes)


def judge_all(curves: Mapping[str, Sequence[Curve]], judge: Judge, samples: int, guidance: float) -> Scores:
    """Scores samples of every training after its QUARTERS, from the same noise, at its highest budget."""
    labels = torch.arange(samples) % 10
    settings: dict[str, Any] = {
        "seeds": range(samples), "steps": 16, "guidance": elit.Guidance("cfg", guidance), "batch_size": 100,
    }  # fmt: skip
    found: dict[str, list[dict[str, list[float]]]] = {}
    for name, of_seeds in curves.items():
        for curve in of_seeds:
            models = [elit.load(folder, device="auto") for folder in snapshots(curve)]
            qualities = [judge(elit.sample(model, labels, **settings).cpu(), labels) for model in models]
            scores = {
                "Frechet distance": [quality.frechet_distance for quality in qualities],
                "accuracy": [quality.accuracy for quality in qualities],
            }
            print(
                f"{curve.run}: Frechet distances {', '.join(f'{d:.1f}' for d in scores['Frechet distance'])}",
                flush=True,
            )
            found.setdefault(name, []).append(scores)
    return found


def snapshots(curve: Curve) -> list[Path]:
    """Returns the folders of the weights after the QUARTERS of a training."""
    after = sorted(Path(curve.run, "snapshots").glob("step-*"))
    return [after[quarter - 1] for quarter in QUARTERS]


def distances(of_seeds: Sequence[Mapping[str, Sequence[float]]]) -> list[tuple[float, float]]:
    """Returns the Frechet distances after the QUARTERS, as means and 95 % half-widths over seeds."""
    return [interval(d) for d in zip(*(of_seed["Frechet distance"] for of_seed in of_seeds), strict=True)]


def print_scores(scores: Scores, title: str) -> None:
    """Prints Frechet distances after the QUARTERS, the last one beside the plain transformer's, and accuracy."""
    after = [f"after {quarter}/4" for quarter in QUARTERS[:-1]]
    table = Table("variant", *after, "at the end", "above plain", "accuracy", title=title, title_justify="left")

    def at_end(name: str) -> list[float]:
        return [of_seed["Frechet distance"][-1] for of_seed in scores[name]]

    for name, of_seeds in scores.items():
        beside = shown(above(at_end(name), at_end("plain")), 1, "+") if "plain" in scores and name != "plain" else ""
        accuracy = shown(interval(of_seed["accuracy"][-1] for of_seed in of_seeds), 3)
        table.add_row(name, *(shown(each, 1) for each in distances(of_seeds)), beside, accuracy)
    Console(width=120).print(table)


@mpl.rc_context(STYLE)
def plot_claim(curves: Mapping[str, Sequence[Curve]], scores: Scores, path: Path) -> None:
    """Draws the loss at the highest budget and the quality of samples, each over training FLOPs."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 4.2))
    drawn = {name: of_seeds for name, of_seeds in curves.items() if VARIANTS[name].shown}
    draw_losses(left, drawn)
    for (name, of_seeds), (colour, marker) in zip(drawn.items(), cycle(STYLES), strict=False):
        flops = [of_seeds[0].flops[quarter * POINTS // 4 - 1] for quarter in QUARTERS]
        draw_intervals(right, flops, distances(scores[name]), colour, marker)
    right.set_xlabel("training FLOPs")
    right.set_ylabel("Frechet distance of samples")
    right.set_ylim(bottom=0)
    save_with_legend(figure, path)


def report(curves: Mapping[str, Sequence[Curve]], scale: Scale, samples: int, guidance: float) -> None:
    """Prints tables of losses and samples, and writes figure and numbers."""
    print_curves(curves, "held-out loss at the end")
    scores: Scores = {}
    if samples:
        assert isinstance(scale.train, ImageData)
        scores = judge_all(curves, Judge(train_classifier(scale.train), scale.train), samples, guidance)
        print_scores(scores, f"{samples} samples, Frechet distance")
        plot_claim(curves, scores, scale.out / "claim.png")
    else:
        plot_curves(curves, VARIANTS, scale.out / "claim.png")
    write_curves(curves, scale.out / "claim.json", samples=scores)


def run(
    names: list[str] | None = None,
    seeds: int = 3,
    steps: int = 400,
    batch_size: int = 32,
    side: int = 2,
    samples: int = 500,
    guidance: float = 2.0,
    out: Path = Path("runs/claim"),
) -> None:
    """Train, sample, print the tables, and write figure and numbers.

    Args:
        names: of variants; default all.
        seeds: trainings of every variant, with the seeds 0, 1, ...
        steps: of the plain transformer; the others take as many as have the same FLOPs.
        batch_size: mosaics of a step.
        side: scenes on each side of a mosaic; 2 give 256 tokens, and 4 give 1,024.
        samples: of each training that are scored, at three points of it; 0 is none.
        guidance: scale of classifier-free guidance.
        out: where trainings, figure and numbers are kept.
    """
    scale = Scale(mosaics(side), mosaics(side, held_out=True), FIELDS, 4, steps, batch_size, out)
    report(train_all(scale, VARIANTS, list(VARIANTS) if names is None else names, seeds), scale, samples, guidance)


if __name__ == "__main__":
    auto_cli(run)
