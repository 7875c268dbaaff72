"""What diffusers offers for every model, on elastic ones: attention back ends, layerwise casting and offload."""

from typing import Any

import pytest
import torch

import elit
from tests.helpers.small_retrofits import FAMILIES, Family, make_base, predict, randomize_interface

pytest.importorskip("diffusers")
BUDGETS = (1.0, 0.25)


def named(*names: str) -> Any:
    chosen = [family for family in FAMILIES if not names or family.name in names]
    return pytest.mark.parametrize("family", chosen, ids=lambda family: family.name)


def elastic_of(family: Family) -> Any:
    return randomize_interface(elit.elastify(make_base(family))).eval()


@named("FLUX", "Qwen-Image", "Wan")
@torch.no_grad()
def test_attention_back_ends(family: Family) -> None:
    """Those of the families that can choose; another one changes the rounding alone."""
    elastic, inputs = elastic_of(family), family.inputs(2)
    before = [predict(elastic, inputs, budget=budget) for budget in BUDGETS]
    elastic.set_attention_backend("_native_math")
    assert {p._attention_backend for p in elastic.attn_processors.values()} == {"_native_math"}
    after = [predict(elastic, inputs, budget=budget) for budget in BUDGETS]
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@named()
@torch.no_grad()
def test_layerwise_casting_leaves_the_interface(family: Family) -> None:
    elastic, inputs = elastic_of(family), family.inputs(2)
    before = [predict(elastic, inputs, budget=budget) for budget in BUDGETS]
    elastic.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    stored = {name: parameter.dtype for name, parameter in elastic.named_parameters()}
    assert {dtype for name, dtype in stored.items() if name.startswith("elit.")} == {torch.float32}
    assert torch.bfloat16 in stored.values()
    for budget, expected in zip(BUDGETS, before, strict=True):
        found = predict(elastic, inputs, budget=budget)
        assert found.dtype == torch.float32
        assert (found - expected).square().mean() < 1e-3 * expected.square().mean()  # weights of 8 bits of precision


@pytest.mark.parametrize("how", ["block_level", "leaf_level"])
@named(*(family.name for family in FAMILIES if family.name != "DiT"))  # diffusers offers it for all others
@torch.no_grad()
def test_group_offload(family: Family, how: str) -> None:
    """Its hooks, on a processor: weights come and go, and the answer stays."""
    elastic, inputs = elastic_of(family), family.inputs(2)
    before = [predict(elastic, inputs, budget=budget) for budget in BUDGETS]
    cpu = torch.device("cpu")
    elastic.enable_group_offload(
        onload_device=cpu,
        offload_device=cpu,
        offload_type=how,
        num_blocks_per_group=1 if how == "block_level" else None,
    )
    for budget, expected in zip(BUDGETS, before, strict=True):
        assert torch.equal(predict(elastic, inputs, budget=budget), expected)
