"""A run that is killed ends where it would have ended."""

import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from elit import ElitError
from elit.training import OptimizerConfig, StepReport, Trainer, state
from elit.training.deterministic import deterministic_algorithms
from elit.training.loader import StepBatch
from tests.helpers.runs import STEPS, arguments, config, contents, kill, moments, wait_for_line


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    run = tmp_path_factory.mktemp("whole") / "run"
    subprocess.run(arguments(run), check=True, capture_output=True)
    return contents(run)


@pytest.mark.parametrize("kills", [[10, 30, 31], moments("one process")], ids=["while it saves", "at random"])
def test_killed_run_ends_bit_identical(tmp_path: Path, uninterrupted: dict[str, object], kills: list[int]) -> None:
    run = tmp_path / "run"
    for line in kills:
        process = subprocess.Popen(arguments(run), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for_line(run / "log.jsonl", line, process)
        kill(process)
    assert not (run / "checkpoints" / f"step-{STEPS:08d}").exists()
    subprocess.run(arguments(run), check=True, capture_output=True)
    assert contents(run) == uninterrupted


@pytest.mark.parametrize(("kind", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_signal_saves_and_continues(
    kind: signal.Signals, code: int, tmp_path: Path, uninterrupted: dict[str, object]
) -> None:
    run = tmp_path / "run"
    process = subprocess.Popen(arguments(run), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    wait_for_line(run / "log.jsonl", 17, process)
    process.send_signal(kind)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == code
    assert b"run the same command to continue" in output
    (checkpoint,) = [p for p in (run / "checkpoints").iterdir() if int(p.name[5:]) % 10]
    assert int(checkpoint.name[5:]) >= 17
    subprocess.run(arguments(run), check=True, capture_output=True)
    assert contents(run) == uninterrupted


def whole_run(out: Path) -> dict[str, object]:
    """What an uninterrupted run leaves in this very process, whose threads decide bits too."""
    Trainer(config(out)).run_to_end()
    return contents(out)


def test_a_loop_left_early_continues(tmp_path: Path) -> None:
    run, uninterrupted = tmp_path / "run", whole_run(tmp_path / "whole")
    for report in Trainer(config(run)):
        if report.step == 25:
            break
    Trainer(config(run)).run_to_end()
    assert contents(run) == uninterrupted


def test_a_later_run_starts_from_another(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    uninterrupted = whole_run(tmp_path / "whole")
    for report in Trainer(config(first, keep_checkpoints=9)):
        if report.step == 30:
            break
    Trainer(config(second, resume=str(first / "checkpoints/step-00000020"))).run_to_end()
    assert {k: v for k, v in contents(second).items() if k != "log"} == {
        k: v for k, v in uninterrupted.items() if k != "log"
    }
    with pytest.raises(ElitError, match="is already at step-00000030; remove what follows to go back"):
        Trainer(config(first, resume=str(first / "checkpoints/step-00000020"))).run_to_end()


@pytest.mark.parametrize("wrong", ["nothing", "."])
def test_a_wrong_path_is_no_silent_restart(tmp_path: Path, wrong: str) -> None:
    resume = str(tmp_path / wrong)
    with pytest.raises(ElitError, match="which is neither a checkpoint"):
        Trainer(config(tmp_path / "run", resume=resume)).run_to_end()
    assert not (tmp_path / "run" / "log.jsonl").exists()


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The previous checkpoint survives, the message says so, and the same command goes on."""
    run = tmp_path / "run"

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(ElitError) as caught:
        for report in Trainer(config(run)):
            if report.step == 10:
                patch.setattr(state, "write_tensors", full)
    assert "No space left on device; the last checkpoint" in str(caught.value)
    assert "step-00000010, is whole: make room and run the same command again" in str(caught.value)
    assert [folder.name for folder in (run / "checkpoints").iterdir()] == ["step-00000010"]
    for report in Trainer(config(run)):
        assert report.step == 11
        break


def test_a_deterministic_run_is_the_same_on_a_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch is told during steps alone, and a run may be continued with the setting or without."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    during = []

    class Watched(Trainer):
        def _train_step(self, batch: StepBatch) -> StepReport:
            during.append(torch.are_deterministic_algorithms_enabled())
            return super()._train_step(batch)

    settings: dict[str, Any] = {"steps": 16, "optimizer": OptimizerConfig("muon", lr=1e-3, warmup_steps=5)}
    settings |= {"precision": "bf16", "checkpoint_activations": True, "micro_batch_size": 5}
    whole, run = tmp_path / "whole", tmp_path / "run"
    Watched(config(whole, **settings)).run_to_end()
    assert during == [False] * 16
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    for report in Watched(config(run, deterministic=True, **settings)):
        assert not torch.are_deterministic_algorithms_enabled()
        if report.step == 12:
            break
    assert during[16:] == [True] * 12
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    Watched(config(run, **settings)).run_to_end()
    assert contents(run, 16) == contents(whole, 16)


def test_flags_of_torch_are_restored_after_an_error() -> None:
    cudnn = torch.backends.cudnn
    torch.use_deterministic_algorithms(True, warn_only=True)
    cudnn.benchmark = True
    try:
        with pytest.raises(ZeroDivisionError), deterministic_algorithms(True):
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
            assert cudnn.deterministic
            assert not cudnn.benchmark
            raise ZeroDivisionError
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        assert (cudnn.deterministic, cudnn.benchmark) == (False, True)
    finally:
        torch.use_deterministic_algorithms(False)
        cudnn.benchmark = False
