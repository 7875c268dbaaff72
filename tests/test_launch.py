"""What a launcher tells a process, devices, and taking turns."""

import multiprocessing
import time
from pathlib import Path

import pytest
import torch

from elit import ElitError
from elit.launch import default_device, file_lock, local_world_size, rank_and_world_size


def test_ranks_are_those_of_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert (rank_and_world_size(), local_world_size()) == ((0, 1), 1)
    for name, value in (("RANK", "3"), ("WORLD_SIZE", "8"), ("LOCAL_WORLD_SIZE", "4")):
        monkeypatch.setenv(name, value)
    assert (rank_and_world_size(), local_world_size()) == ((3, 8), 4)


def test_devices() -> None:
    assert default_device("cpu") == torch.device("cpu")
    assert default_device().type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(ElitError, match="there is no device 'abacus' here"):
        default_device("abacus")
    with pytest.raises(ElitError, match=r"device mps is not supported: .* float64"):
        default_device("mps")


def test_training_and_sampling_take_the_same_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a Mac, whose accelerator PyTorch would offer."""
    from elit.training import trainer
    from tests.helpers.runs import config

    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    made = trainer.Trainer(config(tmp_path / "run"))
    assert made.accelerator.device.type == default_device().type


def hold(lock: Path, log: Path) -> None:
    """Run in a process of its own."""
    with file_lock(lock):
        with log.open("a") as file:
            file.write("in\n")
        time.sleep(0.05)
        with log.open("a") as file:
            file.write("out\n")


def test_one_process_at_a_time(tmp_path: Path) -> None:
    lock, log = tmp_path / "new" / ".lock", tmp_path / "log"
    processes = [multiprocessing.get_context("fork").Process(target=hold, args=(lock, log)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert log.read_text().split() == ["in", "out"] * 4


def test_a_process_that_dies_lets_go_of_the_lock(tmp_path: Path) -> None:
    def die() -> None:
        with file_lock(tmp_path / ".lock"):
            (tmp_path / "held").touch()
            time.sleep(600)

    process = multiprocessing.get_context("fork").Process(target=die)
    process.start()
    deadline = time.monotonic() + 60
    while not (tmp_path / "held").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.join(60)
    with file_lock(tmp_path / ".lock"):
        pass


def test_a_lock_that_cannot_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ElitError, match=r"^cannot write .*file: "), file_lock(tmp_path / "file" / ".lock"):
        pytest.fail("the block must not run")
