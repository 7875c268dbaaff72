"""The small run that the tests of training share, as a configuration and as a command."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from subprocess import Popen
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from elit.cli import main
from elit.training import ElasticConfig, ModelChoice, OptimizerConfig, TrainConfig

KILLS = int(os.environ.get("ELIT_TEST_KILLS", "1"))
"""Random moments at which a run is killed; the full test takes 20, of a longer run."""
STEPS = 60 if KILLS == 1 else 100
FIELDS = {"width": 32, "depth": 3, "num_heads": 2, "head_depth": 1, "tail_depth": 1, "patch_size": 1}
ALL_BUDGETS = ElasticConfig(group_size=4, min_mask_prob=0.0, max_mask_prob=0.9375)


def config(out: Path, **changes: object) -> TrainConfig:
    settings: dict[str, object] = {
        "data": "digits8",
        "model": ModelChoice("ELIT-DiT-S/1", FIELDS),
        "elit": ALL_BUDGETS,
        "optimizer": OptimizerConfig("muon", lr=1e-3, warmup_steps=5, decay="linear"),
        "steps": STEPS,
        "batch_size": 16,
        "log_every": 1,
        "checkpoint_every": 10,
        "ema_decay": 0.9,
    }
    return TrainConfig(out=str(out), **(settings | changes))  # type: ignore[arg-type]


def small_encoder(folder: Path) -> Path:
    """A DINOv2 with random weights, as ``save_pretrained`` writes it."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(1)
    sizes = Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=24, patch_size=6)
    Dinov2Model(sizes).save_pretrained(folder)
    return folder


def launch(processes: int) -> list[str]:
    """The command on some processes."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes))
    return [sys.executable, *(torchrun if processes > 1 else ()), "-m", "elit"]


def arguments(out: Path, processes: int = 1) -> list[str]:
    fields = json.dumps(FIELDS)
    return [
        *(*launch(processes), "train", "--out", str(out), "--data", "digits8"),
        *("--model.name", "ELIT-DiT-S/1", "--model.fields", fields),
        *("--elit.group-size", "4", "--elit.min-mask-prob", "0.0", "--elit.max-mask-prob", "0.9375"),
        *("--optimizer.name", "muon", "--optimizer.lr", "1e-3", "--optimizer.warmup-steps", "5"),
        *("--optimizer.decay", "linear", "--steps", str(STEPS), "--batch-size", "16", "--log-every", "1"),
        *("--checkpoint-every", "10", "--ema-decay", "0.9"),
    ]


def train_together(folder: Path, *configs: TrainConfig, processes: int = 2) -> str:
    """Runs, one after the other, in the same processes: what they say."""
    files = [folder / f"{i}.yaml" for i in range(len(configs))]
    for file, settings in zip(files, configs, strict=True):
        file.write_text(yaml.safe_dump(json.loads(json.dumps(asdict(settings)))))
    # Not torchrun, which other tests use. --multi_gpu is the launcher of several processes, also without a GPU.
    launcher = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes))
    command = [sys.executable, *launcher, "--main_process_port", "0", __file__, *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def contents(run: Path, steps: int = STEPS) -> dict[str, object]:
    """Everything that must agree: weights, average, optimizer state, and the log."""
    last = run / "checkpoints" / f"step-{steps:08d}"
    found: dict[str, object] = {"log": (run / "log.jsonl").read_text()}
    for name in ("model", "training"):
        for key, value in load_file(last / f"{name}.safetensors").items():
            found[f"{name}/{key}"] = value.numpy().tobytes()
    return found


def log(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def moments(purpose: str) -> list[int]:
    """Lines of the log after which a run is killed. One that is there already kills a run while it starts."""
    lines = random.Random(purpose)
    return sorted(lines.randrange(1, STEPS - 1) for _ in range(KILLS))


def wait_for_line(log: Path, line: int, process: Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if log.exists() and log.read_text().count("\n") >= line:
            return
        time.sleep(0.005)


def children(process: Popen[bytes]) -> list[str]:
    """Process ids, the last born at the end."""
    return Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()


def kill(process: Popen[bytes], workers: int | None = None) -> None:
    """Kill -9: the process and its children, or of a launcher's children the last ones, which ends the others too."""
    found = children(process)
    while workers is not None and not found and process.poll() is None:  # a launcher that has just begun
        found = children(process)
    for child in found if workers is None else found[-workers:]:
        os.kill(int(child), signal.SIGKILL)
    if workers is None:
        process.kill()
    process.wait(timeout=120)


if __name__ == "__main__":
    from accelerate import PartialState

    PartialState.destroy_process_group = lambda *_, **__: None  # at the end of a run: the next one has it too
    for file in sys.argv[1:]:
        assert main(["train", "--config", file]) == 0
