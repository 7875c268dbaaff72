"""The closed form of the cost against what PyTorch counts. Both are whole numbers, so they must be equal."""

from dataclasses import replace
from typing import Any

import pytest

from elit.analysis import closed_form, count_flops, on_meta
from elit.interface import InterfaceConfig
from elit.models import DFMConfig, DiTConfig, HDiTConfig, MMDiTConfig, UViTConfig, config_for
from elit.models.registry import FAMILIES
from tests.helpers.models import TINY


def formula(config: DiTConfig, num_latents: int | None = None) -> int:
    return 2 * sum(part.macs for part in closed_form(config, num_latents))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("elit", ["", "ELIT-"])
def test_named_models(family: str, elit: str) -> None:
    """The other sizes and patches: benchmarks/closed_form.py, which takes minutes."""
    for resolution, lowest in ((256, False), (512, True)):
        config = config_for(f"{elit}{family}-S/2", resolution)
        model = on_meta(config)
        budget = model.levels[0] / model.num_latents if lowest and elit else None
        counted = count_flops(model, budget)
        assert formula(config, counted.num_latents) == counted.flops


VIDEO = {"input_size": (4, 8, 8), "patch_size": (1, 2, 2), "interface": InterfaceConfig((2, 2, 4))}


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        (DiTConfig, {"mlp_ratio": 3.3, "num_classes": 0}),
        (DiTConfig, {"interface": InterfaceConfig(2, write_depth=3)}),
        (DiTConfig, {"interface": InterfaceConfig(2, variant="published")}),
        (DiTConfig, {"interface": InterfaceConfig(2, variant="published", tail_visible=True, write_depth=2)}),
        (DiTConfig, {"interface": InterfaceConfig(2, tail_visible=True)}),
        (DiTConfig, {"input_size": (8, 16), "patch_size": (2, 4), "interface": InterfaceConfig((1, 2, 4))}),
        (DiTConfig, VIDEO),
        (DiTConfig, {"head_depth": 0, "tail_depth": 0}),
        (UViTConfig, {"depth": 9, "head_depth": 1, "tail_depth": 1}),
        (UViTConfig, {"depth": 8, "head_depth": 2, "tail_depth": 3}),
        (UViTConfig, {"depth": 8, "interface": None}),
        (HDiTConfig, {"depth": 7, "inner_depth": 3}),
        (HDiTConfig, {"inner_depth": 2}),
        (HDiTConfig, {"depth": 6, "inner_depth": 4, "interface": None, "mlp_ratio": 2}),
        (MMDiTConfig, {"num_classes": 0, "text_width": 24, "tail_depth": 0}),
        (MMDiTConfig, {"num_classes": 0, "text_width": 24, "interface": None}),
        (DFMConfig, {"input_size": 16, "patch_size": 4, "stages": 3}),
    ],
)
def test_any_configuration(config: type[DiTConfig], changes: dict[str, Any]) -> None:
    fitted = config(**(TINY.__dict__ | changes))
    model = on_meta(fitted)
    for budget in (model.levels[len(model.levels) // 2 - 1] / model.num_latents, 1.0) if model.levels else (None,):
        counted = count_flops(model, budget)
        assert formula(fitted, counted.num_latents) == counted.flops


def test_a_block_costs_what_the_paper_says() -> None:
    """One more block of N tokens: 8 N d^2 + 16 N d^2 for the layers, 4 N^2 d for attention, 12 d^2 for modulation."""
    shallow = replace(config_for("DiT-B/2"), depth=3)
    n, d = 256, 768
    expected = 8 * n * d**2 + 16 * n * d**2 + 4 * n**2 * d + 12 * d**2
    deep = replace(shallow, depth=4)
    assert formula(deep) - formula(shallow) == expected == (count_flops(on_meta(deep)).flops - formula(shallow))


def test_parts_are_those_of_the_picture() -> None:
    parts = closed_form(config_for("ELIT-DiT-XL/2"), 4)
    assert [part.name for part in parts] == ["embed", "head", "Read", "core", "Write", "tail", "project"]
    assert [part.tokens for part in parts] == [256, 256, 256, 64, 256, 256, 256]
    read, write, d, n, k = parts[2].macs, parts[4].macs, 1152, 256, 64
    layers = d**2 * (2 * n + 2 * k) + 2 * 4 * n * d  # the paper's d^2 (4N + 4K) + 2 J~ N d, layers in FLOPs there
    assert read == layers + 2 * k * d**2 + 6 * d**2
    assert write == layers + 2 * n * d**2
