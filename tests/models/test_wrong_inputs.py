"""What a user may get wrong at a model, a configuration or the sampler ends in one sentence."""

from typing import Any

import numpy as np
import pytest
import torch

import elit
from elit.errors import ElitError
from elit.flow import PyramidFlow, StageDensity, path_named
from elit.interface import InterfaceConfig
from elit.models import DiT, DiTConfig
from elit.seeding import generator
from tests.helpers.models import TINY, tiny


def forward(**changes: Any) -> Any:
    given = {"x": torch.randn(2, 3, 8, 8), "t": torch.rand(2), "y": torch.tensor([1, 2])} | changes
    return tiny()(given["x"], given["t"], given["y"], **{k: v for k, v in given.items() if k not in ("x", "t", "y")})


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"t": torch.rand(())}, r"t has shape \(\); .* \(2,\)"),
        ({"t": torch.rand(1)}, r"t has shape \(1,\)"),
        ({"t": torch.rand(3)}, r"t has shape \(3,\)"),
        ({"t": torch.rand(2, 1)}, r"t has shape \(2, 1\)"),
        ({"y": torch.tensor([1])}, "1 conditions for 2 samples"),
        ({"y": torch.tensor([[1], [2]])}, "conditions for 2 samples"),
        ({"budget": [1.0]}, "1 budgets for 2 samples"),
        ({"num_latents": [4]}, "1 numbers of latents for 2 samples"),
        ({"num_latents": [4, True]}, "whole number"),
        ({"num_latents": 5}, "num_latents is 5"),
        ({"num_latents": 0}, "num_latents is 0"),
        ({"num_latents": 2, "budget": 0.5}, "not both"),
    ],
)
def test_a_forward_tells_what_does_not_fit(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ElitError, match=told):
        forward(**changes)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"width": "abc"}, "width is 'abc'; it must be of type int"),
        ({"width": 64.0}, "width is 64.0; it must be of type int"),
        ({"width": -64}, "width is -64; it must be above 0"),
        ({"depth": True}, "depth is True; it must be of type int"),
        ({"levels": 4}, "levels is 4; it must be of type tuple"),
        ({"levels": [1, "4"]}, r"levels is \(1, '4'\); it must be of type tuple"),
        ({"levels": [1, 400]}, r"levels is \[1, 400\]"),
        ({"num_classes": -1}, "num_classes is -1; it must be at least 0"),
        ({"in_channels": 0}, "in_channels is 0; it must be above 0"),
        ({"mlp_ratio": -1}, "mlp_ratio is -1; it must be above 0"),
        ({"mlp_ratio": 1e-6}, "mlp_ratio is 1e-06, which leaves no hidden width"),
        ({"mlp_ratio": float("nan")}, "mlp_ratio is nan"),
        ({"rope_theta": 0}, "rope_theta is 0; it must be above 0"),
        ({"label_std": -0.1}, "label_std is -0.1; it must be at least 0"),
        ({"qk_norm": "yes"}, "qk_norm is 'yes'; it must be of type bool"),
        ({"positions": "none"}, "positions is 'none'; it must be of type Literal"),
        ({"variant": "mine"}, "variant is 'mine'; it must be of type Literal"),
        ({"interface": "paper"}, "interface is 'paper'; it must be of type"),
        ({"write_depth": 0}, "write_depth is 0; it must be at least 1"),
        ({"group_size": 0}, "size 0 is neither"),
        ({"patch_size": 0}, "size 0 is neither"),
        ({"input_size": [8, 8, 8, 8]}, "size .8, 8, 8, 8. is neither"),
        ({"resolution": 100}, "resolution 100 is not a positive multiple"),
        ({"resolution": "256"}, "resolution is '256' and downsample 8; they must be whole numbers"),
        ({"resolution": (256, 256, 256)}, "resolution of two"),
        ({"downsample": 0}, "downsample 0; they must be whole numbers"),
        ({"name": 3}, "no model is named 3"),
    ],
)
def test_a_new_model_tells_what_it_cannot_be(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ElitError, match=told) as caught:
        elit.create(**({"name": "ELIT-DiT-S/2"} | changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"seeds": [1.9, 2]}, "a seed is 1.9"),
        ({"seeds": ["1", "2"]}, "a seed is '1'"),
        ({"guidance": "cfg"}, "elit.Guidance"),
        ({"guidance": 4.0}, "elit.Guidance"),
        ({"cache": 0.1}, "elit.Cache"),
        ({"labels": torch.tensor([True, False])}, "whole numbers"),
        ({"steps": "many"}, "steps"),
        ({"steps": 0}, "at least 1"),
    ],
)
def test_the_sampler_tells_what_it_cannot_take(changes: dict[str, Any], told: str) -> None:
    given = {"labels": [1, 2], "steps": 2} | changes
    with pytest.raises(ElitError, match=told):
        elit.sample(tiny(), given.pop("labels"), **given)


def test_numbers_of_numpy_are_numbers() -> None:
    model, labels = tiny(), np.array([1, 2], dtype=np.int16)
    found = elit.sample(model, labels, seeds=np.arange(2), steps=np.int64(2))
    assert torch.equal(found, elit.sample(model, [1, 2], seeds=[0, 1], steps=2))
    assert elit.sample(model, labels, steps=list(np.array([2, 3]))).shape == found.shape


@pytest.mark.parametrize(
    ("interface", "told"),
    [
        ({"levels": (2.0, 4)}, "levels"),
        ({"levels": (True, 4)}, "levels"),
        ({"levels": ()}, "levels"),
        ({"variant": "publishd"}, "publishd"),
    ],
)
def test_an_interface_that_cannot_be_is_told(interface: dict[str, Any], told: str) -> None:
    with pytest.raises(ElitError, match=told):
        DiT(DiTConfig(**(TINY.__dict__ | {"interface": InterfaceConfig(group_size=2, **interface)})))


def test_positions_that_do_not_exist_are_told() -> None:
    with pytest.raises(ElitError, match="sincoss"):
        DiTConfig(**(TINY.__dict__ | {"positions": "sincoss"}))


@pytest.mark.parametrize("group_size", [2, (2, 2), (1, 2, 2)])
def test_every_form_of_a_window_survives_its_file(group_size: Any, tmp_path: Any) -> None:
    model = DiT(DiTConfig(**(TINY.__dict__ | {"interface": InterfaceConfig(group_size=group_size)})))
    model.save_pretrained(tmp_path)
    assert elit.load(tmp_path).levels == model.levels


def test_stages_and_their_weights_are_compared() -> None:
    flow = PyramidFlow([(3, 4, 4), (3, 8, 8), (3, 16, 16)], path_named("linear"), StageDensity([0.5, 0.5]))
    with pytest.raises(ElitError, match=r"stages\.weights lists 2, and the model has 3 stages"):
        flow.draw_times(2, generator(0))


def test_mixed_levels_are_traced_without_a_look_at_values() -> None:
    model = tiny()

    class Mixed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return self.model(x, t, y, num_latents=[4, 1, 4])

    given = (torch.randn(3, 3, 8, 8), torch.rand(3), torch.tensor([1, 2, 3]))
    exported = torch.export.export(Mixed(), given, strict=False).module()
    torch.testing.assert_close(exported(*given), model(*given, num_latents=[4, 1, 4]))
