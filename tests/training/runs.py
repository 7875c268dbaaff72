"""The small run that the tests of training share."""

import json
import sys
from pathlib import Path

from elit.training import ElasticConfig, ModelChoice, OptimizerConfig, TrainConfig

STEPS = 60
FIELDS = {"width": 32, "depth": 3, "num_heads": 2, "head_depth": 1, "tail_depth": 1, "patch_size": 1}


def config(out: Path, **changes: object) -> TrainConfig:
    settings: dict[str, object] = {
        "data": "digits8",
        "model": ModelChoice("ELIT-DiT-S/1", FIELDS),
        "elit": ElasticConfig(group_size=4, min_mask_prob=0.0, max_mask_prob=0.9375),
        "optimizer": OptimizerConfig("muon", lr=1e-3, warmup_steps=5, decay="linear"),
        "steps": STEPS,
        "batch_size": 16,
        "log_every": 1,
        "checkpoint_every": 10,
        "ema_decay": 0.9,
    }
    return TrainConfig(out=str(out), **(settings | changes))  # type: ignore[arg-type]


def arguments(out: Path) -> list[str]:
    fields = json.dumps(FIELDS)
    return [
        *(sys.executable, "-m", "elit", "train", "--out", str(out), "--data", "digits8"),
        *("--model.name", "ELIT-DiT-S/1", "--model.fields", fields),
        *("--elit.group-size", "4", "--elit.min-mask-prob", "0.0", "--elit.max-mask-prob", "0.9375"),
        *("--optimizer.name", "muon", "--optimizer.lr", "1e-3", "--optimizer.warmup-steps", "5"),
        *("--optimizer.decay", "linear", "--steps", str(STEPS), "--batch-size", "16", "--log-every", "1"),
        *("--checkpoint-every", "10", "--ema-decay", "0.9"),
    ]
