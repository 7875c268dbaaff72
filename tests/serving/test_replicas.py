"""Replicas on a local Ray cluster: one is killed under load, weights are replaced, and nothing is lost."""

import asyncio
import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

import elit
from elit import ElitError
from elit.cli import main
from elit.commands.serve import ServeOptions, make_pipeline
from elit.serving.pipeline import PartialPicture, Picture, Pipeline
from elit.serving.replicas import Failure, ReplicaDiedError, ReplicaOptions, Replicas
from elit.serving.request import QueueFull, Request
from tests.helpers.models import tiny
from tests.helpers.servers import serving, wait_until

STEPS = 100


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    tiny().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def replicas(folder: Path) -> Iterator[Replicas]:
    options = ReplicaOptions(replicas=2, cpus=0.5, queue_limit=30, drain_seconds=20)
    replicas = Replicas(partial(make_pipeline, ServeOptions(model=str(folder), device="cpu")), options)
    yield replicas
    asyncio.run(replicas.close())


def drawn(model: Any, seed: int) -> torch.Tensor:
    return torch.tensor(list(elit.to_pil(elit.sample(model, [3], seeds=[seed], steps=STEPS))[0].tobytes())).int()


def assert_same(picture: Picture, model: Any) -> None:
    """By eye the same: it was computed in another batch, so rounding may differ."""
    assert (picture.pixels.flatten().int() - drawn(model, picture.seed)).abs().max() <= 1


def request(seed: int) -> Request:
    return Request(label=3, seed=seed, steps=STEPS, previews=3)


async def picture_of(replicas: Replicas, seed: int) -> Picture:
    *partial_ones, last = [event async for event in replicas.generate(request(seed))]
    steps = [event.step for event in partial_ones if isinstance(event, PartialPicture)]
    assert steps == [25, 50, 75]  # each is shown once, also where a second replica began again
    assert isinstance(last, Picture)
    return last


async def last_of(replicas: Replicas, asked: Request) -> Picture:
    *_, last = [event async for event in replicas.generate(asked)]
    assert isinstance(last, Picture)
    return last


def processes(replicas: Replicas) -> set[int]:
    return {replicas._handle.describe.remote().result().pid for _ in range(20)}


@pytest.mark.slow  # a cluster takes its time to start
def test_both_replicas_make_pictures(replicas: Replicas) -> None:
    wait_until(lambda: len(processes(replicas)) == 2)

    async def several() -> list[Picture]:
        return await asyncio.gather(*(picture_of(replicas, seed) for seed in range(6)))

    for picture in asyncio.run(several()):
        assert_same(picture, tiny())
    assert replicas.status().finished == 6


@pytest.mark.slow  # a cluster takes its time to start
def test_what_a_killed_replica_was_making_is_made_again(replicas: Replicas) -> None:
    wait_until(lambda: len(processes(replicas)) == 2)
    before = processes(replicas)

    async def under_load() -> list[Picture]:
        making = [asyncio.create_task(picture_of(replicas, seed)) for seed in range(20)]
        while replicas.status().in_flight < 20:
            await asyncio.sleep(0.01)
        os.kill(min(before), signal.SIGKILL)
        return await asyncio.gather(*making)

    pictures = asyncio.run(under_load())
    assert [picture.seed for picture in pictures] == list(range(20))
    for picture in pictures:
        assert_same(picture, tiny())
    wait_until(lambda: len(processes(replicas) - {min(before)}) == 2, 60)  # another one took its place


@pytest.mark.slow  # a cluster takes its time to start
def test_a_picture_that_kills_replicas_fails_alone(folder: Path) -> None:
    def poisoned() -> Pipeline:
        pipeline = make_pipeline(ServeOptions(model=str(folder), device="cpu"))
        encode = pipeline.model.encode

        def fatal(x: Any, t: Any, y: Any) -> Any:
            return os._exit(1) if 9 in y else encode(x, t, y)

        pipeline.model.encode = fatal  # type: ignore[method-assign]
        return pipeline

    others = Replicas(poisoned, ReplicaOptions(replicas=2, cpus=0.0, drain_seconds=5))
    try:

        async def together() -> list[Picture | BaseException]:
            poison = asyncio.create_task(last_of(others, Request(label=9, steps=2)))
            making = [asyncio.create_task(picture_of(others, seed)) for seed in range(6)]
            return await asyncio.gather(poison, *making, return_exceptions=True)

        poison, *pictures = asyncio.run(together())
    finally:
        asyncio.run(others.close())
    assert isinstance(poison, ReplicaDiedError) and "3 replicas died" in str(poison)
    assert [picture.seed for picture in pictures if isinstance(picture, Picture)] == list(range(6))


@pytest.mark.slow  # a cluster takes its time to start
def test_new_weights_come_without_a_gap(replicas: Replicas, folder: Path) -> None:
    before, new = processes(replicas), tiny(seed=1)
    new.save_pretrained(folder)

    async def meanwhile() -> int:
        updating, made = asyncio.create_task(replicas.update()), 0
        while not updating.done():
            await picture_of(replicas, made)
            made += 1
        await updating
        return made

    assert asyncio.run(meanwhile()) > 0
    wait_until(lambda: not processes(replicas) & before, 60)
    assert_same(asyncio.run(picture_of(replicas, 7)), new)


@pytest.mark.slow  # a cluster takes its time to start
def test_others_on_the_same_cluster_go_on(replicas: Replicas, folder: Path) -> None:
    options = ServeOptions(model=str(folder), device="cpu")
    others = Replicas(partial(make_pipeline, options), ReplicaOptions(replicas=1, cpus=0.0, drain_seconds=5))
    asyncio.run(others.close())
    assert asyncio.run(picture_of(replicas, 3)).seed == 3


@pytest.mark.slow  # a cluster takes its time to start
def test_the_http_interface_is_the_same(replicas: Replicas) -> None:
    with serving(replicas) as address:
        url = address + "/v1/images/generations"
        answer = httpx.post(url, json={"prompt": "3", "n": 2, "quality": "low"}, timeout=60)
        wrong = httpx.post(url, json={"prompt": "11"})
        metrics = httpx.get(address + "/metrics").text
        with httpx.Client() as client, pytest.raises(httpx.ReadTimeout):
            client.post(url, json={"prompt": "3", "n": 10, "steps": 250}, timeout=0.1)
        wait_until(lambda: replicas.status().in_flight + replicas.status().queued == 0)
        assert httpx.get(address + "/health").json()["status"] == "ok"
        for pid in processes(replicas):
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: httpx.get(address + "/health").json()["status"] == "starting", 60)
        wait_until(lambda: httpx.get(address + "/health").status_code == 200, 120)
    assert answer.json()["data"][1]["budgets"] == [0.25] * 4
    assert wrong.status_code == 400
    assert 'elit_images_total{outcome="finished"} 2.0' in metrics
    assert replicas.status().cancelled == 10


@pytest.mark.parametrize("error", [QueueFull(3, 2.0), ElitError("wrong"), RuntimeError("broken")])
def test_errors_come_back_from_a_replica_as_they_were(error: Exception) -> None:
    back = Failure.of(error).error()
    assert isinstance(back, QueueFull) == isinstance(error, QueueFull)
    assert isinstance(back, ElitError) == isinstance(error, ElitError)
    assert str(error) in str(back)


def test_wrong_options_are_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*options: str) -> str:
        assert main(["serve", "--port", "0", *options]) == 2
        return capsys.readouterr().err

    assert "no-such-model" in said("--model", "no-such-model", "--replicas", "2")
    assert "replicas is 0" in said("--model", str(folder), "--replicas", "0")
    with pytest.raises(ElitError, match="replicas is 0"):
        ReplicaOptions(replicas=0)
    with pytest.raises(ElitError, match="at least replicas, 2"):
        ReplicaOptions(replicas=2, max_replicas=1)
