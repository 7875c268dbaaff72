"""Several processes train what one does, and survive what one survives. On processors, so with gloo."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file

from elit.interface import BudgetByNoise
from elit.training import ElasticConfig, OptimizerConfig, RepaConfig, TrainConfig, Trainer, ValidationConfig
from tests.helpers.runs import (
    ALL_BUDGETS,
    STEPS,
    arguments,
    children,
    config,
    contents,
    kill,
    log,
    moments,
    small_encoder,
    train_together,
    wait_for_line,
)

BY_NOISE = ElasticConfig(group_size=4, by_noise=BudgetByNoise([0.7, 0.4], [0.25, 0.5, 1.0]))
CASES = ("all budgets", "by noise, uneven", "aligned")
HALF = "in half precision"
Parallel = Literal["ddp", "fsdp"]


@pytest.mark.parametrize("workers", [None, 1], ids=["both", "one of two"])
def test_killed_processes_end_bit_identical(pair: Path, tmp_path: Path, workers: int | None) -> None:
    run = tmp_path / "run"
    for line in moments(f"{workers}"):
        process = subprocess.Popen(arguments(run, 2), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for_line(run / "log.jsonl", line, process)
        kill(process, workers)
    subprocess.run(arguments(run, 2), check=True, capture_output=True)
    assert contents(run) == contents(pair)


def test_a_signal_to_one_process_stops_all(tmp_path: Path) -> None:
    """It comes at some moment of a step, and all save the same one."""
    run = tmp_path / "run"
    process = subprocess.Popen(arguments(run, 2), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    wait_for_line(run / "log.jsonl", 12, process)
    os.kill(int(children(process)[-1]), signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0  # of the launcher: no process failed
    assert b"run the same command to continue" in output
    assert len(log(run)) < STEPS
    assert (run / f"checkpoints/step-{len(log(run)):08d}").is_dir()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shared run, on two processes."""
    run = tmp_path_factory.mktemp("pair") / "run"
    subprocess.run(arguments(run, 2), check=True, capture_output=True)
    return run


def adamw(out: Path, steps: int, **changes: Any) -> TrainConfig:
    """Not Muon, which iterates in bf16, where last bits grow; and sharded weights refuse it."""
    validation = ValidationConfig(every=steps, samples=150, images=2, sampling_steps=2)
    optimizer = OptimizerConfig(lr=1e-3, warmup_steps=5)
    settings = {"steps": steps, "optimizer": optimizer, "validation": validation, "keep_checkpoints": 9}
    return config(out, **(settings | changes))


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TrainConfig]:
    """Runs on one process. Those of two have different numbers of micro-batches where samples are seven."""
    folder = tmp_path_factory.mktemp("alone")
    uneven: dict[str, Any] = {"elit": BY_NOISE, "batch_size": 7, "micro_batch_size": 2}
    aligned = RepaConfig(str(small_encoder(folder / "encoder")), depth=1)
    made = [
        adamw(folder / CASES[0], 30, elit=ALL_BUDGETS),
        adamw(folder / CASES[1], 4, **uneven),
        adamw(folder / CASES[2], 4, repa=aligned),
    ]
    made.append(adamw(folder / HALF, 4, precision="bf16"))
    for each in made:
        Trainer(each).run_to_end()
    return dict(zip((*CASES, HALF), made, strict=True))


@pytest.fixture(scope="module")
def together(cases: dict[str, TrainConfig], tmp_path_factory: pytest.TempPathFactory) -> dict[Parallel, Path]:
    """The same on two processes, whole and in shards."""
    folders: dict[Parallel, Path] = {}
    for parallel in ("ddp", "fsdp"):
        folder = folders[parallel] = tmp_path_factory.mktemp(parallel)
        made = [replace(case, out=str(folder / name), parallel=parallel) for name, case in cases.items()]
        assert train_together(folder, *made).count("2 processes") == len(made)
    return folders


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", CASES)
def test_two_processes_have_the_loss_curve_of_one(
    cases: dict[str, TrainConfig], together: dict[Parallel, Path], name: str, parallel: Parallel
) -> None:
    one, two = Path(cases[name].out), together[parallel] / name
    for a, b in zip(log(one), log(two), strict=True):
        # float32 sums in another order, through all steps before (seen: 1e-5, and 1e-4 of the gradient's norm)
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
        assert b == pytest.approx(a, rel=1e-3)
    assert "held_out_loss/0.25" in log(one)[-1]
    assert ("alignment" in log(one)[-1]) == (name == "aligned")
    assert (two / f"samples/step-{cases[name].steps:08d}.png").exists()


def test_shards_in_half_precision_are_summed_in_full(
    cases: dict[str, TrainConfig], together: dict[Parallel, Path]
) -> None:
    """Blocks are gathered in bf16, of which matrix products see the same as under autocast alone; of the rest, norms of
    queries and keys are rounded. What is saved is float32."""
    alone = log(Path(cases[HALF].out))
    for parallel in ("ddp", "fsdp"):
        for a, b in zip(alone, log(together[parallel] / HALF), strict=True):
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-2)  # bf16 has 8 bits
            assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=5e-2)
    last = "checkpoints/step-00000004/training.safetensors"
    weights = [load_file(together[parallel] / HALF / last) for parallel in ("ddp", "fsdp")]
    assert {value.dtype for value in weights[1].values()} == {torch.float32}
    torch.testing.assert_close(*weights, rtol=0.1, atol=5e-3)  # four steps of at most 1e-3 each


@pytest.mark.parametrize("name", CASES)
def test_shards_are_saved_as_whole_weights_are(
    cases: dict[str, TrainConfig], together: dict[Parallel, Path], name: str
) -> None:
    last = f"checkpoints/step-{cases[name].steps:08d}"
    for file in ("model.safetensors", "training.safetensors"):
        same_tensors(together["fsdp"] / name / last / file, together["ddp"] / name / last / file)
    described = [(folder / name / last / "config.json").read_text() for folder in together.values()]
    assert described[0] == described[1]


def same_tensors(one: Path, other: Path) -> None:
    """Sums in another order, which AdamW enlarges where a gradient is nearly zero: one in 500 moves 2e-6 in 4 steps."""
    torch.testing.assert_close(load_file(one), load_file(other), rtol=1e-3, atol=1e-5)


def test_a_checkpoint_continues_in_shards_and_out_of_them(tmp_path: Path) -> None:
    """Bit for bit where nothing changes."""
    alone = adamw(tmp_path / "alone", 10, checkpoint_every=5)
    Trainer(alone).run_to_end()
    sharded = replace(alone, out=str(tmp_path / "sharded"), parallel="fsdp")
    halves = {
        "again": replace(sharded, out=str(tmp_path / "again"), resume=halfway(sharded)),
        "from one": replace(sharded, out=str(tmp_path / "from one"), resume=halfway(alone)),
        "to whole": replace(alone, out=str(tmp_path / "to whole"), resume=halfway(sharded)),
    }
    train_together(tmp_path, sharded, *halves.values())
    last = "checkpoints/step-00000010"
    uninterrupted, again = (contents(tmp_path / name, 10) for name in ("sharded", "again"))
    assert {k: v for k, v in again.items() if k != "log"} == {k: v for k, v in uninterrupted.items() if k != "log"}
    for name in ("from one", "to whole"):
        for file in ("model.safetensors", "training.safetensors"):
            same_tensors(tmp_path / name / last / file, tmp_path / "alone" / last / file)
    Trainer(replace(alone, out=str(tmp_path / "to one"), resume=halfway(sharded))).run_to_end()
    assert log(tmp_path / "to one")[-1]["loss"] == pytest.approx(log(tmp_path / "alone")[-1]["loss"], rel=1e-4)


def halfway(run: TrainConfig) -> str:
    return f"{run.out}/checkpoints/step-00000005"


def test_shards_continue_in_another_split_of_the_batch_across_an_epoch(tmp_path: Path) -> None:
    """The data are 1437 samples, and the run is cut before the step that begins to see them again."""
    settings: dict[str, Any] = {"batch_size": 500, "checkpoint_every": 2, "elit": ALL_BUDGETS}
    alone = adamw(tmp_path / "alone", 4, **settings)
    trainer = Trainer(alone)
    trainer.run_to_end()
    assert 2 * 500 < len(trainer.data) < 3 * 500
    sharded = replace(alone, out=str(tmp_path / "sharded"), steps=2, parallel="fsdp")
    cut = replace(alone, out=str(tmp_path / "sharded"), parallel="fsdp", micro_batch_size=170)
    train_together(tmp_path, sharded, cut)
    for file in ("model.safetensors", "training.safetensors"):
        last = "checkpoints/step-00000004"
        same_tensors(tmp_path / "sharded" / last / file, tmp_path / "alone" / last / file)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_gradient_that_is_not_finite_in_one_process_is_skipped_by_all(tmp_path: Path, parallel: Parallel) -> None:
    script = ("-m", "tests.helpers.one_bad_gradient", str(tmp_path / "run"), parallel)
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = subprocess.run([*torchrun, *script], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    lines = log(tmp_path / "run")
    assert [line["skipped"] for line in lines] == [0, 0, 1, 1, 1]
    assert [line["grad_norm"] is None for line in lines] == [False, False, True, False, False]
    assert None not in [line["loss"] for line in lines]
    weights = load_file(tmp_path / "run/checkpoints/step-00000005/training.safetensors")
    assert all(value.isfinite().all() for value in weights.values())
