"""Every ELIT backbone on the embedded digits, for the same short time, seed and recipe (the quickstart's).

    python experiments/backbones.py --steps 300     # docs/results/backbones.md
    python experiments/backbones.py --steps 300 --names '[ELIT-MMDiT-S/2]'

MM-DiT has captions ("a handwritten three") where the others have labels. Accuracy is how often a classifier, trained on
real digits, takes a sample for what was asked; the distance is Frechet's, in its features. ``OUT/seed-N`` keeps the
runs, and ``samples.png`` with a row for each model and budget.
"""

import time
from dataclasses import replace
from pathlib import Path

import torch
from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table
from torch import Tensor

import elit
from common import DIGITS
from elit.analysis import count_flops, count_parameters
from elit.analysis.plots import budget_label, plot_overview, save
from elit.conditions import map_condition
from elit.data import open_data
from elit.data.captions import CAPTIONS, WordVectors
from elit.evaluation import classify, frechet_distance, held_out_loss, moments, train_classifier
from elit.training import ModelChoice, Trainer

FIELDS = DIGITS.model.fields
NAMES = {
    "ELIT-DiT-S/2": FIELDS,
    "ELIT-UViT-S/2": FIELDS,
    "ELIT-HDiT-S/2": FIELDS | {"inner_depth": 2},
    "ELIT-MMDiT-S/2": FIELDS,
}
LEVELS = {"ELIT-HDiT-S/2": replace(DIGITS.elit, max_mask_prob=0.75)}  # multiples of 4
BUDGETS = (1 / 4, 1.0)
GUIDANCE = elit.Guidance("cfg", scale=2.0)


def compare(
    steps: int = 300,
    samples: int = 200,
    seed: int = 0,
    names: list[str] | None = None,
    out: Path = Path("runs/backbones"),
) -> None:
    """Train, sample and print the table.

    Args:
        steps: of training, each of 64 images.
        samples: per model and budget.
        seed: of training; samples have the seeds 0, 1, ...
        names: which of the models; default all.
        out: where the runs of each seed are kept; one that is there is continued, or measured where it is done.
    """
    out = out / f"seed-{seed}"
    digits, held_out = open_data("digits"), open_data("digits", held_out=True)
    classifier = train_classifier(digits)
    real = moments(classify(classifier, digits.batch(torch.arange(len(digits)))[0])[1])
    labels = torch.arange(samples) % digits.num_classes
    rows: dict[str, list[Tensor]] = {}
    table = Table("model", "M parameters", "s/step", "budget", "MFLOPs", "held-out loss", "accuracy", "distance")
    for name in names or list(NAMES):
        of_text = "MMDiT" in name
        data = "captioned-digits" if of_text else "digits"
        config = replace(
            DIGITS, out=str(out / name.replace("/", "-")), data=data, model=ModelChoice(name, NAMES[name]), steps=steps,
            seed=seed, elit=LEVELS.get(name, DIGITS.elit),
        )  # fmt: skip
        trainer = Trainer(config)
        start = time.perf_counter()
        trainer.run_to_end()
        per_step = (time.perf_counter() - start) / steps
        model = trainer.averaged().eval()
        given = map_condition(lambda values: values[labels], WordVectors()(CAPTIONS)) if of_text else labels
        for budget in BUDGETS:
            loss = held_out_loss(model, open_data(data, held_out=True) if of_text else held_out, budget, config.times)
            images = elit.sample(model, given, steps=16, budget=budget, guidance=GUIDANCE, batch_size=100)
            rows[f"{name}, {budget_label(budget)}"] = list(images[: digits.num_classes])
            predicted, features = classify(classifier, images)
            table.add_row(
                name, f"{count_parameters(model) / 1e6:.2f}", f"{per_step:.2f}", f"{budget:g}",
                f"{count_flops(model.config, model.level(budget)).total / 1e6:.1f}", f"{loss.mean():.4f}",
                f"{(predicted == labels).float().mean():.1%}", f"{frechet_distance(moments(features), real):.1f}",
            )  # fmt: skip
    Console(width=120).print(table)
    save(plot_overview(list(rows.values()), list(rows)), out / "samples.png")


if __name__ == "__main__":
    auto_cli(compare)
