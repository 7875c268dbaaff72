"""Counts what elastic versions of well-known transformers cost, from configurations alone: no weights are made."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import diffusers
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from elit.errors import ElitError
from elit.integrations import elastify
from elit.interface.grid import Triple


@dataclass(frozen=True)
class KnownBase:
    """A published transformer, and the forward that it is counted with.

    Attributes:
        architecture: its class in diffusers.
        config: where its configuration differs from the default of that class.
        input: what the forward makes, for people.
        grid: its tokens along (T, H, W).
        prompt, negative_prompt: tokens of text in the two terms of guidance; where a pipeline pads prompts both are
            the same, and a base of classes has none.
        inputs: makes the inputs of a forward, of a grid and a number of tokens of text.
    """

    architecture: str
    input: str
    grid: Triple
    prompt: int
    negative_prompt: int
    inputs: Callable[[Any, Triple, int], dict[str, Any]]
    config: dict[str, Any] = field(default_factory=dict)


class ElasticCost(NamedTuple):
    """FLOPs of one sample at one budget.

    Attributes:
        forward: of one forward with the prompt.
        guided: of one step of sampling that is guided with the weak term at the lowest budget of the table.
        forward_of_base, guided_of_base: what they take with the base, guided at full budget.
    """

    budget: float
    forward: int
    guided: int
    forward_of_base: int
    guided_of_base: int


def _ones(*shape: int) -> Tensor:
    return torch.ones(shape, device="meta")


def _class_inputs(config: Any, grid: Triple, text: int) -> dict[str, Any]:
    _, height, width = grid
    label = torch.ones(1, dtype=torch.long, device="meta")
    size = height * config.patch_size, width * config.patch_size
    return {"hidden_states": _ones(1, config.in_channels, *size), "timestep": label, "class_labels": label}


def _pixart_inputs(config: Any, grid: Triple, text: int) -> dict[str, Any]:
    return {
        "hidden_states": _class_inputs(config, grid, text)["hidden_states"],
        "encoder_hidden_states": _ones(1, text, config.caption_channels),
        "encoder_attention_mask": _ones(1, text),
        "timestep": _ones(1),
        "added_cond_kwargs": {"resolution": _ones(1, 2), "aspect_ratio": _ones(1, 1)},
    }


def _sd3_inputs(config: Any, grid: Triple, text: int) -> dict[str, Any]:
    return {
        "hidden_states": _class_inputs(config, grid, text)["hidden_states"],
        "encoder_hidden_states": _ones(1, text, config.joint_attention_dim),
        "pooled_projections": _ones(1, config.pooled_projection_dim),
        "timestep": _ones(1),
    }


def _flux_inputs(config: Any, grid: Triple, text: int) -> dict[str, Any]:
    _, height, width = grid
    return {
        "hidden_states": _ones(1, height * width, config.in_channels),
        "encoder_hidden_states": _ones(1, text, config.joint_attention_dim),
        "pooled_projections": _ones(1, config.pooled_projection_dim),
        "timestep": _ones(1),
        "guidance": _ones(1),
        "img_ids": _ones(height * width, 3),
        "txt_ids": _ones(text, 3),
    }


def _qwen_inputs(config: Any, grid: Triple, text: int) -> dict[str, Any]:
    _, height, width = grid
    return {
        "hidden_states": _ones(1, height * width, config.in_channels),
        "encoder_hidden_states": _ones(1, text, config.joint_attention_dim),
        "timestep": _ones(1),
        "img_shapes": [[grid]],
    }


def _wan_inputs(config: Any, grid: Triple, text: int) -> dict[str, Any]:
    size = (n * side for n, side in zip(grid, config.patch_size, strict=True))
    return {
        "hidden_states": _ones(1, config.in_channels, *size),
        "encoder_hidden_states": _ones(1, text, config.text_dim),
        "timestep": _ones(1),
    }


SD35_LARGE = {
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "pos_embed_max_size": 192,
    "qk_norm": "rms_norm",
}
PIXART = {"caption_channels": 4096}
DIT_XL = {"out_channels": 8}

BASES: dict[str, KnownBase] = {
    # its pipeline does not pad prompts: an empty negative one is a few tokens
    "qwen-image": KnownBase("QwenImageTransformer2DModel", "1024x1024 pixels", (1, 64, 64), 300, 5, _qwen_inputs),
    "flux": KnownBase(
        "FluxTransformer2DModel", "1024x1024 pixels", (1, 64, 64), 512, 512, _flux_inputs, {"guidance_embeds": True}
    ),
    "sd3.5": KnownBase("SD3Transformer2DModel", "1024x1024 pixels", (1, 64, 64), 333, 333, _sd3_inputs, SD35_LARGE),
    "pixart": KnownBase("PixArtTransformer2DModel", "1024x1024 pixels", (1, 64, 64), 120, 120, _pixart_inputs, PIXART),
    "dit-xl": KnownBase("DiTTransformer2DModel", "256x256 pixels", (1, 16, 16), 0, 0, _class_inputs, DIT_XL),
    "wan": KnownBase("WanTransformer3DModel", "81 frames of 832x480 pixels", (21, 30, 52), 512, 512, _wan_inputs),
}
"""Transformers that :func:`count_costs` knows, by the names that people call them."""


def known_base(name: str) -> KnownBase:
    """Returns what is known of a base.

    Raises:
        ElitError: nothing.
    """
    if name not in BASES:
        raise ElitError(f"no base is named {name!r}; there are {', '.join(BASES)}")
    return BASES[name]


def on_meta(name: str) -> tuple[Any, Any]:
    """Makes a known base and its elastic version without memory: shapes only."""
    known = known_base(name)
    with torch.device("meta"):
        base = getattr(diffusers, known.architecture)(**known.config).eval().requires_grad_(False)
        return base, elastify(base)


def count_costs(name: str, budgets: tuple[float, ...] = (1.0, 1 / 2, 1 / 4, 1 / 8)) -> list[ElasticCost]:
    """Counts the FLOPs of an elastic version of a known base, with the default split and windows, at some budgets.

    Matrix products and attention count, as PyTorch's counter sees them.

    Args:
        budgets: falling; the last is that of the weak term of guidance.

    Raises:
        ElitError: no base of that name.
    """
    known = known_base(name)
    base, elastic = on_meta(name)

    @lru_cache
    def flops(text: int, budget: float | None) -> int:
        inputs = known.inputs(base.config, known.grid, text)
        device = torch.device("meta")
        layout = {} if budget is None else {"layout": elastic.elit.layout(known.grid, elastic.level(budget), device)}
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            (base if budget is None else elastic)(**inputs, **layout, return_dict=False)
        return counter.get_total_flops()

    of_base = flops(known.prompt, None), flops(known.negative_prompt, None)
    weak = flops(known.negative_prompt, budgets[-1])
    strong = {budget: flops(known.prompt, budget) for budget in budgets}
    return [ElasticCost(budget, strong[budget], strong[budget] + weak, of_base[0], sum(of_base)) for budget in budgets]
