"""HDiT: an hourglass of DiT blocks with full attention (after Crowson et al. 2024), with or without the latent
interface.

Half of the outer blocks, of width D, run before and half after the inner ones. Those have width 2 D and a quarter of
the tokens: a linear layer merges each run of four tokens, and another splits it again. In space a run is a square of
2 x 2 tokens; under ELIT the core merges runs of four latents inside a window, so that levels are multiples of 4.
Shapes: B batch, N spatial tokens, K latents, L tokens of either kind, D width.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from elit.errors import ElitError
from elit.interface import TokenGrid
from elit.interface.grid import Triple
from elit.layers import Block, Linear, Rotary, residual
from elit.models.dit import DiT
from elit.models.transformer import Encoded, Stream, TransformerConfig

RUN = 4  # tokens that are merged into one


@dataclass(frozen=True)
class HDiTConfig(TransformerConfig):
    """Configures an HDiT. The width and heads of :class:`TransformerConfig` are those of the outer blocks.

    The defaults are those of HDiT-XL/2: depths 8, 12, 8.

    Attributes:
        inner_depth: how many of the ``depth`` blocks are inner ones.

    Raises:
        ElitError: depths without two equal outer parts, a head or tail with inner blocks, or tokens that cannot be
            merged.
    """

    inner_depth: int = 12

    def __post_init__(self) -> None:
        super().__post_init__()
        outer = self.depth - self.inner_depth
        if self.inner_depth < 1 or outer < 0 or outer % 2:
            raise ElitError(f"inner_depth {self.inner_depth} of depth {self.depth} leaves no two equal outer parts")
        if self.interface and max(self.head_depth, self.tail_depth) > self.outer_depth:
            raise ElitError(
                f"head_depth {self.head_depth} and tail_depth {self.tail_depth} must not exceed the "
                f"{self.outer_depth} outer blocks of each side, for the inner ones belong to the core"
            )
        if not self.interface:
            square_windows(self.grid_size)

    @property
    def outer_depth(self) -> int:
        """The number of outer blocks before the inner ones, and again after them."""
        return (self.depth - self.inner_depth) // 2


class HDiT(DiT):
    """Predicts velocities as :class:`DiT` does, with a wide and short middle.

    Args:
        config: what to build. Weights are drawn from torch's global generator.
    """

    LEVEL_STEP: ClassVar[int] = RUN
    config: HDiTConfig

    def build_stack(self) -> None:
        config, wide = self.config, 2 * self.config.width
        outer, inner = config.outer_depth, config.inner_depth
        self.blocks = nn.ModuleList(
            Block(width, heads, config.mlp_ratio, config.qk_norm_kind, condition_width=config.width)
            for width, heads, count in (
                (config.width, config.num_heads, outer),
                (wide, 2 * config.num_heads, inner),
                (config.width, config.num_heads, outer),
            )
            for _ in range(count)
        )
        self.merge = Linear(RUN * config.width, wide)
        self.split = Linear(wide, RUN * config.width)
        self.inner_share = nn.Parameter(torch.empty(1))

    def init_weights(self) -> None:
        super().init_weights()
        nn.init.constant_(self.inner_share, 0.5)

    def run_blocks(self, first: int, end: int, stream: Stream, c: Tensor, rope: Rotary | None) -> Stream:
        """Runs blocks first..end - 1, the inner ones on merged runs of tokens.

        Either all inner blocks or none must be among them. A merged run has the position of its first token. The
        output of the inner blocks is blended with their input, by a learned share.
        """
        inner = self.config.outer_depth
        outer = inner + self.config.inner_depth
        if end <= inner or first >= outer:
            return super().run_blocks(first, end, stream, c, rope)
        x = super().run_blocks(first, inner, stream, c, rope).tokens  # (B, L, D)
        wide = Stream(residual(self.merge(x.unflatten(1, (-1, RUN)).flatten(2))))  # (B, L / 4, 2 D)
        wide = super().run_blocks(inner, outer, wide, c, rope and Rotary(rope.cos[::RUN], rope.sin[::RUN]))
        back = self.split(wide.tokens).unflatten(2, (RUN, -1)).flatten(1, 2)  # (B, L, D)
        x = x + self.inner_share * (back - x)  # not torch.lerp, which autocast does not know
        return super().run_blocks(outer, end, Stream(x), c, rope)

    # A plain HDiT merges squares of 2 x 2 tokens: between embedding and projection its tokens stand in that order.

    def embed(self, x: Tensor, size: Triple) -> Tensor:
        s = super().embed(x, size)
        return s if self.interface is not None else square_windows(size).to_windows(s).flatten(1, 2)

    def spatial_rope(self, size: Triple, device: torch.device) -> Rotary | None:
        rope = super().spatial_rope(size, device)
        if self.interface is not None or rope is None:
            return rope
        return Rotary(*(square_windows(size).to_windows(table[None]).flatten(0, 2) for table in rope))

    def project(self, s: Tensor, c: Tensor, encoded: Encoded) -> Tensor:
        if self.interface is None:
            s = square_windows(encoded.size).from_windows(s.unflatten(1, (-1, RUN)))
        return super().project(s, c, encoded)


def square_windows(size: Triple) -> TokenGrid:
    """Cuts the grid into squares of 2 x 2 tokens.

    Raises:
        ElitError: it has an odd side.
    """
    if size[1] % 2 or size[2] % 2:
        raise ElitError(f"HDiT merges squares of 2x2 tokens, and a grid of {size[1]}x{size[2]} tokens has an odd side")
    return TokenGrid(size, (1, 2, 2))
