"""The small base that the tests of distillation share, in the real format, and runs that distil it."""

import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from elit.training import OptimizerConfig
from elit.training.distillation import DistillConfig

STEPS = 8
WIDTH = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 4, "patch_size": 1}


def save_base(folder: Path, std: float = 0.3) -> Path:
    """A pipeline of a DiT that draws digits of 8x8 pixels: 64 tokens, no weight of it zero."""
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    from tests.helpers.small_pipelines import autoencoder

    torch.manual_seed(0)
    sizes = WIDTH | {"in_channels": 1, "out_channels": 2, "sample_size": 8, "num_embeds_ada_norm": 1000}
    transformer = DiTTransformer2DModel(**sizes)
    for parameter in transformer.parameters():
        nn.init.normal_(parameter, std=std)
    DiTPipeline(transformer, autoencoder(1), DDIMScheduler()).save_pretrained(folder)
    return folder


def distillation(base: Path, out: Path, **changes: Any) -> DistillConfig:
    settings: dict[str, Any] = {
        "data": "digits8",
        "steps": STEPS,
        "batch_size": 6,
        "optimizer": OptimizerConfig(lr=1e-3, warmup_steps=0),
        "ema_decay": 0.5,
        "log_every": 1,
        "checkpoint_every": 3,
    }
    return DistillConfig(base=str(base), out=str(out), **(settings | changes))


def as_file(config: DistillConfig, file: Path) -> Path:
    """A configuration as ``--config`` takes it."""
    file.write_text(yaml.safe_dump(asdict(config) | {"optimizer": asdict(config.optimizer) | {"betas": [0.9, 0.999]}}))
    return file


def command(file: Path) -> list[str]:
    """The command that distils as a file says."""
    return [sys.executable, "-m", "elit", "distill", "--config", str(file)]


def distil_together(folder: Path, *configs: DistillConfig) -> str:
    """Runs, one after the other, in the same two processes: what they say."""
    files = [as_file(config, folder / f"{i}.yaml") for i, config in enumerate(configs)]
    launcher = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0")
    done = subprocess.run([sys.executable, *launcher, __file__, *map(str, files)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


if __name__ == "__main__":
    from accelerate import PartialState

    from elit.cli import main

    PartialState.destroy_process_group = lambda *_, **__: None  # at the end of a run: the next one has it too
    for each in sys.argv[1:]:
        assert main(["distill", "--config", each]) == 0
