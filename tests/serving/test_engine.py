"""The engine: the same images as `elit.sample`, requests that come and go, and failures that stay alone."""

import asyncio
import queue
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import elit
from elit import Guidance
from elit.serving import Engine, Event, Failed, Finished, Preview, Request
from tests.helpers.models import tiny

TOLERANCE = 2e-5
"""Of the largest value: float32 matrix kernels sum in another order at another batch size, over some steps."""


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny()


@pytest.fixture(scope="module")
def engine(model: Any) -> Iterator[Engine]:
    with Engine(model) as engine:
        assert engine.wait_until_ready(60)
        yield engine


def results(engine: Engine, requests: list[Request]) -> list[Finished]:
    """Submits all requests at once and returns what came out, in their order."""
    inbox: queue.Queue[tuple[int, Event]] = queue.Queue()
    for i, request in enumerate(requests):
        engine.submit(request, lambda event, i=i: inbox.put((i, event)))  # type: ignore[misc]
    found: dict[int, Finished] = {}
    while len(found) < len(requests):
        i, event = inbox.get(timeout=30)
        assert not isinstance(event, Failed), event
        if isinstance(event, Finished):
            found[i] = event
    return [found[i] for i in range(len(requests))]


def again(model: Any, request: Request, result: Finished) -> torch.Tensor:
    """The image of a result once more, offline and alone."""
    labels, budget = request.labels(), list(result.budgets)
    same: dict[str, Any] = {"steps": request.steps, "solver": request.solver, "guidance": request.guidance}
    return elit.sample(model, labels, seeds=[request.seed], budget=budget, **same)[0]


REQUESTS = [
    Request(3, seed=7, steps=4),
    Request(1, seed=8, steps=5, solver="heun", budget=0.25),
    Request(0, seed=9, steps=3, solver="sde", guidance=Guidance("ccfg", 2.0, 0.25)),
    Request(9, seed=10, steps=4, budget=0.5, guidance=Guidance("cfg", 1.5, interval=(0.2, 0.8))),
]


@pytest.mark.parametrize("request_", REQUESTS)
def test_an_image_that_is_alone_is_that_of_sample_to_the_bit(model: Any, engine: Engine, request_: Request) -> None:
    (result,) = results(engine, [request_])
    assert torch.equal(result.sample, again(model, request_, result))
    assert (result.seed, result.steps) == (request_.seed, request_.steps)
    assert result.budgets == (request_.budget or 1.0,) * request_.steps


def test_images_that_share_batches_are_those_of_sample(model: Any, engine: Engine) -> None:
    for request, result in zip(REQUESTS * 3, results(engine, REQUESTS * 3), strict=True):
        expected = again(model, request, result)
        assert (result.sample - expected).abs().max() <= TOLERANCE * expected.abs().max()


def test_events_come_as_a_stream(model: Any, engine: Engine) -> None:
    async def collect() -> list[Event]:
        return [event async for event in engine.generate(Request(2, steps=6, previews=2))]

    *previews, last = asyncio.run(collect())
    assert [(event.step, event.steps) for event in previews if isinstance(event, Preview)] == [(2, 6), (4, 6)]
    assert isinstance(last, Finished) and last.sample.shape == (3, 8, 8)
    assert 0 <= last.queued <= last.latency
