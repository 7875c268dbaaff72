"""Anchored latents: they begin as tokens of their window and return to their places."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

import elit
from elit import ElitError
from elit.interface import InterfaceConfig, LatentInterface
from elit.interface.anchors import spread_order
from elit.interface.latent import latent_positions
from elit.models import Model
from tests.helpers.models import randomize

FIELDS = {"in_channels": 2, "num_classes": 5, "width": 32, "depth": 4, "num_heads": 2}


def pair(backbone: str = "DiT-S/1", resolution: int = 8, **fields: object) -> tuple[Model, Model]:
    """An anchored model whose Read and Write are still closed, and the plain model of the same other weights."""
    common = {**FIELDS, **fields, "resolution": resolution, "downsample": 1}
    split = {"head_depth": 1, "tail_depth": 1, "group_size": 4, "variant": "anchored"}
    plain = randomize(elit.create(backbone, **common), seed=3).double()
    anchored = elit.create(f"ELIT-{backbone}", **common, **split).double()
    anchored.load_state_dict(anchored.state_dict() | plain.state_dict())
    return anchored.eval(), plain.eval()


def given(resolution: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(3, 2, resolution, resolution, generator=draws, dtype=torch.float64)
    return x, torch.rand(3, generator=draws, dtype=torch.float64), torch.tensor([0, 2, 4])


@pytest.mark.parametrize("resolution", [8, 16], ids=["grid of training", "another grid"])
def test_at_full_budget_it_begins_as_the_plain_transformer(resolution: int) -> None:
    """The core meets the same tokens at the same positions, in another order, and Write puts them back."""
    anchored, plain = pair()
    torch.testing.assert_close(anchored(*given(resolution)), plain(*given(resolution)), rtol=0, atol=1e-12)
    assert (anchored(*given(resolution), budget=0.5) - plain(*given(resolution))).abs().max() > 1e-3


def test_dropped_tokens_stay_and_kept_ones_become_their_latents() -> None:
    interface = LatentInterface(InterfaceConfig(2, variant="anchored"), 16, 2, (1, 4, 4), 100.0).double()
    windows, c = torch.randn(2, 4, 4, 16).double(), torch.randn(2, 16).double()
    for level in (1, 2, 3, 4):
        latents = interface.read(windows, c, level)
        kept = spread_order((1, 2, 2))[:level].tolist()
        for j, place in enumerate(kept):  # Read is closed
            torch.testing.assert_close(latents[:, :, j], windows[:, :, place], rtol=0, atol=0)
        written = interface.write(windows, latents + 1)
        for place in range(4):
            expected = windows[:, :, place] + (1 if place in kept else 0)
            torch.testing.assert_close(written[:, :, place], expected, rtol=0, atol=0)


def test_fewer_latents_are_a_prefix_of_more() -> None:
    interface = randomize(LatentInterface(InterfaceConfig(4, variant="anchored"), 16, 2, (1, 8, 8), 100.0)).double()
    windows, c = torch.randn(2, 4, 16, 16).double(), torch.randn(2, 16).double()
    full = interface.read(windows, c, 16)
    for level in (1, 5, 11):
        torch.testing.assert_close(interface.read(windows, c, level), full[:, :, :level], rtol=0, atol=1e-13)


def test_latents_of_the_core_stand_where_their_tokens_do() -> None:
    interface = LatentInterface(InterfaceConfig((1, 2, 2), variant="anchored"), 16, 2, (2, 4, 4), 100.0)
    grid = interface.grid
    places = latent_positions(grid, grid.axes, 4, anchored=True)
    assert sorted(places.tolist()) == [[t, y, x] for t in range(2) for y in range(4) for x in range(4)]
    first_window = places[:4].tolist()
    assert {tuple(place) for place in first_window} == {(0, y, x) for y in (0, 1) for x in (0, 1)}


def test_spread_tokens_are_far_from_each_other() -> None:
    """Of a window of 4x4, four tokens form a grid of every second one: windows repeat."""
    kept = sorted(divmod(int(place), 4) for place in spread_order((1, 4, 4))[:4])
    rows, columns = zip(*kept, strict=True)
    assert len(set(kept)) == 4
    assert all(len({value % 2 for value in axis}) == 1 or len(set(axis)) == 4 for axis in (rows, columns))


def test_gradients_are_those_of_finite_differences() -> None:
    interface = randomize(LatentInterface(InterfaceConfig(2, variant="anchored"), 8, 2, (1, 2, 2), 100.0)).double()
    windows, c = torch.randn(1, 1, 4, 8).double().requires_grad_(), torch.randn(1, 8).double()
    assert gradcheck(lambda w: interface.write(w, interface.read(w, c, 2).tanh()), (windows,))


@pytest.mark.parametrize("backbone", ["DiT-S/1", "UViT-S/1", "HDiT-S/1"])
def test_every_backbone_samples_at_its_budgets_and_loads_again(backbone: str, tmp_path: Path) -> None:
    split = {"head_depth": 1, "tail_depth": 1, "group_size": 4, "variant": "anchored"}
    fields = FIELDS | split | ({"inner_depth": 2} if "HDiT" in backbone else {})
    model = randomize(elit.create(f"ELIT-{backbone}", resolution=16, downsample=1, **fields)).eval()
    model.save_pretrained(tmp_path)
    loaded = elit.load(tmp_path)
    for level in (model.levels[0], model.num_latents // 2, model.num_latents):
        settings = {"steps": 2, "budget": level / model.num_latents, "seeds": [0, 1]}
        images = elit.sample(model, [1, 2], **settings)
        assert images.isfinite().all()
        torch.testing.assert_close(elit.sample(loaded, [1, 2], **settings), images, rtol=0, atol=0)


def test_a_model_built_without_gradients_leaves_later_ones_alone() -> None:
    """What windows have in common is remembered, and must serve training whoever asked for it first."""
    spread_order.cache_clear()
    with torch.inference_mode():
        pair()
    anchored, _ = pair()
    anchored(*given(), budget=0.5).square().mean().backward()


def test_a_visible_tail_is_refused() -> None:
    with pytest.raises(ElitError, match="tail_visible is for latents that are no tokens"):
        InterfaceConfig(variant="anchored", tail_visible=True)
