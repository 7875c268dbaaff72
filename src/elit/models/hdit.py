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
from elit.layers import Block, Rotary
from elit.models.dit import DiT, DiTConfig, run

RUN = 4  # tokens that are merged into one


@dataclass(frozen=True)
class HDiTConfig(DiTConfig):
    """An HDiT: :class:`DiTConfig`, whose width and heads are those of the outer blocks. The defaults are those of
    HDiT-XL/2: depths 8, 12, 8.

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
            squares(self.grid_size)

    @property
    def outer_depth(self) -> int:
        """Outer blocks before, and after, the inner ones."""
        return (self.depth - self.inner_depth) // 2


class HDiT(DiT):
    """Velocity of x at time t for class y, at a budget of latents: :class:`DiT` with a wide and short middle.

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
        self.merge = nn.Linear(RUN * config.width, wide)
        self.split = nn.Linear(wide, RUN * config.width)
        self.inner_share = nn.Parameter(torch.empty(1))

    def init_weights(self) -> None:
        super().init_weights()
        nn.init.constant_(self.inner_share, 0.5)

    def transform(self, s: Tensor, c: Tensor, size: Triple, level: int) -> Tensor:
        """As :meth:`Transformer.transform`."""
        rope = self.spatial_rope(size, s.device)
        if self.interface is None:
            runs = squares(size)
            s, rope = runs.to_windows(s).flatten(1, 2), None if rope is None else in_runs(rope, runs)
            return runs.from_windows(self.hourglass(0, self.config.depth, s, c, rope).unflatten(1, (-1, RUN)))
        grid = self.interface.grid_of(size)
        core, tail = self.config.head_depth, self.config.depth - self.config.tail_depth
        s = run(self.blocks[:core], s, c, rope)  # (B, N, D)
        latents, spatial = self.interface.read(s, c, grid, level)  # (B, K, D)
        latents = self.hourglass(core, tail, latents, c, self.interface.core_rope(grid, level, s.device))
        s = self.interface.write(latents, spatial, grid)  # (B, N, D)
        return run(self.blocks[tail:], s, c, rope)

    def hourglass(self, first: int, end: int, x: Tensor, c: Tensor, rope: Rotary | None) -> Tensor:
        """Blocks first..end - 1, the inner ones among them, on tokens in runs of four (B, L, D).

        A merged run has the position of its first token. What comes back is blended with what the outer blocks knew,
        in a learned share.
        """
        inner = self.config.outer_depth
        outer = inner + self.config.inner_depth
        x = run(self.blocks[first:inner], x, c, rope)  # (B, L, D)
        wide = self.merge(x.unflatten(1, (-1, RUN)).flatten(2))  # (B, L / 4, 2 D)
        wide = run(self.blocks[inner:outer], wide, c, rope and Rotary(rope.cos[::RUN], rope.sin[::RUN]))
        back = self.split(wide).unflatten(2, (RUN, -1)).flatten(1, 2)  # (B, L, D)
        x = x + self.inner_share * (back - x)  # not torch.lerp, which autocast does not know
        return run(self.blocks[outer:end], x, c, rope)


def squares(size: Triple) -> TokenGrid:
    """The grid in squares of 2 x 2 tokens.

    Raises:
        ElitError: it has an odd side.
    """
    if size[1] % 2 or size[2] % 2:
        raise ElitError(f"HDiT merges squares of 2x2 tokens, and a grid of {size[1]}x{size[2]} tokens has an odd side")
    return TokenGrid(size, (1, 2, 2))


def in_runs(rope: Rotary, runs: TokenGrid) -> Rotary:
    """Positions (N, d / 2) in raster order, brought into the order of runs."""
    return Rotary(*(runs.to_windows(table[None]).flatten(0, 2) for table in rope))
