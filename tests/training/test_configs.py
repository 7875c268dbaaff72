"""Every published experiment: its file loads, its model can be built, its budgets are what its name says, and it costs
what it says."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser

from elit.models import create
from elit.training import TrainConfig
from elit.training.budgets import training_levels
from elit.training.checks import check
from tests.analysis.closed_form import closed_form

FOLDER = Path(__file__).parents[2] / "configs/train"
FILES = sorted(FOLDER.glob("*.yaml"))
PUBLISHED = [path for path in FILES if not any(kind in path.stem for kind in ("digits", "scenes", "kinetics", "mmdit"))]


def load(path: Path) -> TrainConfig:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(TrainConfig, "run")
    return parser.instantiate(parser.parse_object({"run": yaml.safe_load(path.read_text())})).run


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_published_experiment(path: Path) -> None:
    config = load(path)
    check(config)
    name = path.stem
    resolution = 512 if "512" in name else 256
    assert config.data == f"data/imagenet{resolution}-latents"
    fields = config.model.fields | ({"group_size": config.elit.group_size} if config.elit.group_size else {})
    with torch.device("meta"):
        model = create(config.model.name, resolution, **fields)
    levels = training_levels(config.elit, model).levels
    assert model.num_latents == ({256: 16, 512: 64}[resolution] if name.startswith("elit") else 0)
    expected = {
        "large-scale-mb": range(4, 17),
        "large-scale": [16],
        "mb": model.levels,
        "24gb": model.levels,
    }
    kind = next((kind for kind in expected if name.endswith(kind)), None)
    assert levels == (tuple(expected[kind]) if kind else model.levels[-1:])
    stated = re.search(r"# Cost: ([\d.]+) GFLOPs an image", path.read_text())
    assert stated is not None
    forwards = [2 * sum(closed_form(model.config, level)) for level in levels or (0,)]
    assert float(stated[1]) == pytest.approx(sum(forwards) / len(forwards) / 1e9, abs=0.051)  # one digit is given
    assert config.batch_size == (384 if name.endswith(("512-mb", "256-mb")) else 256)
    assert (config.optimizer.lr, config.optimizer.warmup_steps, config.optimizer.clip) == (1e-4, 10_000, 1.0)
    assert (config.ema_decay, config.label_dropout, config.times.kind) == (0.9999, 0.1, "logit-normal")


def test_every_published_experiment_is_there() -> None:
    wanted = {f"{elit}dit-{size}2-{res}" for elit in ("", "elit-") for size in ("b", "xl") for res in (256, 512)}
    wanted |= {f"{elit}sit-xl2-{res}" for elit in ("", "elit-") for res in (256, 512)}
    wanted |= {f"{elit}{kind}-xl2-{res}" for elit in ("", "elit-") for kind in ("uvit", "hdit") for res in (256, 512)}
    wanted |= {f"{name}-mb" for name in wanted if name.startswith("elit-")}
    assert wanted <= {path.stem for path in PUBLISHED}
