"""The backbones in miniature, and their stack once more as plain float64 loops."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from elit.interface import InterfaceConfig
from elit.models import DFM, DFMConfig, DiT, DiTConfig, HDiT, HDiTConfig, MMDiT, MMDiTConfig, Model, UViT, UViTConfig
from elit.models.transformer import Transformer
from tests.helpers import reference
from tests.helpers.models import PUBLISHED, TINY, inputs, randomize

ELASTIC: dict[str, tuple[type[Model], type, dict[str, Any]]] = {
    "ELIT-DiT": (DiT, DiTConfig, {}),
    "ELIT-UViT": (UViT, UViTConfig, {"depth": 8}),  # a skip in space, another in the core
    "ELIT-UViT, deep head": (UViT, UViTConfig, {"depth": 8, "head_depth": 2, "tail_depth": 3}),  # all skips in space
    "ELIT-HDiT": (HDiT, HDiTConfig, {"depth": 6, "inner_depth": 2}),
    "ELIT-HDiT, all outer blocks in space": (HDiT, HDiTConfig, {"inner_depth": 2}),
    "ELIT-MMDiT": (MMDiT, MMDiTConfig, {"num_classes": 0, "text_width": 24, "empty_length": 2}),
}  # fmt: skip
"""Model, configuration and its fields beside those of TINY."""

Vectors = list[np.ndarray]

SIXTEEN: dict[str, Any] = {"input_size": 16, "interface": InterfaceConfig(4)}
"""Four windows of J = 16: levels enough also for the backbone whose levels are multiples of 4."""
Positions = list[Any]


def tiny(name: str, **changes: Any) -> Any:
    """A backbone in miniature, every weight random; ``interface=None`` makes it the plain one."""
    model, config, fields = ELASTIC[name]
    return randomize(model(config(**(TINY.__dict__ | fields | changes)))).eval()


def video(name: str) -> Any:
    """Clips of 4 x 8 x 8, in 4 windows of 2 x 2 x 4 tokens."""
    return tiny(name, input_size=(4, 8, 8), patch_size=(1, 2, 2), interface=InterfaceConfig((2, 4, 2)))


def multi_scale(**changes: Any) -> DFM:
    """A pyramid of two stages, 16 and 32 pixels a side, in four windows of J = 16."""
    fields = TINY.__dict__ | {"input_size": 32, "patch_size": 4, "interface": InterfaceConfig(4), "stages": 2} | changes
    return randomize(DFM(DFMConfig(**fields))).eval()


def text_model(**changes: Any) -> Any:
    """An MM-DiT whose empty prompt is one, of two tokens."""
    model = tiny("ELIT-MMDiT", **changes)
    model.empty_prompt.copy_(torch.randn(model.empty_prompt.shape, generator=torch.Generator().manual_seed(3)))
    return model


KINDS: dict[str, Callable[[], Any]] = {
    **{name: partial(tiny, name, **SIXTEEN) for name in ELASTIC},
    "ELIT-MMDiT": lambda: text_model(**SIXTEEN),
    "ELIT-DiT, unconditional": lambda: tiny("ELIT-DiT", num_classes=0, **SIXTEEN),
    "ELIT-DiT, video": lambda: video("ELIT-DiT"),
    "ELIT-SiT, published": lambda: tiny("ELIT-DiT", input_size=16, positions="sincos", qk_norm=False,
                                        interface=replace(PUBLISHED, group_size=4)),
    "ELIT-DFM": multi_scale,
}  # fmt: skip
"""Every kind of elastic model, each with J = 16; of the published one Write sees the tail."""


def check_stack(model: Any, plain_blocks: Callable[..., Any], level: int) -> None:
    """Asserts that a model in float64 is :func:`plain_stack` between its own embedding and projection.

    Args:
        plain_blocks: ``plain_blocks(model, condition)`` gives the ``blocks`` of the backbone.
    """
    x, t, y = inputs(model, 1, dtype=torch.float64)
    c, tokens = model.condition(t, y), model.embed(x, model.config.grid_size)
    vector = reference.array(c[0])
    expected = plain_stack(model, list(reference.array(tokens[0])), vector, level, plain_blocks(model, vector))
    velocity = model.project(torch.from_numpy(np.array(expected))[None], c, model.encode(x, t, y))
    # float64; up to 8 blocks
    torch.testing.assert_close(model(x, t, y, num_latents=level), velocity, rtol=0, atol=1e-10)


def plain_stack(
    model: Transformer, tokens: Vectors, c: np.ndarray, level: int, blocks: Callable[..., Vectors]
) -> Vectors:
    """Head, Read, core, Write and tail of one sample; ``blocks(first, end, tokens, positions)`` is the backbone's."""
    config = model.config
    assert model.interface is not None
    assert config.interface is not None
    grid, weights = model.interface.grid, reference.part(reference.weights_of(model), "interface")
    shared = (grid.size, grid.window, config.num_heads, config.rope_theta, False)
    video = grid.size[0] > 1
    places, core, tail = reference.places(grid.size, video), config.head_depth, config.depth - config.tail_depth
    tokens = blocks(0, core, tokens, places)
    latents = [latent for window in reference.read(weights, tokens, c, *shared, level) for latent in window]
    at = [(j, *place) for place in reference.places(grid.shape, video) for j in range(level)]
    latents = blocks(core, tail, latents, at)
    by_window = [latents[g : g + level] for g in range(0, len(latents), level)]
    tokens = reference.write(weights, tokens, by_window, *shared, config.interface.write_depth)
    return blocks(tail, config.depth, tokens, places)
