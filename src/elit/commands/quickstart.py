"""`elit quickstart`: trains a small elastic model on scenes of digits and shows what each budget costs and gives."""

import math
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from tqdm import tqdm

from elit.analysis import (
    SamplerSettings,
    SweepConfig,
    correlate,
    count_parameters,
    mean_maps,
    measure_costs,
    sweep,
)
from elit.analysis.environment import environment
from elit.atomic import write_json
from elit.commands.train import show_progress
from elit.data import Data, scenes
from elit.errors import ElitError
from elit.evaluation import Classifier, Judge, losses_by_budget, nearest_distance, train_classifier
from elit.flow import Guidance
from elit.models import Model
from elit.models.files import checkpoints, load
from elit.seeding import generator, normal, permutation
from elit.training import ElasticConfig, ModelChoice, OptimizerConfig, TrainConfig, Trainer
from elit.training.state import read_config

BUDGETS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
GUIDANCE: dict[str, Guidance | None] = {
    "none": None,
    "cfg": Guidance("cfg", scale=2.0),
    "ccfg": Guidance("ccfg", scale=2.0, budget=1 / 16),
}
SAMPLING_STEPS = 16
NUM_SAMPLES = 500  # per budget and guidance
LATENCY_BATCH = 64
ATTENTION_IMAGES = 90
ATTENTION_DRAWS = 4  # noises per image, averaged
ATTENTION_TIME = 0.5
GRID_CLASSES = 10

RECIPE = TrainConfig(
    data="scenes",
    model=ModelChoice(
        "ELIT-DiT-S/4",
        {
            "width": 64,
            "depth": 6,
            "num_heads": 4,
            "head_depth": 1,
            "tail_depth": 1,
            "label_std": 1.0,
            "variant": "anchored",
        },
    ),
    elit=ElasticConfig(group_size=4, levels_per_step=2),
    optimizer=OptimizerConfig(
        "muon",
        lr=2e-3,
        betas=(0.9, 0.99),
        muon_lr=0.03,
        muon_momentum=0.9,
        muon_ns_steps=4,
        warmup_steps=50,
        decay="linear",
        decay_from=0.5,
    ),
    steps=2100,
    batch_size=32,
    ema_decay=0.99,
    precision="fp32",
    log_every=20,
    checkpoint_every=700,
    keep_checkpoints=1,
)
"""``configs/train/scenes.yaml`` says the same."""


# ------------------------------------------------------------------------------------------------ measuring


def measure_references(judge: Judge, train: Data, held_out: Data) -> dict[str, Any]:
    """Measures the quality of real images: as many training images as there are samples, and held-out ones."""
    references = {}
    for name, data in (("training images", train), ("held-out images", held_out)):
        chosen = permutation(generator("reference", name), len(data))[:NUM_SAMPLES]
        references[name] = asdict(judge(*data.batch(chosen)))
    return references


def measure_copying(images: Tensor, train: Data, held_out: Data) -> dict[str, float]:
    """Measures the median pixel distance to the nearest training image, of samples and of held-out images."""
    known, _ = train.batch(torch.arange(len(train)))
    chosen = permutation(generator("copying"), len(held_out))[: len(images)]
    unseen, _ = held_out.batch(chosen)
    to_samples, to_unseen = nearest_distance(images, known), nearest_distance(unseen, known)
    return {
        "samples": to_samples.median().item(),
        "held-out images": to_unseen.median().item(),
        "samples nearer than 99 % of held-out images": (to_samples < to_unseen.quantile(0.01)).float().mean().item(),
    }


def measure_attention(model: Model, held_out: Data) -> tuple[dict[str, Any], tuple[Tensor, Tensor, Tensor]]:
    """Measures the rank correlation of Read attention with the loss per token, and with another image's attention.

    Returns:
        The correlations with 95 % half-widths over images, and images, attention and loss (the latter two per token).
    """
    placements = len(held_out) // ATTENTION_IMAGES
    x, y = held_out.batch(torch.arange(ATTENTION_IMAGES) * placements + torch.arange(ATTENTION_IMAGES) % placements)
    noises = normal(generator("attention"), (ATTENTION_DRAWS, *x.shape))
    maps = mean_maps(model, x, y, ATTENTION_TIME, noises)
    found = correlate(maps)
    result = {"same image": asdict(found.same_image), "another image": asdict(found.another_image)}
    return result, (x, maps.attention, maps.loss)


# ------------------------------------------------------------------------------------------------ the run


def steps_of(run: str) -> int | None:
    """Returns the number of steps that a run was started for; None where there is no run."""
    return read_config(Path(run)).get("steps") if checkpoints(run) else None


def steps_for(minutes: float, config: TrainConfig) -> int:
    """Estimates how many steps fit into minutes of training, from the time of a few."""
    if not 0 < minutes < math.inf:
        raise ElitError(f"minutes is {minutes}; it must be above 0, and finite")
    with tempfile.TemporaryDirectory() as folder:
        trial = iter(Trainer(replace(config, out=folder, steps=30)))
        for _ in range(10):
            next(trial)
        start = time.perf_counter()
        for _ in range(20):
            next(trial)
        seconds = (time.perf_counter() - start) / 20
        trial.close()  # type: ignore[attr-defined]
    return max(20, int(60 * minutes / seconds))


def quickstart(out: Path = Path("runs/quickstart"), minutes: float | None = None, seed: int = 0) -> Path:
    """Train a small elastic model on scenes of real digits and show what each budget costs and gives, on one page.

    Args:
        out: folder for the run, results.json, pictures and report.html.
        minutes: about how long to train; by default 2100 steps, three to five minutes on two cores. A run that is in
            the folder already keeps its number of steps.
        seed: seed of everything random.

    Raises:
        ElitError: the folder cannot be used, or a package of the quickstart extra is missing.
    """
    try:
        from elit.commands.report import write_report
    except ImportError as error:
        raise ElitError(f"the quickstart needs {error.name}: pip install 'elit-diffusion[quickstart]'") from error

    console = Console(soft_wrap=True, highlight=False)
    out = Path(out)
    config = replace(RECIPE, out=str(out / "run"), seed=seed)
    if minutes is not None:
        config = replace(config, steps=steps_of(config.out) or steps_for(minutes, config))
    train, held_out = scenes(), scenes(held_out=True)

    trainer = Trainer(config, train)
    console.print(
        f"[bold]1/3[/bold] training {count_parameters(trainer.model) / 1e6:.2f} M parameters on {len(train):,} scenes "
        "of handwritten digits: half of every batch with all latents, half with a random number of them"
    )
    continued, start = bool(checkpoints(config.out)), time.perf_counter()
    show_progress(trainer)
    if trainer.interrupted:
        raise KeyboardInterrupt
    seconds = None if continued else time.perf_counter() - start  # what an earlier call spent is not known
    model = load(config.out)

    console.print("[bold]2/3[/bold] measuring cost, held-out loss, sample quality, copying and attention")
    results, pictures = measure(model, config, train, held_out)
    results["training"] = {"config": asdict(config), "seconds": seconds, "parameters": count_parameters(model)}

    console.print("[bold]3/3[/bold] writing the report")
    write_json(out / "results.json", results)
    report = write_report(out, results, pictures)
    console.print(f"\n[bold]report: {report}[/bold]")
    console.print(
        f"next: elit sample --model {config.out} --num-images 16 --budget 0.25 "
        "--guidance ccfg --guidance-scale 2 --out scenes.png"
    )
    return report


def measure(model: Model, config: TrainConfig, train: Data, held_out: Data) -> tuple[dict[str, Any], dict[str, Any]]:
    """Measures everything that the report shows; returns its numbers, and the tensors of its pictures."""
    judge = Judge(train_classifier(train, config.seed), train)
    draws = SweepConfig(NUM_SAMPLES, config.seed * NUM_SAMPLES, shown=NUM_SAMPLES, batch_size=250)
    settings = [
        SamplerSettings(SAMPLING_STEPS, budget, guidance) for guidance in GUIDANCE.values() for budget in BUDGETS
    ]
    quality: dict[str, list[dict[str, Any]]] = {name: [] for name in GUIDANCE}
    grids: dict[str, list[Tensor]] = {name: [] for name in GUIDANCE}
    names = [name for name in GUIDANCE for _ in BUDGETS]
    points = tqdm(sweep(model, settings, draws, judge), "sampling", len(settings), unit="setting", dynamic_ncols=True)
    for name, point in zip(names, points, strict=True):
        assert point.quality is not None  # there is a judge
        row = {"budget": point.setting.budget, "flops_per_image": point.flops, **asdict(point.quality)}
        quality[name].append(row)
        grids[name].append(point.images[:GRID_CLASSES])
    copying = measure_copying(point.images, train, held_out)
    attention, maps = measure_attention(model, held_out)
    levels = [model.level(budget) for budget in BUDGETS]
    results = {
        "costs": [asdict(cost) for cost in measure_costs(model, levels, LATENCY_BATCH, repeats=30)],
        "held_out_loss": [
            asdict(each) for each in losses_by_budget(model, held_out, BUDGETS, config.times, config.path)
        ],
        "quality": quality,
        "references": measure_references(judge, train, held_out),
        "copying": copying,
        "attention": attention,
        "protocol": {
            "samples_per_setting": NUM_SAMPLES,
            "sampling_steps": SAMPLING_STEPS,
            "guidance_scale": 2.0,
            "latency_batch": LATENCY_BATCH,
            "features": f"{Classifier.FEATURES} of a classifier trained on the real training images",
        },
        "environment": environment(),
    }
    return results, {"grids": grids, "attention": maps}
