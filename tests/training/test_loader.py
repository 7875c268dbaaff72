"""Batches that are read ahead are those that would be read in time, and their thread ends with the training."""

import json
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from elit import ElitError
from elit.data import Captioned, Flipped, ImageData, ImageFolder, StagedData, digits8
from elit.data.captions import WordVectors
from elit.data.dataset import finish, map_tensors, read
from elit.data.pixels import from_uint8
from elit.interface import BudgetByNoise
from elit.training import ElasticConfig, OptimizerConfig, Trainer
from elit.training.loader import prefetch
from tests.helpers.pictures import smooth
from tests.helpers.runs import config, contents


def reading_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


class Digits(ImageData):
    """Digits that can be slow to read, or break at a call."""

    def __init__(self, seconds: float = 0.0, broken: int | None = None) -> None:
        digits = digits8()
        super().__init__(digits.images, digits.labels, digits.num_classes)
        self.__dict__.update(seconds=seconds, broken=broken, calls=0)

    def batch(self, indices: Tensor, seed: int | None = None) -> tuple[Tensor, Tensor]:
        state: Any = self
        state.__dict__["calls"] += 1
        if state.calls - 1 == state.broken:
            raise ElitError("img00000007.png cannot be read")
        time.sleep(state.seconds)
        return super().batch(indices, seed)


def test_items_come_in_order_and_some_ahead() -> None:
    done: list[int] = []

    def take(place: int) -> int:
        done.append(place)
        return place * place

    items = prefetch(take, range(6), ahead=2)
    assert next(items).result() == 0
    deadline = time.monotonic() + 10
    while len(done) < 3 and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.02)
    assert done == [0, 1, 2]  # two more than were asked for, and no third
    assert [item.result() for item in items] == [1, 4, 9, 16, 25]
    assert not reading_threads()


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_an_error_comes_at_its_own_place(ahead: int) -> None:
    seen: list[int] = []
    with closing(prefetch(lambda place: 6 // (3 - place), range(9), ahead)) as items:  # type: ignore[type-var]
        seen += [next(items).result() for _ in range(3)]
        fourth = next(items)
        with pytest.raises(ZeroDivisionError):
            fourth.result()
    assert seen == [2, 3, 6]
    assert not reading_threads()


BY_NOISE = ElasticConfig(group_size=4, by_noise=BudgetByNoise([0.6], [0.25, 1.0]))


SEVERAL = ElasticConfig(group_size=4, levels_per_step=2)


@pytest.mark.parametrize(
    "changes",
    [{"micro_batch_size": 3, "elit": BY_NOISE}, {"elit": SEVERAL}, {}],
    ids=["by noise", "several a step", "drawn"],
)
def test_reading_ahead_changes_no_bit(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Also of a run that was left with batches on their way, and goes on in another trainer."""
    settings: dict[str, Any] = {"steps": 12, "optimizer": OptimizerConfig("muon", lr=1e-3, warmup_steps=5)} | changes
    Trainer(config(tmp_path / "in-time", prefetch=0, **settings)).run_to_end()
    for report in Trainer(config(tmp_path / "ahead", prefetch=5, **settings)):
        if report.step == 11:
            break
    assert not reading_threads()
    Trainer(config(tmp_path / "ahead", prefetch=1, **settings)).run_to_end()
    assert contents(tmp_path / "ahead", 12) == contents(tmp_path / "in-time", 12)


def test_more_levels_in_a_step_than_samples_are_refused(tmp_path: Path) -> None:
    several = ElasticConfig(group_size=4, levels_per_step=5)
    with pytest.raises(ElitError, match=r"elit.levels_per_step is 5, and a process has 4 samples"):
        Trainer(config(tmp_path / "run", elit=several, batch_size=4))


def test_batches_of_scaled_size_are_planned_ahead(tmp_path: Path) -> None:
    """The samples of a step follow those of the steps before, however many these had."""
    elastic = ElasticConfig(group_size=4, batching="scaled")
    settings: dict[str, Any] = {"elit": elastic, "steps": 5, "optimizer": OptimizerConfig()}
    ahead = list(Trainer(config(tmp_path / "ahead", **settings)))
    in_time = list(Trainer(config(tmp_path / "in-time", prefetch=0, **settings)))
    assert len({report.batch_size for report in ahead}) > 1
    assert [report.loss for report in ahead] == [report.loss for report in in_time]


@pytest.mark.parametrize("ahead", [0, 2])
def test_an_error_of_the_data_names_its_step_and_ends_the_thread(tmp_path: Path, ahead: int) -> None:
    trainer = Trainer(config(tmp_path / "run", prefetch=ahead), Digits(broken=3))
    with pytest.raises(ElitError, match=r"img00000007.png cannot be read \(in the batch of step 4\)"):
        trainer.run_to_end()
    assert trainer.step == 3
    assert not reading_threads()


@pytest.mark.parametrize("reason", [KeyboardInterrupt, RuntimeError])
def test_the_thread_ends_with_the_loop(tmp_path: Path, reason: type[BaseException]) -> None:
    trainer = Trainer(config(tmp_path / "run"), Digits(seconds=0.01))

    def fail(*_: object) -> None:
        assert reading_threads()
        raise reason

    trainer.model.register_forward_hook(fail)
    with pytest.raises(reason):
        trainer.run_to_end()
    assert not reading_threads()


def test_a_stop_that_is_asked_for_reads_no_further(tmp_path: Path) -> None:
    data = Digits()
    trainer = Trainer(config(tmp_path / "run", prefetch=2, log_every=50), data)
    for report in trainer:
        if report.step == 3:
            trainer.request_stop()
    assert (trainer.step, trainer.interrupted) == (4, True)
    assert not reading_threads()
    assert data.calls <= 4 + 2  # type: ignore[attr-defined]


def test_the_log_says_how_long_the_device_waited(tmp_path: Path) -> None:
    """For every batch that is read in time, and for the first one alone of those that are read ahead."""
    waits = []
    for ahead in (0, 2):
        trainer = Trainer(config(tmp_path / f"{ahead}", steps=12, prefetch=ahead, log_every=12), Digits(seconds=0.05))
        trainer.model.register_forward_hook(lambda *_: time.sleep(0.06))
        trainer.run_to_end()
        assert trainer.last_speed is not None
        waits.append(trainer.last_speed.data_wait)
    assert 0 < 3 * waits[1] < waits[0] < 1
    (line,) = (json.loads(line) for line in (tmp_path / "2/speed.jsonl").read_text().splitlines())
    assert line["data_wait"] == waits[1]


def test_data_in_two_stages_are_those_in_one(tmp_path: Path) -> None:
    """Pixels travel as bytes, and become the same numbers as in one stage."""
    rng = np.random.default_rng(0)
    for i in range(3):
        smooth(rng, 8, 8).save(tmp_path / f"{i}.png")
    folder, indices = ImageFolder(tmp_path), torch.tensor([2, 0])
    captioned = Captioned(Flipped(folder), ["one bird", "two birds", "a fish"], WordVectors(4))
    for data in (folder, Flipped(folder), captioned):
        assert isinstance(data, StagedData)
        raw = read(data, indices, 5)
        assert flat(raw)[0].dtype == torch.uint8
        elsewhere = map_tensors(torch.clone, raw)
        for found, wanted in zip(flat(finish(data, elsewhere)), flat(data.batch(indices, 5)), strict=True):
            assert torch.equal(found, wanted)


def test_bytes_become_the_numbers_of_a_plain_division() -> None:
    numbers = np.arange(256, dtype=np.float32) / np.float32(127.5) - 1
    assert torch.equal(from_uint8(torch.arange(256, dtype=torch.uint8)), torch.from_numpy(numbers))


def flat(value: Any) -> list[Tensor]:
    found: list[Tensor] = []
    map_tensors(lambda tensor: found.append(tensor) or tensor, value)  # type: ignore[func-returns-value]
    return found
