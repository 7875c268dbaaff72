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
from elit.layers import FinalLayer, TimeEmbed, init_model
from elit.models.dit import DiTConfig, Transformer, patchify, unpatchify


@dataclass(frozen=True)
class DFMConfig(DiTConfig):
    """A multi-scale diffusion transformer: :class:`DiTConfig`, whose input and patch size are those of the last stage.

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
        """What a size of the last stage is in another one, as (time, height, width)."""
        frames, height, width = triple(size)
        shrink = 2 ** (self.stages - 1 - stage)
        return frames, height // shrink, width // shrink


class DFM(Transformer):
    """Velocities of all stages of a pyramid, at the times of the stages, for class y.

    Args:
        config: what to build. Weights are drawn from torch's global generator.
    """

    config: DFMConfig

    def __init__(self, config: DFMConfig) -> None:
        super().__init__(config)
        self.patches = [config.of_stage(config.patch_size, stage) for stage in range(config.stages)]
        values = [config.in_channels * math.prod(patch) for patch in self.patches]
        self.patch_embed = nn.ModuleList(nn.Linear(n, config.width) for n in values)
        self.time_embed = nn.ModuleList(TimeEmbed(config.width) for _ in values)
        self.final = nn.ModuleList(FinalLayer(config.width, n) for n in values)
        init_model(self)

    @property
    def stage_shapes(self) -> list[tuple[int, int, int]]:
        """(C, H_k, W_k) of every stage."""
        config = self.config
        sizes = (config.of_stage(config.input_size, stage) for stage in range(config.stages))
        return [(config.in_channels, height, width) for _, height, width in sizes]

    def example(self, batch_size: int) -> tuple[list[Tensor], Tensor]:
        """Random x and t of the shapes that a forward takes, as :meth:`Model.example`."""
        device = self.device
        x = [torch.randn(batch_size, *shape, device=device, dtype=self.dtype) for shape in self.stage_shapes]
        return x, torch.rand(batch_size, self.config.stages, device=device)

    def forward(
        self,
        x: Sequence[Tensor],
        t: Tensor,
        y: Tensor | None = None,
        budget: float | None = None,
        active: int | None = None,
    ) -> list[Tensor]:
        """Velocities of the same shapes as x.

        Args:
            x: one (B, C, H_k, W_k) per stage, in the dtype of the weights.
            t: (B, S) in [0, 1], float32: the time of each stage.
            y: (B,) labels; the label ``num_classes`` is the null class. None for an unconditional model.
            budget: fraction of the latents in (0, 1]; None is all of them.
            active: number of stages, from the coarsest, that the model sees; the input of the others is masked (their
                times are not, and the velocities it gives for them mean nothing). None is all.

        Raises:
            ElitError: another number of stages, sizes that do not fit, or whatever DiT refuses.
        """
        level = self.level(budget)
        size = self.check_stages(x, t, y, active)
        s = self.place(self.embed(x, size, len(x) if active is None else active), size)  # (B, N, D)
        times = torch.stack([embed(t[:, k]) for k, embed in enumerate(self.time_embed)])
        c = self.condition(times.sum(0), y)  # (B, D)
        s = self.transform(s, c, size, level)  # head, Read, core, Write, tail
        ends = zip(x, self.final, self.patches, strict=True)
        return [unpatchify(final(s, c), size, patch).view_as(stage) for stage, final, patch in ends]

    def check_stages(self, x: Sequence[Tensor], t: Tensor, y: Tensor | None, active: int | None) -> Triple:
        """The token grid that all stages share."""
        stages = self.config.stages
        if len(x) != stages or tuple(t.shape[1:]) != (stages,):
            raise ElitError(
                f"{len(x)} stages at times of shape {tuple(t.shape)}; the model takes {stages} at (batch, {stages})"
            )
        if active is not None and not 1 <= active <= stages:
            raise ElitError(f"active is {active}; of {stages} stages, 1 to {stages} can be active")
        sizes = [self.check_input(stage, y, patch) for stage, patch in zip(x, self.patches, strict=True)]
        if len(set(sizes)) > 1:
            raise ElitError(f"the stages have {sizes} tokens; each must be half the size of the next")
        return sizes[0]

    def embed(self, x: Sequence[Tensor], size: Triple, active: int) -> Tensor:
        """Spatial tokens (B, N, D), summed over the stages.

        A masked stage enters as zeros. To leave it out would be another function, for its bias counts, and would leave
        its weights without a gradient, which distributed training wants of every parameter.
        """
        seen = [stage if k < active else torch.zeros_like(stage) for k, stage in enumerate(x)]
        ends = zip(seen, self.patch_embed, self.patches, strict=True)
        return torch.stack([embed(patchify(stage, size, patch)) for stage, embed, patch in ends]).sum(0)
