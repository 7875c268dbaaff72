"""Is an ELIT better than a plain transformer of the same size at equal training FLOPs? Loss and samples over FLOPs.

    python experiments/claim.py
    python experiments/claim.py --steps 640 --batch_size 16 --names '[plain, "learned, to 1/4"]'

The second is in docs/results/claim.md.

The data are mosaics: by default 2x2 scenes of one class, each empty in half of all cases, 64x64 pixels in 256 tokens.
So there is much redundancy: large empty regions beside dense ones. Quality is the Frechet distance of samples in the
features of a classifier that was trained on mosaics, at the highest budget and with as many steps for all.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import torch
from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table

import elit
from common import interval, shown
from curves import Curve, Scale, Variant, plot_curves, print_curves, train_all, write_curves
from elit.data import ImageData, scenes
from elit.evaluation import Judge, train_classifier
from elit.seeding import generator, integers, uniform
from elit.training import ElasticConfig

FIELDS = {"width": 64, "depth": 8, "num_heads": 4, "label_std": 1.0, "positions": "rotary"}
TRAIN, HELD_OUT = 8000, 1024


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
    "learned, to 1/4, one window": elastic("paper", 1 / 4, group_size=16),
}


@lru_cache(maxsize=4)
def mosaics(side: int, held_out: bool = False) -> ImageData:
    """Makes mosaics of side x side scenes, of which half are empty but never all: 8,000 or 1,024, (1, S, S)."""
    source, rng = scenes(held_out), generator("mosaics", side, int(held_out))
    count, parts = HELD_OUT if held_out else TRAIN, side * side
    labels = torch.arange(count) % source.num_classes
    of_class = integers(rng, len(source) // source.num_classes, (count, parts))
    chosen = of_class * source.num_classes + labels[:, None]  # scene i shows class i mod 10
    filled = uniform(rng, count * parts).view(count, parts) < 0.5
    filled[torch.arange(count), integers(rng, parts, count)] = True
    tiles = torch.where(filled[:, :, None, None], source.images[chosen][:, :, 0], -1.0)  # (M, parts, 32, 32)
    rows = tiles.unflatten(1, (side, side)).transpose(2, 3)  # (M, side, 32, side, 32)
    return ImageData(rows.flatten(3).flatten(1, 2)[:, None].contiguous(), labels, source.num_classes)


def judge_all(
    curves: Mapping[str, Sequence[Curve]], judge: Judge, samples: int, guidance: float
) -> dict[str, list[dict[str, float]]]:
    """Scores samples of every training, from the same noise, at its highest budget."""
    labels = torch.arange(samples) % 10
    found: dict[str, list[dict[str, float]]] = {}
    for name, of_seeds in curves.items():
        for curve in of_seeds:
            images = elit.sample(
                elit.load(curve.run),
                labels,
                seeds=range(samples),
                steps=16,
                guidance=elit.Guidance("cfg", guidance),
                batch_size=100,
            )
            quality = judge(images.cpu(), labels)
            scores = {"Frechet distance": quality.frechet_distance, "accuracy": quality.accuracy}
            found.setdefault(name, []).append(scores)
    return found


def report(curves: Mapping[str, Sequence[Curve]], scale: Scale, samples: int, guidance: float) -> None:
    """Prints tables of losses and samples, and writes figure and numbers."""
    print_curves(curves, "held-out loss at the end")
    plot_curves(curves, VARIANTS, scale.out / "claim.png")
    scores = {}
    if samples:
        assert isinstance(scale.train, ImageData)
        scores = judge_all(curves, Judge(train_classifier(scale.train), scale.train), samples, guidance)
        table = Table("variant", "Frechet distance", "accuracy", title=f"{samples} samples", title_justify="left")
        for name, of_seeds in scores.items():
            frechet, accuracy = ([row[key] for row in of_seeds] for key in ("Frechet distance", "accuracy"))
            table.add_row(name, shown(interval(frechet), 2), shown(interval(accuracy), 3))
        Console(width=120).print(table)
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
        samples: of each training that are scored; 0 is none.
        guidance: scale of classifier-free guidance.
        out: where trainings, figure and numbers are kept.
    """
    scale = Scale(mosaics(side), mosaics(side, held_out=True), FIELDS, 4, steps, batch_size, out)
    report(train_all(scale, VARIANTS, names or list(VARIANTS), seeds), scale, samples, guidance)


if __name__ == "__main__":
    auto_cli(run)
