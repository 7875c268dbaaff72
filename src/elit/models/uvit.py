"""U-ViT (Bao et al. 2023) with the blocks of DiT, with or without the latent interface.

Long skips join mirrored blocks: what block i gives is concatenated to the input of block depth - 1 - i and projected
back, 2 D -> D. The four blocks in the middle have none. Shapes: B batch, N spatial tokens, K latents, D width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from elit.errors import ElitError
from elit.interface.grid import Triple
from elit.layers import Rotary
from elit.models.dit import DiT, DiTConfig


@dataclass(frozen=True)
class UViTConfig(DiTConfig):
    """A U-ViT: :class:`DiTConfig`, with ``depth // 2 - 2`` long skips.

    Raises:
        ElitError: a split that a skip would cross, from tokens to latents.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.interface and min(self.head_depth, self.skips) != min(self.tail_depth, self.skips):
            raise ElitError(
                f"with head_depth {self.head_depth} and tail_depth {self.tail_depth} a long skip of the U-ViT would "
                f"join tokens and latents; take equal depths, or at least {self.skips} for both"
            )

    @property
    def skips(self) -> int:
        """How many pairs of blocks a skip joins, counted from both ends."""
        return max(0, self.depth // 2 - 2)


class UViT(DiT):
    """Velocity of x at time t for class y, at a budget of latents: :class:`DiT` with long skips.

    Args:
        config: what to build. Weights are drawn from torch's global generator.
    """

    config: UViTConfig

    def build_stack(self) -> None:
        super().build_stack()
        width = self.config.width
        self.joins = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(self.config.skips))

    def transform(self, s: Tensor, c: Tensor, size: Triple, level: int) -> Tensor:
        """As :meth:`Transformer.transform`.

        Skips of the head end in the tail, both in space, and those that begin in the core end there, on latents: the
        configuration allows no others.
        """
        rope = self.spatial_rope(size, s.device)
        core, tail, end = self.config.head_depth, self.config.depth - self.config.tail_depth, self.config.depth
        skips: list[Tensor] = []
        if self.interface is None:
            return self.run(0, end, s, c, rope, skips)
        grid = self.interface.grid_of(size)
        s = self.run(0, core, s, c, rope, skips)  # (B, N, D)
        latents, spatial = self.interface.read(s, c, grid, level)  # (B, K, D)
        latents = self.run(core, tail, latents, c, self.interface.core_rope(grid, level, s.device), skips)
        s = self.interface.write(latents, spatial, grid)  # (B, N, D)
        return self.run(tail, end, s, c, rope, skips)

    def run(self, first: int, end: int, x: Tensor, c: Tensor, rope: Rotary | None, skips: list[Tensor]) -> Tensor:
        """Blocks first..end - 1, which leave what they give on the stack of skips or take it from there."""
        depth, count = self.config.depth, self.config.skips
        for i in range(first, end):
            if i >= depth - count:
                x = self.joins[depth - 1 - i](torch.cat((x, skips.pop()), dim=-1))
            x = self.blocks[i](x, c, rope)
            if i < count:
                skips.append(x)
        return x
