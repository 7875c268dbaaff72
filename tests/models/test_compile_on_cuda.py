"""What compiled layers and CUDA graphs give is what the plain model gives; run with ``pytest -m cuda``."""

from typing import Any

import pytest
import torch

import elit
from elit import Cache, Guidance
from elit.conditions import Text
from elit.models.graphs import GraphedForward
from tests.helpers.models import inputs
from tests.helpers.stacks import KINDS

pytestmark = pytest.mark.cuda
every_kind = pytest.mark.parametrize("kind", KINDS)
SIZES = [2, 4]


def conditions(model: Any, y: Any) -> Any:
    """Without the null class; text with all its words."""
    if not model.conditional:
        return None
    return y._replace(mask=torch.ones_like(y.mask)) if isinstance(y, Text) else y.clamp(max=9)


@every_kind
@pytest.mark.parametrize("compiled", [False, True], ids=["graphs", "graphs and compiled layers"])
def test_samples_are_those_of_the_plain_model(kind: str, compiled: bool) -> None:
    """At several levels, with every kind of guidance, caching, and batches that graphs are padded for. Twice, for the
    first run captures and the second replays."""
    model, twin = KINDS[kind]().cuda(), KINDS[kind]().cuda()
    if compiled:
        elit.compile(twin, batch_sizes=SIZES)
    else:
        GraphedForward(twin, SIZES).install()
    y = conditions(model, inputs(model, 5)[2])
    guidance: list[Any] = [None, Guidance("ag", 2.0, 0.25), None, Guidance("ag", 1.5, 0.5), None]
    if y is not None:
        guidance[2:4] = [Guidance("cfg", 2.0), Guidance("ccfg", 1.5, 0.25)]
    told: dict[str, Any] = {"seeds": range(5), "steps": 4, "budget": torch.tensor([1.0, 0.5, 0.25, 1.0, 0.5])}
    for cache in (None, Cache(0.5, order=1)):
        expected = elit.sample(model, y, guidance=guidance, cache=cache, **told)
        for _ in range(2):
            found = elit.sample(twin, y, guidance=guidance, cache=cache, **told)
            # float32, 6e-8 a rounding, through some ten blocks and four guided steps
            torch.testing.assert_close(found, expected, rtol=0, atol=2e-4 * expected.abs().max().item())


def test_bfloat16_is_captured_too() -> None:
    model, twin = (KINDS["ELIT-DiT"]().to("cuda", torch.bfloat16) for _ in range(2))
    elit.compile(twin, batch_sizes=SIZES)
    expected, found = (elit.sample(each, [1, 2, 3], steps=4, budget=0.5) for each in (model, twin))
    assert (found - expected).norm() < 0.08 * expected.norm()  # 2^-9 a rounding, through up to 8 blocks


def test_a_step_does_not_wait_for_the_gpu() -> None:
    """Once begun, evaluations with every kind of guidance launch work and never synchronise."""
    model = KINDS["ELIT-DiT"]().cuda()
    guidance = [None, Guidance("cfg", 2.0), Guidance("ccfg", 2.0), Guidance("ag", 2.0)]
    told: dict[str, Any] = {"steps": 3, "budget": torch.tensor([1.0, 0.5, 0.25, 1.0]), "guidance": guidance}
    flight = elit.trajectories(model, [1, 2, 3, 4], **told)
    elit.advance(model, flight)
    torch.cuda.set_sync_debug_mode("error")
    try:
        elit.advance(model, flight)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_weights_may_change_in_place_under_a_graph() -> None:
    model = elit.compile(KINDS["ELIT-DiT"]().cuda(), batch_sizes=SIZES)
    before = elit.sample(model, [1, 2], steps=2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    plain = KINDS["ELIT-DiT"]().cuda()
    plain.load_state_dict(model.state_dict())
    after, expected = elit.sample(model, [1, 2], steps=2), elit.sample(plain, [1, 2], steps=2)
    assert not torch.equal(after, before)
    torch.testing.assert_close(after, expected, rtol=0, atol=2e-4 * expected.abs().max().item())
