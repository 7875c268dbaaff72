"""The first run: trains a small elastic model on real digits and shows what each budget costs and gives."""

import json
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from tqdm import tqdm

from elit.analysis import attention_maps, count_flops, count_parameters, measure_latency, rank_correlation
from elit.atomic import atomic_file
from elit.data import Data, digits
from elit.errors import ElitError
from elit.evaluation import (
    Classifier,
    Moments,
    classify,
    frechet_distance,
    held_out_loss,
    moments,
    nearest_distance,
    train_classifier,
)
from elit.flow import Guidance, sample
from elit.models import Model
from elit.models.files import load
from elit.seeding import generator
from elit.training import ModelChoice, OptimizerConfig, TrainConfig, Trainer

BUDGETS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
GUIDANCE: dict[str, Guidance | None] = {
    "none": None,
    "cfg": Guidance("cfg", scale=2.0),
    "ccfg": Guidance("ccfg", scale=2.0, budget=1 / 16),
}
SAMPLING_STEPS = 16
NUM_SAMPLES = 1000  # per budget and guidance
LATENCY_BATCH = 64
ATTENTION_IMAGES = 90
ATTENTION_TIME = 0.5

RECIPE = TrainConfig(
    data="digits",
    model=ModelChoice(
        "ELIT-DiT-S/2",
        {
            "width": 64,
            "depth": 6,
            "num_heads": 4,
            "head_depth": 1,
            "tail_depth": 1,
            "group_size": 4,
            "label_std": 1.0,
        },
    ),
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
    steps=1200,
    batch_size=64,
    ema_decay=0.99,
    precision="fp32",
    log_every=20,
    checkpoint_every=400,
    keep_checkpoints=1,
)
"""``configs/train/digits.yaml`` says the same."""


# ------------------------------------------------------------------------------------------------ measuring


def measure_costs(model: Model) -> list[dict[str, Any]]:
    """FLOPs, MACs and latency of one forward, for every budget."""
    latencies = measure_latency(model, list(BUDGETS), LATENCY_BATCH, repeats=30)
    rows = []
    for budget, latency in zip(BUDGETS, latencies, strict=True):
        cost = count_flops(model, budget)
        rows.append(
            {
                "budget": budget,
                "num_latents": cost.num_latents,
                "flops": cost.flops,
                "macs": cost.macs,
                "latency_ms": latency.median * 1e3,
                "latency_ms_quartiles": [latency.low * 1e3, latency.high * 1e3],
            }
        )
    full = rows[-1]
    for row in rows:
        row["elastic_efficiency"] = (row["latency_ms"] / full["latency_ms"]) / (row["flops"] / full["flops"])
    return rows


def measure_loss(model: Model, held_out: Data, config: TrainConfig) -> list[dict[str, Any]]:
    """Held-out loss at every budget, and its difference to full budget on the same noise, with standard errors."""
    losses = [held_out_loss(model, held_out, budget, config.times, config.path, draws=2) for budget in BUDGETS]
    rows = []
    for budget, loss in zip(BUDGETS, losses, strict=True):
        excess = loss - losses[-1]
        rows.append(
            {
                "budget": budget,
                "loss": loss.mean().item(),
                "excess": excess.mean().item(),
                "excess_standard_error": excess.std().item() / len(excess) ** 0.5,
            }
        )
    return rows


def draw_samples(model: Model, budget: float, guidance: Guidance | None, seed: int) -> Tensor:
    """Images of all classes in turn, always from the same noise."""
    labels = torch.arange(NUM_SAMPLES) % model.config.num_classes
    seeds = range(seed * NUM_SAMPLES, (seed + 1) * NUM_SAMPLES)
    return sample(
        model, labels, seeds=seeds, steps=SAMPLING_STEPS, budget=budget, guidance=guidance, batch_size=250
    ).cpu()


def measure_quality(images: Tensor, classifier: Classifier, real: Moments) -> dict[str, float]:
    """How many samples the classifier takes for what was asked, and how far their features are from real ones."""
    predicted, features = classify(classifier, images)
    labels = torch.arange(len(images)) % classifier.out.out_features
    return {
        "accuracy": (predicted == labels).float().mean().item(),
        "frechet_distance": frechet_distance(moments(features), real),
    }


def measure_references(classifier: Classifier, real: Moments, train: Data, held_out: Data) -> dict[str, Any]:
    """The same numbers for real images: as many training images, and held-out ones."""
    references = {}
    for name, data in (("training images", train), ("held-out images", held_out)):
        chosen = torch.randperm(len(data), generator=generator("reference", name))[:NUM_SAMPLES]
        images, labels = data.batch(chosen)
        predicted, features = classify(classifier, images)
        references[name] = {
            "accuracy": (predicted == labels).float().mean().item(),
            "frechet_distance": frechet_distance(moments(features), real),
        }
    return references
