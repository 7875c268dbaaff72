"""Elastic versions of diffusers transformers: their start, budgets, gradients, files, adapters and refusals."""

from pathlib import Path
from typing import Any

import pytest
import torch

import elit
from elit.interface.retrofit import carry_weights, spread_order
from tests.helpers.small_retrofits import (
    FAMILIES,
    Family,
    dit,
    flux,
    flux_inputs,
    make_base,
    predict,
    qwen,
    qwen_inputs,
    randomize_interface,
    sd3_inputs,
    wan_inputs,
)

diffusers = pytest.importorskip("diffusers")

ADAPTER = "pytorch_lora_weights.safetensors"

each_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


def family_named(name: str) -> Family:
    return next(family for family in FAMILIES if family.name == name)


def inputs_of(family: Family, batch: int = 2) -> dict[str, Any]:
    torch.manual_seed(2)
    return family.inputs(batch)


# ------------------------------------------------------------------------------------------------ the start


@each_family
@torch.no_grad()
def test_at_full_budget_a_new_elastic_model_answers_what_its_base_answers(family: Family) -> None:
    base = make_base(family)
    elastic, inputs = elit.elastify(base), inputs_of(family)
    assert isinstance(elastic, type(base))
    full = predict(base, inputs)
    assert torch.equal(predict(elastic, inputs), full)
    assert torch.equal(predict(elastic, inputs, budget=1.0), full)
    half, eighth = predict(elastic, inputs, budget=0.5), predict(elastic, inputs, budget=0.125)
    assert 0 < (half - full).square().mean() < (eighth - full).square().mean() < full.square().mean()


@torch.no_grad()
def test_the_start_of_the_paper_begins_as_head_and_tail() -> None:
    base = make_base(family_named("DiT"))
    elastic, inputs = elit.elastify(base, start="paper"), inputs_of(family_named("DiT"))
    base.transformer_blocks = torch.nn.ModuleList([base.transformer_blocks[0], base.transformer_blocks[-1]])
    for budget in (1.0, 0.25):
        assert torch.equal(predict(elastic, inputs, budget=budget), predict(base, inputs))


@torch.no_grad()
def test_the_base_stays_as_it_was_and_shares_its_weights() -> None:
    base = make_base(family_named("SD3"))
    inputs = inputs_of(family_named("SD3"))
    before = predict(base, inputs)
    elastic = randomize_interface(elit.elastify(base))
    assert type(base) is diffusers.SD3Transformer2DModel
    assert torch.equal(predict(base, inputs), before)
    assert base.proj_out.weight is elastic.proj_out.weight
    assert not torch.equal(predict(elastic, inputs), before)


def test_the_first_tokens_of_windows_lie_evenly_in_the_grid() -> None:
    """Of windows of 4x4, the first 4 tokens are every other one along both axes, and the first 8 a chessboard."""
    order = spread_order((1, 4, 4))
    assert sorted(order.tolist()) == list(range(16))
    rows, columns = order // 4, order % 4
    assert len({(int(r) % 2, int(c) % 2) for r, c in zip(rows[:4], columns[:4], strict=True)}) == 1
    assert len({(int(r) + int(c)) % 2 for r, c in zip(rows[:8], columns[:8], strict=True)}) == 1


def test_a_dropped_token_moves_like_kept_ones_near_it() -> None:
    places = torch.tensor([[0, 0], [0, 1], [0, 2], [0, 3]])
    weights = carry_weights(places, torch.tensor([0, 3]))
    torch.testing.assert_close(weights[1], torch.tensor([0.8, 0.2]))  # distances 1 and 2: 1 to 1/4
    torch.testing.assert_close(weights.sum(1), torch.ones(4))


# ------------------------------------------------------------------------------------------------ budgets


@each_family
@torch.no_grad()
def test_a_budget_comes_by_argument_by_attention_arguments_or_beforehand(family: Family) -> None:
    elastic, inputs = randomize_interface(elit.elastify(make_base(family))), inputs_of(family)
    half = predict(elastic, inputs, budget=0.5)
    level = elastic.num_latents // 2
    assert torch.equal(predict(elastic, inputs, num_latents=level), half)
    assert torch.equal(predict(elastic, inputs, **{elastic.attention_arguments: {"budget": 0.5}}), half)
    elastic.set_budget(0.5)
    assert torch.equal(predict(elastic, inputs), half)
    elastic.set_budget(elit.BudgetByNoise([0.6], [1.0, 0.5]))  # the inputs are at t = 0.5
    assert torch.equal(predict(elastic, inputs), half)
    elastic.set_budget(None)
    assert not torch.equal(predict(elastic, inputs), half)


@pytest.mark.parametrize(("name", "weak_half"), [("DiT", 1), ("PixArt", 0), ("SD3", 0)])
@torch.no_grad()
def test_the_weak_half_of_a_guided_batch_has_its_own_budget(name: str, weak_half: int) -> None:
    family = family_named(name)
    elastic, inputs = randomize_interface(elit.elastify(make_base(family))), inputs_of(family, 4)
    full, low = predict(elastic, inputs), predict(elastic, inputs, budget=0.125)
    elastic.set_budget(1.0, weak=0.125)
    mixed = predict(elastic, inputs).chunk(2)
    # halves of a batch run alone: sums of floats in another order
    torch.testing.assert_close(mixed[weak_half], low.chunk(2)[weak_half], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mixed[1 - weak_half], full.chunk(2)[1 - weak_half], atol=1e-5, rtol=1e-5)
    with pytest.raises(elit.ElitError, match="no weak half"):
        predict(elastic, inputs_of(family, 3))


@pytest.mark.parametrize("name", ["FLUX", "Qwen-Image", "Wan"])
@torch.no_grad()
def test_the_weak_term_of_guidance_is_known_by_its_cache_context(name: str) -> None:
    family = family_named(name)
    elastic, inputs = randomize_interface(elit.elastify(make_base(family))), inputs_of(family)
    full, low = predict(elastic, inputs), predict(elastic, inputs, budget=0.125)
    elastic.set_budget(1.0, weak=0.125)
    with elastic.cache_context("cond"):
        assert torch.equal(predict(elastic, inputs), full)
    with elastic.cache_context("uncond"):
        assert torch.equal(predict(elastic, inputs), low)
    assert torch.equal(predict(elastic, inputs), full)


# ------------------------------------------------------------------------------------------------ training


@each_family
def test_gradients_are_those_of_finite_differences(family: Family) -> None:
    """Along a random direction of all weights, in float64."""
    elastic = randomize_interface(elit.elastify(make_base(family))).double()
    inputs = {
        name: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in inputs_of(family).items()
    }

    def loss() -> torch.Tensor:
        return predict(elastic, inputs, budget=0.5).square().mean()

    loss().backward()
    with torch.no_grad():
        weights = [weight for weight in elastic.parameters() if weight.grad is not None]
        assert all(weight.grad is not None for weight in elastic.elit.parameters())
        directions = [torch.randn_like(weight) for weight in weights]
        slope = sum((weight.grad * d).sum() for weight, d in zip(weights, directions, strict=True))
        values = []
        for step in (1e-6, -2e-6):
            for weight, direction in zip(weights, directions, strict=True):
                weight.add_(step * direction)
            values.append(loss())
    # Wan computes its norms in float32, whatever its weights are
    tolerance = 3e-3 if family.name == "Wan" else 1e-4
    torch.testing.assert_close(slope, (values[0] - values[1]) / 2e-6, rtol=tolerance, atol=1e-9)


@each_family
def test_gradient_checkpointing_changes_nothing(family: Family) -> None:
    elastic, inputs = randomize_interface(elit.elastify(make_base(family))), inputs_of(family)
    gradients = []
    for _ in range(2):
        elastic.zero_grad()
        predict(elastic, inputs, budget=0.25).square().mean().backward()
        gradients.append({name: w.grad.clone() for name, w in elastic.named_parameters() if w.grad is not None})
        elastic.enable_gradient_checkpointing()
    plain, checkpointed = gradients
    assert plain.keys() == checkpointed.keys()
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)


# ------------------------------------------------------------------------------------------------ files, adapters


@each_family
@torch.no_grad()
def test_saved_and_loaded_it_answers_the_same(family: Family, tmp_path: Path) -> None:
    base = make_base(family)
    elastic, inputs = randomize_interface(elit.elastify(base, read_after=1, write_after=2)), inputs_of(family)
    elastic.save_pretrained(tmp_path)
    again = type(elastic).from_pretrained(tmp_path)
    assert again.config["read_after"] == 1 and again.config["write_after"] == 2 and again.config["start"] == "base"
    assert torch.equal(predict(again, inputs, budget=0.5), predict(elastic, inputs, budget=0.5))
    # beside the interface, weights have the names of the base
    assert {name for name in elastic.state_dict() if not name.startswith("elit.")} == base.state_dict().keys()


def test_the_base_is_no_elastic_model(tmp_path: Path) -> None:
    base = make_base(family_named("SD3"))
    base.save_pretrained(tmp_path)
    kind = type(elit.elastify(base))
    with pytest.raises(elit.ElitError, match=r"holds a SD3Transformer2DModel.*elastify"):
        kind.from_pretrained(tmp_path)


def test_a_damaged_folder_is_told(tmp_path: Path) -> None:
    elastic = elit.elastify(dit())
    elastic.save_pretrained(tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    for folder in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(elit.ElitError, match="cannot load an elastic model from"):
            type(elastic).from_pretrained(folder)


@pytest.mark.parametrize("name", ["SD3", "FLUX", "Qwen-Image", "Wan"])
@torch.no_grad()
def test_an_adapter_of_the_base_fits_and_one_of_the_elastic_model_comes_back(name: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    family = family_named(name)
    inputs, config = inputs_of(family), peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    adapted = make_base(family)
    adapted.add_adapter(config, "style")
    adapted.save_lora_adapter(tmp_path / "base", "style")
    elastic = elit.elastify(make_base(family))
    elastic.load_lora_adapter(tmp_path / "base", prefix=None, weight_name=ADAPTER, adapter_name="style")
    assert torch.equal(predict(elastic, inputs), predict(adapted, inputs))

    elastic.save_lora_adapter(tmp_path / "elastic", "style")
    again = elit.elastify(make_base(family))
    again.elit.load_state_dict(elastic.elit.state_dict())
    again.load_lora_adapter(tmp_path / "elastic", prefix=None, weight_name=ADAPTER, adapter_name="style")
    assert torch.equal(predict(again, inputs, budget=0.5), predict(elastic, inputs, budget=0.5))


# ------------------------------------------------------------------------------------------------ compiling


@pytest.mark.slow
@pytest.mark.parametrize("name", ["DiT", "SD3", "FLUX", "Wan"])
@torch.no_grad()
def test_two_graphs_serve_all_budgets(name: str) -> None:
    """Windows of 16 latents; the lowest level of all, one latent, would be a third: a size of one is none to vary."""
    family = family_named(name)
    inputs = inputs_of(family)
    elastic = randomize_interface(elit.elastify(make_base(family), group_size=(1, 4, 4)))
    levels = (16, 8, 12, 4, 2)
    expected = [predict(elastic, inputs, num_latents=level) for level in levels]
    torch._dynamo.reset()
    graphs = 0

    def count(graph: torch.fx.GraphModule, example: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph

    elastic.compile(backend=count, fullgraph=True)
    for level, answer in zip(levels, expected, strict=True):
        torch.testing.assert_close(predict(elastic, inputs, num_latents=level), answer, atol=1e-5, rtol=1e-5)
    assert graphs == 2


# ------------------------------------------------------------------------------------------------ refusals


def refusal(message: str) -> Any:
    return pytest.raises(elit.ElitError, match=message)


def test_what_cannot_be_made_elastic_is_named() -> None:
    sana = diffusers.SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=16, cross_attention_dim=32, caption_channels=8,
        sample_size=8,
    )  # fmt: skip
    with refusal("SanaTransformer2DModel cannot be made elastic: its blocks mix.*take one of DiT"):
        elit.elastify(sana)
    with refusal("Linear cannot be made elastic; take one of DiT"):
        elit.elastify(torch.nn.Linear(2, 2))
    with refusal("elastic already"):
        elit.elastify(elit.elastify(dit()))
    cached = flux()
    cached.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))
    with refusal("has hooks, of offload or a cache; make it elastic first"):
        elit.elastify(cached)
    with refusal("edits pictures"):
        elit.elastify(diffusers.QwenImageTransformer2DModel(**{**qwen().config, "zero_cond_t": True}))


def test_wrong_settings_are_told() -> None:
    base = dit()
    with refusal("read_after is 3 and write_after 2; of 4 blocks"):
        elit.elastify(base, read_after=3, write_after=2)
    with refusal("min_latents is 17"):
        elit.elastify(base, min_latents=17)
    with refusal("no start is named 'zero'"):
        elit.elastify(base, start="zero")
    with refusal("size"):
        elit.elastify(base, group_size=0)
    elastic, inputs = elit.elastify(base, group_size=3), inputs_of(family_named("DiT"))
    with refusal("group size 3 does not divide the 8 tokens.*or another size of the picture"):
        predict(elastic, inputs)


def test_wrong_budgets_are_told() -> None:
    elastic, inputs = elit.elastify(dit(), min_latents=4), inputs_of(family_named("DiT"))
    for budget in (0.0, 1.5, -1.0, float("nan")):
        with refusal("budget"):
            predict(elastic, inputs, budget=budget)
        with refusal("budget"):
            elastic.set_budget(budget)
    with refusal("take at least 0.25"):
        elastic.set_budget(0.1)
    with refusal("num_latents is 3"):
        predict(elastic, inputs, num_latents=3)
    with refusal("not both"):
        predict(elastic, inputs, num_latents=4, budget=0.25)


def test_inputs_that_do_not_fit_latents_are_named() -> None:
    sd3 = elit.elastify(make_base(family_named("SD3")))
    residuals = [torch.zeros(2, 64, 32)]
    with refusal("takes no block_controlnet_hidden_states: residuals of a ControlNet"):
        predict(sd3, sd3_inputs(2), block_controlnet_hidden_states=residuals)
    with refusal("takes no skip_layers"):
        predict(sd3, sd3_inputs(2), skip_layers=[2])
    edited = flux_inputs(2)
    edited["img_ids"] = torch.cat((edited["img_ids"], edited["img_ids"]))
    edited["hidden_states"] = torch.cat((edited["hidden_states"], edited["hidden_states"]), dim=1)
    with refusal("takes one picture"):
        predict(elit.elastify(flux()), edited)
    with refusal("takes one picture, not 2"):
        predict(elit.elastify(qwen()), qwen_inputs(2) | {"img_shapes": [[(1, 4, 12), (1, 4, 12)]] * 2})
    with refusal("one time for all tokens"):
        predict(elit.elastify(make_base(family_named("Wan"))), wan_inputs(2) | {"timestep": torch.zeros(2, 288)})
