"""A run that is killed ends where it would have ended."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from runs import STEPS, arguments, config
from safetensors.torch import load_file

from elit.training import Trainer


def contents(run: Path) -> dict[str, object]:
    """Everything that must agree: weights, average, optimizer state, and the log."""
    last = run / "checkpoints" / f"step-{STEPS:08d}"
    found: dict[str, object] = {"log": (run / "log.jsonl").read_text()}
    for name in ("model", "training"):
        for key, value in load_file(last / f"{name}.safetensors").items():
            found[f"{name}/{key}"] = value.numpy().tobytes()
    return found


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    run = tmp_path_factory.mktemp("whole") / "run"
    subprocess.run(arguments(run), check=True, capture_output=True)
    return contents(run)


def wait_for_line(log: Path, line: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if log.exists() and log.read_text().count("\n") >= line:
            return
        time.sleep(0.005)


@pytest.mark.parametrize("kills", [(13,), (10, 31, 49)])
def test_killed_run_ends_bit_identical(
    tmp_path: Path, uninterrupted: dict[str, object], kills: tuple[int, ...]
) -> None:
    run = tmp_path / "run"
    for line in kills:
        process = subprocess.Popen(arguments(run), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for_line(run / "log.jsonl", line, process)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert not (run / "checkpoints" / f"step-{STEPS:08d}").exists()
    subprocess.run(arguments(run), check=True, capture_output=True)
    assert contents(run) == uninterrupted


def test_interrupt_saves_and_continues(tmp_path: Path, uninterrupted: dict[str, object]) -> None:
    run = tmp_path / "run"
    process = subprocess.Popen(arguments(run), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    wait_for_line(run / "log.jsonl", 17, process)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"run the same command to continue" in output
    (checkpoint,) = [p for p in (run / "checkpoints").iterdir() if int(p.name[5:]) % 10]
    assert int(checkpoint.name[5:]) >= 17
    subprocess.run(arguments(run), check=True, capture_output=True)
    assert contents(run) == uninterrupted


def test_a_loop_left_early_continues(tmp_path: Path, uninterrupted: dict[str, object]) -> None:
    run = tmp_path / "run"
    for report in Trainer(config(run)):
        if report.step == 25:
            break
    Trainer(config(run)).run_to_end()
    assert contents(run) == uninterrupted
