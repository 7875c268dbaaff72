"""The cost of a forward in closed form: every matrix product of a configuration, without building a model.

It knows nothing of the code of the models and stands beside what the library counts as an independent reference. In
MACs (one multiply-add; 2 FLOPs) of one sample. N spatial tokens, J latents and tokens of a window, J~ of them in use, G
windows, K = G J~ latents, D width; L tokens of any kind. ``docs/analysis.md`` has the same as formulas.
"""

import math
from typing import NamedTuple

from elit.interface import TokenGrid, triple
from elit.layers import TimeEmbed
from elit.models.dfm import DFMConfig
from elit.models.hdit import RUN, HDiTConfig
from elit.models.mmdit import MMDiTConfig
from elit.models.transformer import TransformerConfig
from elit.models.uvit import UViTConfig

TEXT_TOKENS = 77  # of the prompt that the library counts with


class Macs(NamedTuple):
    """Multiply-adds of the parts of a forward, all matrix products and modulation included."""

    encode: int
    read: int
    core: int
    decode: int


def closed_form(config: TransformerConfig, num_latents: int = 0, text_tokens: int = TEXT_TOKENS) -> Macs:
    """Computes the cost of the parts of a forward of one sample.

    Args:
        num_latents: J~. Without meaning for a plain transformer.
        text_tokens: of the prompt, for models of text.
    """
    n, depth = math.prod(config.grid_size), config.depth
    if config.interface is None:
        return Macs(
            _embed(config, n, text_tokens) + _blocks(config, 0, depth, n, text_tokens), 0, 0, _project(config, n)
        )
    grid = TokenGrid(config.grid_size, triple(config.interface.group_size))
    first, end = config.head_depth, depth - config.tail_depth
    head, tail = (_blocks(config, *ends, n, text_tokens) for ends in ((0, first), (end, depth)))
    return Macs(
        encode=_embed(config, n, text_tokens) + head,
        read=_read(config, grid, num_latents),
        core=_blocks(config, first, end, grid.num_windows * num_latents, text_tokens),
        decode=_write(config, grid, num_latents) + tail + _project(config, n),
    )


def _embed(config: TransformerConfig, n: int, text_tokens: int) -> int:
    """Patches, time and text; labels are looked up."""
    d = config.width
    time = 2 * TimeEmbed.FREQUENCIES * d + d * d
    text = (text_tokens + 1) * config.text_width * d if isinstance(config, MMDiTConfig) else 0  # + 1: pooled
    return sum(n * values * d + time for values in _patch_values(config)) + text


def _project(config: TransformerConfig, n: int) -> int:
    d = config.width
    return sum(n * d * values + 2 * d * d for values in _patch_values(config))


def _patch_values(config: TransformerConfig) -> list[int]:
    """Numbers in a patch, of every stage of the input."""
    patches = [triple(config.patch_size)]
    if isinstance(config, DFMConfig):
        patches = [config.of_stage(config.patch_size, stage) for stage in range(config.stages)]
    return [config.in_channels * math.prod(patch) for patch in patches]


def _blocks(config: TransformerConfig, first: int, end: int, tokens: int, text_tokens: int) -> int:
    """Blocks first..end - 1 on so many tokens, and what their backbone puts between them."""
    return sum(_block(config, i, tokens, text_tokens) for i in range(first, end)) + _joins(config, first, end, tokens)


def _block(config: TransformerConfig, i: int, tokens: int, text_tokens: int) -> int:
    d = config.width
    if isinstance(config, HDiTConfig) and config.outer_depth <= i < config.outer_depth + config.inner_depth:
        return _linear(config, tokens // RUN, 2 * d) + _attention(tokens // RUN, tokens // RUN, 2 * d) + 6 * d * 2 * d
    if not isinstance(config, MMDiTConfig):
        return _linear(config, tokens, d) + _attention(tokens, tokens, d) + 6 * d * d
    both = tokens + text_tokens
    image = _linear(config, tokens, d) + 6 * d * d
    if i == config.depth - 1:  # reads text and does not change it
        return image + 2 * text_tokens * d * d + _attention(tokens, both, d) + 2 * d * d
    return image + _linear(config, text_tokens, d) + _attention(both, both, d) + 6 * d * d


def _linear(config: TransformerConfig, tokens: int, width: int) -> int:
    """Queries, keys, values and output, then the MLP: 4 L D^2 + 8 L D^2 for the usual ratio of 4."""
    return tokens * (4 * width * width + 2 * width * round(width * config.mlp_ratio))


def _attention(queries: int, keys: int, width: int) -> int:
    """Scores, and what they weigh."""
    return 2 * queries * keys * width


def _joins(config: TransformerConfig, first: int, end: int, tokens: int) -> int:
    """What backbones put between blocks: the joins of a U-ViT, merge and split of an HDiT."""
    d = config.width
    if isinstance(config, UViTConfig):  # a join before each of the last blocks
        return max(0, end - max(first, config.depth - config.skips)) * tokens * 2 * d * d
    if isinstance(config, HDiTConfig) and first <= config.outer_depth < end:  # merge and split
        return 2 * (tokens // RUN) * (RUN * d) * (2 * d)
    return 0


def _read(config: TransformerConfig, grid: TokenGrid, level: int) -> int:
    """K queries and outputs, N keys and values, attention inside windows, an MLP of ratio 1 and modulation."""
    assert config.interface is not None
    d = config.width
    filled = grid.window_tokens if config.interface.tail_visible else level
    k, parts = grid.num_windows * filled, 7 if config.interface.variant == "published" else 6
    attention = grid.num_windows * _attention(filled, grid.window_tokens, d)
    return (2 * k + 2 * grid.num_tokens) * d * d + attention + 2 * k * d * d + parts * d * d


def _write(config: TransformerConfig, grid: TokenGrid, level: int) -> int:
    """N queries and outputs, K keys and values, attention inside windows and an MLP of ratio 1; in every layer."""
    assert config.interface is not None
    d = config.width
    seen = grid.window_tokens if config.interface.tail_visible else level
    k = grid.num_windows * seen
    attention = grid.num_windows * _attention(grid.window_tokens, seen, d)
    layer = (2 * grid.num_tokens + 2 * k) * d * d + attention + 2 * grid.num_tokens * d * d
    return config.interface.write_depth * layer
