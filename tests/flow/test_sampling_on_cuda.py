"""What a GPU gives is what the processor gives; run with ``pytest -m cuda`` where there is one."""

from typing import Any

import pytest
import torch
from torch import Tensor

import elit
from elit import Guidance
from elit.conditions import Text, map_condition
from elit.flow import SOLVERS, StepInfo
from tests.helpers.models import Recorder, inputs
from tests.helpers.stacks import KINDS

pytestmark = pytest.mark.cuda
every_kind = pytest.mark.parametrize("kind", KINDS)

# float32 on both sides, without TF32: 6e-8 a rounding, through some ten blocks of sums over up to 128 products.
FLOAT32 = 2e-5
# The times' sines and cosines are float32 on both sides and rounded apart: 1e-7 of them in a model that is float64.
FLOAT64 = 2e-6


@pytest.fixture(autouse=True)
def _exact_products() -> Any:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def on_gpu(given: Any) -> Any:
    if isinstance(given, list):
        return [stage.cuda() for stage in given]
    return None if given is None else map_condition(lambda tensor: tensor.cuda(), given)


def assert_near(found: Any, wanted: Any, tolerance: float) -> None:
    """Equal within a part of the largest value."""
    pairs = zip(found, wanted, strict=True) if isinstance(wanted, list) else [(found, wanted)]
    for on_device, on_processor in pairs:
        assert on_device.device.type == "cuda"
        bound = tolerance * on_processor.abs().max().item()
        torch.testing.assert_close(on_device.cpu(), on_processor, rtol=0, atol=bound)


def conditions(model: Any, y: Any) -> Any:
    """Without the null class; text with all its words."""
    if not model.conditional:
        return None
    return y._replace(mask=torch.ones_like(y.mask)) if isinstance(y, Text) else y.clamp(max=9)


@every_kind
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, FLOAT32), (torch.float64, FLOAT64)], ids=str)
def test_a_forward_is_that_of_the_processor(kind: str, dtype: torch.dtype, tolerance: float) -> None:
    """At one level and at several in a batch."""
    model = KINDS[kind]().to(dtype)
    x, t, y = inputs(model, 4, dtype=dtype)
    y = y if model.conditional else None
    levels: tuple[Any, ...] = (16, 4, [16, 4, 8, 4])
    with torch.no_grad():
        expected = [model(x, t, y, num_latents=each) for each in levels]
        model.cuda()
        for each, wanted in zip(levels, expected, strict=True):
            assert_near(model(on_gpu(x), t.cuda(), on_gpu(y), num_latents=each), wanted, tolerance)


@every_kind
@pytest.mark.parametrize("solver", SOLVERS)
def test_samples_are_those_of_the_processor(kind: str, solver: str) -> None:
    """The same seeds, given on the processor; every sample with its own budget, steps and guidance."""
    model = KINDS[kind]()
    y = conditions(model, inputs(model, 4)[2])
    guidance = [None, Guidance("ag", 2.0), Guidance("ag", 1.5), None]
    if y is not None:
        guidance[2:] = [Guidance("ccfg", 1.5), Guidance("cfg", 2.0)]
    told: dict[str, Any] = {"seeds": [3, 1, 4, 1], "steps": [3, 4, 3, 5], "solver": solver, "guidance": guidance}
    told["budget"] = torch.tensor([1.0, 0.5, 0.75, 0.25])
    expected = elit.sample(model, y, **told)
    model.cuda()
    assert_near(elit.sample(model, y, **told), expected, 10 * FLOAT32)  # guided steps add up
    assert_near(elit.sample(model, on_gpu(y), **told), expected, 10 * FLOAT32)


def test_the_same_seeds_start_from_the_same_noise_to_the_bit() -> None:
    def states(device: str) -> tuple[Tensor, list[StepInfo]]:
        model, seen = Recorder(lambda x, t, y, budget: 0 * x).to(device), []
        end = elit.sample(model, [1, 2], seeds=[7, 8], steps=3, solver="euler", callback=seen.append)
        return end.cpu(), seen

    (on_processor, _), (on_device, seen) = states("cpu"), states("cuda")
    assert torch.equal(on_device, on_processor)
    assert all(info.x.device.type == "cuda" for info in seen)


@pytest.mark.parametrize("kind", ["ELIT-DiT", "ELIT-MMDiT"])
def test_trajectories_advance_on_the_gpu(kind: str) -> None:
    model = KINDS[kind]().cuda()
    y = conditions(model, inputs(model, 2)[2])
    told: dict[str, Any] = {"seeds": [3, 4], "steps": [2, 4], "guidance": [None, Guidance("ccfg", 2.0)]}
    flight = elit.trajectories(model, y, **told)
    while not all(trajectory.is_done for trajectory in flight):
        elit.advance(model, flight)
    found = torch.cat([trajectory.samples() for trajectory in flight])
    expected = elit.sample(model, y, **told)
    torch.testing.assert_close(found, expected, rtol=0, atol=10 * FLOAT32 * expected.abs().max().item())


@every_kind
def test_bfloat16_is_near(kind: str) -> None:
    model = KINDS[kind]()
    x, t, y = inputs(model, 3)
    y = y if model.conditional else None
    with torch.no_grad():
        exact = model(x, t, y, num_latents=[16, 4, 8])
        model.cuda()
        with torch.autocast("cuda", torch.bfloat16):
            rough = model(on_gpu(x), t.cuda(), on_gpu(y), num_latents=[16, 4, 8])
    pairs = zip(rough, exact, strict=True) if isinstance(exact, list) else [(rough, exact)]
    for found, wanted in pairs:  # 2^-9 a rounding, through up to 8 blocks: a few per cent
        assert (found.float().cpu() - wanted).norm() < 0.08 * wanted.norm()
