"""DiT and SiT, with or without the latent interface: one class."""

import math
from dataclasses import dataclass

from torch import Tensor

from elit.interface import triple
from elit.interface.grid import Triple
from elit.layers import FinalLayer, Linear, TimeEmbed, init_model, residual
from elit.models.transformer import Encoded, Transformer, TransformerConfig, patchify, unpatchify


@dataclass(frozen=True)
class DiTConfig(TransformerConfig):
    """Configures a DiT, or with ``positions="sincos"`` and ``qk_norm=False`` a SiT."""


class DiT(Transformer):
    """Predicts the velocity of x at time t for class y, at a budget of latents.

    Args:
        config: what to build. Weights are drawn from torch's global generator.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        self.patch = triple(config.patch_size)
        values = config.in_channels * math.prod(self.patch)
        self.patch_embed = Linear(values, config.width)
        self.time_embed = TimeEmbed(config.width)
        self.final = FinalLayer(config.width, values)
        init_model(self)

    def embed(self, x: Tensor, size: Triple) -> Tensor:
        return self.add_positions(residual(self.patch_embed(patchify(x, size, self.patch))), size)

    def embed_time(self, t: Tensor) -> Tensor:
        return self.time_embed(t)

    def project(self, s: Tensor, c: Tensor, encoded: Encoded) -> Tensor:
        return unpatchify(self.final(s, c), encoded.size, self.patch).view(-1, *encoded.shape)
