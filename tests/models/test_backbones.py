"""What the interface promises, for every backbone."""

from operator import itemgetter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from elit import ElitError
from elit.conditions import Text, map_condition
from elit.interface import InterfaceConfig
from elit.models.mmdit import JointBlock
from tests.helpers.models import inputs
from tests.helpers.stacks import ELASTIC, tiny, video

every_backbone = pytest.mark.parametrize("name", ELASTIC)


def budgets(model: Any) -> list[float]:
    return [level / model.num_latents for level in model.levels]


@every_backbone
def test_levels_go_up_to_all_latents_and_each_is_another_function(name: str) -> None:
    model = tiny(name, input_size=16, interface=InterfaceConfig(4))
    assert model.num_latents == model.levels[-1] == 16
    x, t, y = inputs(model, 3)
    answers = [model(x, t, y, budget) for budget in budgets(model)]
    assert torch.equal(answers[-1], model(x, t, y))
    for i, a in enumerate(answers):
        assert a.shape == x.shape
        assert all((a - b).abs().max() > 1e-4 for b in answers[:i])


@every_backbone
def test_with_write_at_zero_a_model_is_its_head_and_tail(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every budget; the core does not show."""
    model = tiny(name)
    for layer in model.interface.write_layers:
        layer.init_weights()
    core = model.blocks[model.config.head_depth : model.config.depth - model.config.tail_depth]
    for block in core:
        if isinstance(block, JointBlock):  # text passes the core beside Read and Write; shut as in a new model
            block.text.modulation.init_weights()
    x, t, y = inputs(model, 3)
    head_and_tail = model(x, t, y)
    with monkeypatch.context() as patch:  # tokens go past the core, which sees nothing
        patch.setattr(model.interface, "read", lambda windows, *_: torch.zeros_like(windows))
        patch.setattr(model.interface, "write", lambda windows, _: windows)
        torch.testing.assert_close(
            model(x, t, y), head_and_tail, rtol=0, atol=1e-6
        )  # float32, as many latents as tokens
    with torch.no_grad():
        for weight in core.parameters():
            weight.mul_(1.5)
        model.interface.latents.add_(1)
    for budget in budgets(model):
        assert torch.equal(model(x, t, y, budget), head_and_tail)


@every_backbone
def test_the_answer_depends_on_the_latents_kept_and_on_no_others(name: str) -> None:
    model = tiny(name, input_size=16, interface=InterfaceConfig(4))
    x, t, y = inputs(model, 2)
    before = {level: model(x, t, y, level / 16) for level in model.levels}
    with torch.no_grad():
        model.interface.latents[8:] += 10
    for level, answer in before.items():
        assert torch.equal(model(x, t, y, level / 16), answer) == (level <= 8)


@every_backbone
@settings(max_examples=8)
@given(order=st.permutations(range(4)), which=st.sampled_from([0, -1]))
def test_windows_that_trade_places_trade_answers(name: str, order: list[int], which: int) -> None:
    """Without positions between windows the model cannot tell which is which."""
    model = tiny(name).double()
    model.spatial_rope = model.interface.core_rope = lambda *_: None
    x, t, y = inputs(model, 2, dtype=torch.float64)

    def shuffled(x: Tensor) -> Tensor:
        windows = x.unflatten(3, (2, 4)).unflatten(2, (2, 4)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)[:, order]
        return windows.unflatten(1, (2, 2)).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)

    # float64; sums over the keys in another order
    level = model.levels[which]
    found, expected = (model(shuffled(x), t, y, num_latents=level), shuffled(model(x, t, y, num_latents=level)))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)


@every_backbone
@pytest.mark.parametrize("elastic", [True, False])
def test_samples_do_not_see_each_other(name: str, elastic: bool) -> None:
    model = (tiny(name) if elastic else tiny(name, interface=None)).double()
    x, t, y = inputs(model, 3, dtype=torch.float64)
    together = model(x, t, y)
    for i in range(3):
        one = slice(i, i + 1)
        # float64; a batch of one sums in another order
        alone = model(x[one], t[one], map_condition(itemgetter(one), y))
        torch.testing.assert_close(alone, together[one], rtol=0, atol=1e-11)


@every_backbone
@pytest.mark.parametrize("size", [(8, 12), (16, 16), (4, 20)])
@pytest.mark.parametrize("elastic", [True, False])
def test_other_resolutions_than_that_of_training(name: str, size: tuple[int, int], elastic: bool) -> None:
    """Sides that differ, too: what a model built for that size answers."""
    changes = {} if elastic else {"interface": None}
    model, native = tiny(name, **changes), tiny(name, input_size=size, **changes)
    native.load_state_dict(model.state_dict())
    x, t, y = inputs(native, 2)
    for level in model.levels if elastic else (0,):
        assert torch.equal(model(x, t, y, num_latents=level), native(x, t, y, num_latents=level))


@every_backbone
def test_video_has_windows_in_time(name: str) -> None:
    model = video(name)
    x, t, y = inputs(model, 2)
    assert model.num_latents == 16
    full = model(x, t, y)
    assert full.shape == x.shape == (2, 3, 4, 8, 8)
    later = x.clone()
    later[:, :, 3] += 1
    assert (model(later, t, y)[:, :, 0] - full[:, :, 0]).abs().max() > 1e-4  # frames see each other
    assert (model(x, t, y, 0.25) - full).abs().max() > 1e-4


@every_backbone
@pytest.mark.parametrize("elastic", [True, False])
def test_every_weight_has_a_gradient(name: str, elastic: bool) -> None:
    model = (tiny(name) if elastic else tiny(name, interface=None)).train()
    x, t, y = inputs(model, 11)
    y = torch.arange(11) if model.config.num_classes else y  # every label, the null class included
    model(x, t, y).square().sum().backward()
    for weight_name, weight in model.named_parameters():
        assert weight.grad is not None, weight_name
        assert weight.grad.flatten(1).any(1).all() if weight.dim() > 1 else weight.grad.any(), weight_name


@every_backbone
def test_a_forward_reads_no_value(name: str) -> None:
    """On the meta device there are none: whatever looked at one would fail."""
    model = tiny(name).to("meta")
    x, t, y = (map_condition(lambda value: value.to("meta"), each) for each in inputs(model, 3))
    for each in (x, torch.cat((x, x), dim=-1)):
        assert model(each, t, y, num_latents=model.levels[0]).shape == each.shape
        assert model(each, t, y, num_latents=[4, model.levels[0], 4]).shape == each.shape


@every_backbone
def test_bfloat16_is_near(name: str) -> None:
    model = tiny(name)
    x, t, y = inputs(model, 2)
    exact = model(x, t, y)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(x, t, y)
    rough = model.bfloat16()(x.bfloat16(), t, y._replace(tokens=y.tokens.bfloat16()) if isinstance(y, Text) else y)
    for answer in (mixed, rough):  # 2^-9 a rounding, through 8 blocks: a few per cent
        assert (answer.float() - exact).norm() < 0.08 * exact.norm()


@every_backbone
def test_a_new_model_answers_zero(name: str) -> None:
    model = tiny(name)
    fresh = type(model)(model.config)
    assert not fresh(*inputs(fresh, 2)).any()


@every_backbone
@pytest.mark.parametrize("elastic", [True, False])
def test_on_disk_and_back(name: str, elastic: bool, tmp_path: Any) -> None:
    model = tiny(name) if elastic else tiny(name, interface=None)
    model.save_pretrained(tmp_path / "model")
    loaded = type(model).from_pretrained(tmp_path / "model")
    assert type(loaded) is type(model)
    assert loaded.config == model.config
    x, t, y = inputs(model, 2)
    assert torch.equal(loaded(x, t, y), model(x, t, y))


@pytest.mark.parametrize("name", [name for name in ELASTIC if name != "ELIT-DiT"])
def test_the_published_layout_has_no_place_for_it(name: str, tmp_path: Any) -> None:
    from elit.models.published import save_published

    with pytest.raises(ElitError, match=f"it is a {type(tiny(name)).__name__}"):
        save_published(tiny(name), tmp_path / "model.pt")


@pytest.mark.parametrize("positions", ["rotary", "sincos"])
def test_a_grid_first_seen_without_gradients_can_be_trained_on(positions: Any) -> None:
    """Its tables of positions are remembered, and must not be tensors of inference mode."""
    model = tiny("ELIT-DiT", positions=positions, rope_theta=77.0 if positions == "rotary" else 78.0)
    x, t, y = torch.randn(2, model.config.in_channels, 8, 32), torch.rand(2), torch.tensor([1, 2])
    with torch.inference_mode():
        first = model(x, t, y)
    again = model(x, t, y)
    again.square().sum().backward()
    assert torch.equal(again, first)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
