"""DFM: a diffusion transformer on the stages of a Laplacian pyramid, each with its own time (Haji-Ali et al. 2025).

Stage 0 is the coarsest of S. Every stage has the same tokens: stage k is half the size of stage k + 1 and has patches
half as wide. The model differs from DiT at its two ends only, so the latent interface works in it as it is.
Shapes: B batch, C channels, H_k x W_k size of stage k, N tokens, D width.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from elit.errors import ElitError
from elit.interface import triple
from elit.interface.grid import Triple
from elit.layers import FinalLayer, Linear, TimeEmbed, init_model, residual
from elit.models.transformer import Encoded, Transformer, TransformerConfig, check_batch, patchify, unpatchify


@dataclass(frozen=True)
class DFMConfig(TransformerConfig):
    """Configures a multi-scale model. Input and patch size of :class:`TransformerConfig` are those of the last stage.

    Attributes:
        stages: S, the number of stages.
    """

    stages: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        frames, *sides = triple(self.patch_size)
        if self.stages < 1 or frames > 1 or any(side % 2 ** (self.stages - 1) for side in sides):
            raise ElitError(
                f"patch size {self.patch_size} cannot be halved for each of {self.stages} stages; "
                f"take a multiple of {2 ** (max(self.stages, 1) - 1)}"
            )
        if self.grid_size[0] > 1:
            raise ElitError(f"a multi-scale model takes images, not an input of {self.input_size}")

    def of_stage(self, size: int | tuple[int, ...], stage: int) -> Triple:
        """Scales a size of the last stage to another stage, as (time, height, width)."""
        frames, height, width = triple(size)
        shrink = 2 ** (self.stages - 1 - stage)
        return frames, height // shrink, width // shrink


class DFM(Transformer):
    """Predicts the velocities of all stages of a pyramid, each at its own time, for class y.

    It takes x as a list of stages (B, C, H_k, W_k) and t as (B, S), and returns a list of velocities.

    Args:
        config: what to build. Weights are drawn from torch's global generator.
    """

    config: DFMConfig

    def __init__(self, config: DFMConfig) -> None:
        super().__init__(config)
        self.patches = [config.of_stage(config.patch_size, stage) for stage in range(config.stages)]
        values = [config.in_channels * math.prod(patch) for patch in self.patches]
        self.patch_embed = nn.ModuleList(Linear(n, config.width) for n in values)
        self.time_embed = nn.ModuleList(TimeEmbed(config.width) for _ in values)
        self.final = nn.ModuleList(FinalLayer(config.width, n) for n in values)
        init_model(self)

    @property
    def stage_shapes(self) -> list[tuple[int, ...]]:
        """The shapes (C, H_k, W_k) of the stages, the coarsest first."""
        config = self.config
        sizes = (config.of_stage(config.input_size, stage) for stage in range(config.stages))
        return [(config.in_channels, height, width) for _, height, width in sizes]

    def check_input(self, x: Sequence[Tensor], t: Tensor, y: Tensor | None) -> Triple:
        stages = self.config.stages
        if len(x) != stages or tuple(t.shape[1:]) != (stages,):
            raise ElitError(
                f"{len(x)} stages at times of shape {tuple(t.shape)}; the model takes {stages} at (batch, {stages})"
            )
        sizes = [self.check_size(stage, y, patch) for stage, patch in zip(x, self.patches, strict=True)]
        if len(set(sizes)) > 1:
            raise ElitError(f"the stages have {sizes} tokens; each must be half the size of the next")
        for stage in x:
            check_batch(stage.shape[0], t, y, stages)
        return sizes[0]

    def embed_time(self, t: Tensor) -> Tensor:
        return torch.stack([embed(t[:, k]) for k, embed in enumerate(self.time_embed)]).sum(0)

    def embed(self, x: Sequence[Tensor], size: Triple) -> Tensor:
        """Embeds every stage and returns the sum of their tokens: (B, N, D).

        Callers mask a stage by giving zeros. Leaving it out would compute something else, because its bias counts, and
        its weights would get no gradient, which distributed training expects of every parameter.
        """
        ends = zip(x, self.patch_embed, self.patches, strict=True)
        tokens = torch.stack([embed(patchify(stage, size, patch)) for stage, embed, patch in ends]).sum(0)
        return self.add_positions(residual(tokens), size)

    def project(self, s: Tensor, c: Tensor, encoded: Encoded) -> list[Tensor]:
        """Returns the velocity (B, C, H_k, W_k) of every stage."""
        ends = zip(self.final, self.patches, strict=True)
        return [unpatchify(final(s, c), encoded.size, patch).squeeze(2) for final, patch in ends]
