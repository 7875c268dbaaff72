"""FLOPs that the library counts, against a closed form and against PyTorch's counter over the sampler itself.

All of them are whole numbers, so they must be equal.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import elit
from elit import ElitError, Guidance
from elit.analysis import count_flops, on_meta, sampling_flops
from elit.analysis.flops import example_condition
from elit.flow.pyramid import StageSchedule
from elit.interface import Budget, BudgetByNoise, InterfaceConfig
from elit.models import DFMConfig, DiTConfig, HDiTConfig, MMDiTConfig, Model, UViTConfig, config_for, names
from elit.models.registry import FAMILIES
from tests.analysis.closed_form import closed_form
from tests.helpers.models import TINY, tiny


def levels_of(config: Any) -> tuple[int, ...]:
    return on_meta(config).levels or (0,)


def agree(config: Any, level: int) -> None:
    counted, formula = count_flops(config, level), closed_form(config, level)
    assert counted == tuple(2 * macs for macs in formula)
    assert counted.macs == sum(formula)


# ------------------------------------------------------------------------------------------------ a forward


# Every size at patch size 2, and every patch size of the small ones: all of them would take minutes.
@pytest.mark.parametrize("name", [name for name in names() if name.endswith("/2") or "-S/" in name])
def test_named_models(name: str) -> None:
    """Every second name at 256px and full budget, the others at 512px and their lowest level."""
    high = names().index(name) % 2 == 0
    config = config_for(name, 256 if high else 512)
    agree(config, levels_of(config)[-1 if high else 0])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_level(family: str) -> None:
    config = config_for(f"ELIT-{family}-S/4", depth=6, **({"inner_depth": 2} if family == "HDiT" else {}))
    for level in levels_of(config):
        agree(config, level)


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
    levels = levels_of(fitted)
    for level in (levels[len(levels) // 2 - 1], levels[-1]):
        agree(fitted, level)


def test_a_block_costs_what_the_paper_says() -> None:
    """One more block of N tokens: 8 N d^2 + 16 N d^2 for the layers, 4 N^2 d for attention, 12 d^2 for modulation."""
    shallow = replace(config_for("DiT-B/2"), depth=3)
    n, d = 256, 768
    expected = 8 * n * d**2 + 16 * n * d**2 + 4 * n**2 * d + 12 * d**2
    assert count_flops(replace(shallow, depth=4)).total - count_flops(shallow).total == expected


def test_read_and_write_cost_what_the_paper_says() -> None:
    read, d, n, k = count_flops(config_for("ELIT-DiT-XL/2"), 4).read // 2, 1152, 256, 64
    layers = d**2 * (2 * n + 2 * k) + 2 * 4 * n * d  # the paper's d^2 (4N + 4K) + 2 J~ N d, layers in FLOPs there
    assert read == layers + 2 * k * d**2 + 6 * d**2


def test_no_level_means_the_highest_that_was_trained() -> None:
    config = replace(TINY, interface=InterfaceConfig(2, levels=(1, 3)))
    assert count_flops(config) == count_flops(config, 3) != count_flops(config, 4)


def test_sizes_that_come_as_lists_are_counted() -> None:
    """As JSON and YAML give them."""
    listed = config_for("ELIT-DiT-S/2", group_size=[1, 8, 8])
    assert count_flops(listed) == count_flops(config_for("ELIT-DiT-S/2", group_size=8))


# ------------------------------------------------------------------------------------------------ sampling


def sampled(model: Model, **settings: Any) -> int:
    """What PyTorch's counter sees of one sample."""
    y = [3] if model.config.num_classes else example_condition(model, 1)
    with FlopCounterMode(display=False) as counter:
        elit.sample(model, y, seeds=[0], **settings)
    return counter.get_total_flops()


@pytest.mark.parametrize("weak", [None, 0.5])
@pytest.mark.parametrize("strong", [1.0, 0.25])
def test_a_step_of_autoguidance_shares_encode_and_read(weak: float | None, strong: float) -> None:
    """ELIT-SiT-XL/2 at 256px: encode once, Read once at the higher level, two cores and two decodes."""
    config = config_for("ELIT-SiT-XL/2", 256)
    model, guidance = on_meta(config), Guidance("ag", 2.0, weak)
    one, other = count_flops(config, int(16 * strong)), count_flops(config, int(16 * weak) if weak else 1)
    expected = one.encode + max(one.read, other.read) + one.core + other.core + one.decode + other.decode
    settings: dict[str, Any] = {"steps": 1, "budget": strong, "guidance": guidance}
    assert sampled(model, **settings) == sampling_flops(model, **settings) == expected
    assert expected < one.total + other.total


@pytest.mark.parametrize("kind", ["cfg", "ccfg"])
def test_terms_with_other_conditions_share_nothing(kind: Any) -> None:
    config = config_for("ELIT-SiT-XL/2", 256)
    model, guidance = on_meta(config), Guidance(kind, 2.0)
    expected = count_flops(config, 16).total + count_flops(config, 16 if kind == "cfg" else 1).total
    assert sampled(model, steps=1, guidance=guidance) == sampling_flops(model, 1, None, guidance) == expected


@pytest.mark.parametrize("solver", ["euler", "heun", "sde"])
@pytest.mark.parametrize(
    ("budget", "guidance"),
    [
        (None, None),
        (0.5, Guidance("cfg", 2)),
        (BudgetByNoise([0.5], [0.25, 1.0]), Guidance("cfg", 2)),
        ([0.25, 0.5, 0.75, 1.0], Guidance("ccfg", 2, interval=(0.3, 0.8))),
        ([0.25, 0.5, 0.75, 1.0], Guidance("ag", 2, 0.5, interval=(0.3, 0.8))),
        (0.75, Guidance("ag", 2, 0.5)),
        (0.75, Guidance("ag", 1)),
    ],
)
def test_sampling_flops_are_those_of_sampling(budget: Budget | None, guidance: Guidance | None, solver: str) -> None:
    """Heun evaluates twice in a step: guidance counts at the time of each evaluation."""
    model = tiny().requires_grad_(False)
    settings: dict[str, Any] = {"steps": 4, "budget": budget, "guidance": guidance, "solver": solver}
    assert sampling_flops(model, **settings) == sampled(model, **settings)


@pytest.mark.parametrize("guidance", [None, Guidance("ccfg", 2), Guidance("ag", 2, interval=(0.0, 0.4))])
@pytest.mark.parametrize("name", ["ELIT-DFM-SiT-S/2", "ELIT-MMDiT-S/2", "ELIT-UViT-S/2", "ELIT-HDiT-S/2"])
def test_sampling_flops_of_backbones(name: str, guidance: Guidance | None) -> None:
    model = on_meta(config_for(name))
    assert sampling_flops(model, 3, None, guidance) == sampled(model, steps=3, guidance=guidance)
    if model.stage_shapes is not None:
        schedule = StageSchedule([1, 2], [0.3])
        assert sampling_flops(model, schedule, None, guidance) == sampled(model, steps=schedule, guidance=guidance)


def test_settings_of_several_samples_are_refused() -> None:
    model = tiny()
    with pytest.raises(ElitError, match="for 1 samples"):
        sampling_flops(model, 2, torch.tensor([0.25, 1.0]))
    with pytest.raises(ElitError, match="guidance lists 2 values for 1 samples"):
        sampling_flops(model, 2, None, [None, Guidance()])  # type: ignore[arg-type]
