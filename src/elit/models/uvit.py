"""U-ViT (Bao et al. 2023) with the blocks of DiT, with or without the latent interface.

Long skips join mirrored blocks: what block i gives is concatenated to the input of block depth - 1 - i and projected
back, 2 D -> D. The four blocks in the middle have none. Shapes: B batch, N spatial tokens, K latents, D width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from elit.errors import ElitError
from elit.layers import Linear, Rotary, residual
from elit.models.dit import DiT
from elit.models.transformer import Stream, TransformerConfig


@dataclass(frozen=True)
class UViTConfig(TransformerConfig):
    """Configures a U-ViT. The fields are those of :class:`TransformerConfig`; there are ``depth // 2 - 2`` long skips.

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
        """The number of long skips. Skip i joins block i and block ``depth - 1 - i``."""
        return max(0, self.depth // 2 - 2)


class UViT(DiT):
    """Predicts velocities as :class:`DiT` does, with long skips between its blocks.

    Args:
        config: what to build. Weights are drawn from torch's global generator.
    """

    config: UViTConfig

    def build_stack(self) -> None:
        super().build_stack()
        width = self.config.width
        self.joins = nn.ModuleList(Linear(2 * width, width) for _ in range(self.config.skips))

    def run_blocks(self, first: int, end: int, stream: Stream, c: Tensor, rope: Rotary | None) -> Stream:
        """Runs blocks first..end - 1. Early blocks push their output on a stack of skips, and late blocks pop it.

        Skips that begin in the head end in the tail, on spatial tokens, and skips that begin in the core end in the
        core, on latents. The configuration allows no others.
        """
        depth, count = self.config.depth, self.config.skips
        x, skips = stream.tokens, list(stream.skips)
        for i in range(first, end):
            if i >= depth - count:
                x = residual(self.joins[depth - 1 - i](torch.cat((x, skips.pop()), dim=-1)))
            x = self.blocks[i](x, c, rope)
            if i < count:
                skips.append(x)
        return Stream(x, skips=tuple(skips))
