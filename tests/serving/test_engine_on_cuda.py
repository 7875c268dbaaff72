"""The engine on a GPU: the images of `elit.sample`, also of a compiled model and with others in the batch."""

from typing import Any

import pytest
import torch

import elit
from elit.serving import Engine, EngineOptions, Finished, Request
from tests.helpers.models import tiny
from tests.serving.test_engine import results

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
TOLERANCE = 1e-3
"""Of the largest value: kernels of other batch sizes, and compiled ones, round differently."""


def check(model: Any, requests: list[Request], found: list[Finished]) -> None:
    for request, result in zip(requests, found, strict=True):
        budget = list(result.budgets)
        expected = elit.sample(model, request.labels(), seeds=[request.seed], steps=request.steps, budget=budget)[0]
        assert (result.sample - expected.cpu()).abs().max() <= TOLERANCE * expected.abs().max()


@pytest.mark.parametrize("compiled", [False, True])
def test_images_are_those_of_sample(compiled: bool) -> None:
    model, plain = tiny().cuda(), tiny().cuda()
    requests = [Request(i % 10, seed=i, steps=3 + i % 3, budget=(0.25, 0.5, 1.0)[i % 3]) for i in range(12)]
    with Engine(elit.compile(model) if compiled else model, EngineOptions(max_work=8)) as engine:
        check(plain, requests, results(engine, requests))
