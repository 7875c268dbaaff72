"""DiT and SiT, with or without the latent interface: one class, on the stack that other backbones reuse.

Shapes: B batch, C channels, N spatial tokens, G windows, J~ latents per window in use, K = G * J~, D width. Time t =
1 is noise, t = 0 data.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from elit.errors import ElitError
from elit.interface import InterfaceConfig, LatentInterface, coordinates, triple
from elit.interface.grid import Triple, position_axes
from elit.layers import Block, FinalLayer, QKNorm, Rotary, RotaryTable, TimeEmbed, init_model, rotary, sincos_table
from elit.models.base import Model


@dataclass(frozen=True)
class DiTConfig:
    """A diffusion transformer. The defaults are those of DiT-XL/2 on 256px autoencoder latents.

    Attributes:
        input_size: side of the model's input, (height, width), or (time, height, width) for video; in autoencoder
            latents or pixels.
        patch_size: side of a patch, or (time, height, width).
        in_channels: channels of the input and of the velocity.
        num_classes: number of labels; 0 is an unconditional model.
        width: D.
        depth: number of blocks in all.
        num_heads: heads of every attention.
        head_depth, tail_depth: blocks before Read and after Write; the rest is the core. Without meaning where there
            is no interface.
        positions: ``rotary`` (DiT of the paper) or ``sincos`` (SiT: a fixed table added to the tokens).
        qk_norm: RMS norm of queries and keys in every block.
        rope_theta: base of the rotary frequencies.
        mlp_ratio: hidden width of a block's MLP over D.
        label_std: standard deviation of new label embeddings.
        interface: the latent interface; None is the plain transformer.
    """

    input_size: int | tuple[int, ...] = 32
    patch_size: int | tuple[int, ...] = 2
    in_channels: int = 4
    num_classes: int = 1000
    width: int = 1152
    depth: int = 28
    num_heads: int = 16
    head_depth: int = 4
    tail_depth: int = 4
    positions: Literal["rotary", "sincos"] = "rotary"
    qk_norm: bool = True
    rope_theta: float = 100.0
    mlp_ratio: float = 4.0
    label_std: float = 0.02
    interface: InterfaceConfig | None = None

    def __post_init__(self) -> None:
        if self.num_heads < 1 or self.width % self.num_heads or (self.width // self.num_heads) % 2:
            raise ElitError(f"width {self.width} does not give {self.num_heads} heads of an even size")
        if self.interface and (min(self.head_depth, self.tail_depth) < 0 or self.core_depth < 1):
            raise ElitError(
                f"head_depth {self.head_depth} and tail_depth {self.tail_depth} leave no core in depth {self.depth}"
            )
        if self.positions == "sincos" and (self.width % 4 or self.grid_size[0] > 1):
            raise ElitError("sincos positions need a width divisible by 4 and images; use positions='rotary'")

    @property
    def core_depth(self) -> int:
        return self.depth - self.head_depth - self.tail_depth

    @property
    def qk_norm_kind(self) -> QKNorm:
        """That of every block."""
        return "head" if self.qk_norm else "none"

    @property
    def grid_size(self) -> Triple:
        """Tokens along (T, H, W)."""
        return tokens_of(triple(self.input_size), triple(self.patch_size))


def tokens_of(size: Triple, patch: Triple) -> Triple:
    """Tokens along (T, H, W) of an input of some size.

    Raises:
        ElitError: the patches do not tile it.
    """
    for pixels, side in zip(size, patch, strict=True):
        if pixels % side:
            raise ElitError(f"patch size {patch} does not divide the input size {size}")
    return size[0] // patch[0], size[1] // patch[1], size[2] // patch[2]


class Transformer(Model):
    """The stack between embedding and projection: blocks, positions and labels, with or without the interface.

    A backbone adds how its input becomes tokens and a condition, how tokens become a velocity, and at the end of its
    constructor calls :func:`~elit.layers.init_model`. One of another stack says what it is made of
    (:meth:`build_stack`) and how tokens pass it (:meth:`transform`).

    Attributes:
        LEVEL_STEP: levels are multiples of it.
    """

    LEVEL_STEP: ClassVar[int] = 1
    config: DiTConfig
    blocks: nn.ModuleList

    def __init__(self, config: DiTConfig) -> None:
        super().__init__(config)
        self.label_embed = nn.Embedding(config.num_classes + 1, config.width) if config.num_classes else None
        self.build_stack()
        head_dim = config.width // config.num_heads
        self.interface = None
        if config.interface is not None:
            self.interface = LatentInterface(
                config.interface, config.width, config.num_heads, config.grid_size, config.rope_theta, self.LEVEL_STEP
            )
        if config.positions == "sincos":
            self.positions = nn.Parameter(
                sincos_table(coordinates(config.grid_size), config.width), requires_grad=False
            )
        else:
            self.rope_table = RotaryTable(coordinates(config.grid_size), head_dim, config.rope_theta)

    def build_stack(self) -> None:
        """Sets ``blocks``, in the order in which tokens pass them, and what is between them."""
        config = self.config
        self.blocks = nn.ModuleList(
            Block(config.width, config.num_heads, config.mlp_ratio, config.qk_norm_kind) for _ in range(config.depth)
        )

    def init_weights(self) -> None:
        if self.label_embed is not None:
            nn.init.normal_(self.label_embed.weight, std=self.config.label_std)

    def check_input(self, x: Tensor, y: Tensor | None, patch: Triple) -> Triple:
        """The token grid of an input, after a look at its shape and labels (never at their values).

        Raises:
            ElitError: another shape than the model takes, or labels that are missing or too many.
        """
        config = self.config
        if x.dim() not in (4, 5) or x.shape[1] != config.in_channels:
            raise ElitError(
                f"input of shape {tuple(x.shape)}; the model takes (batch, {config.in_channels}, height, width)"
            )
        if (y is None) != (self.label_embed is None):
            want = "takes no labels" if y is not None else f"needs labels 0..{config.num_classes - 1}"
            raise ElitError(f"the model {want} (num_classes is {config.num_classes})")
        size = tokens_of(triple(tuple(x.shape[2:])), patch)
        if size[0] > 1 and config.grid_size[0] == 1:
            raise ElitError(f"input of shape {tuple(x.shape)} is video, and the model is one of images")
        return size

    def place(self, s: Tensor, size: Triple) -> Tensor:
        """Adds the sine-cosine positions, where the model has them, to spatial tokens (B, N, D)."""
        if self.config.positions != "sincos":
            return s
        if size == self.config.grid_size:
            return s + self.positions
        return s + sincos_table(coordinates(size), self.config.width).to(s)

    def condition(self, time: Tensor, y: Tensor | None) -> Tensor:
        """The condition (B, D): embedded times (B, D) plus embedded labels."""
        return time if self.label_embed is None else time + self.label_embed(y)

    def transform(self, s: Tensor, c: Tensor, size: Triple, level: int) -> Tensor:
        """Spatial tokens s (B, N, D) under condition c (B, D), at J~ = ``level`` latents a window: (B, N, D)."""
        rope = self.spatial_rope(size, s.device)
        if self.interface is None:
            return run(self.blocks, s, c, rope)
        grid = self.interface.grid_of(size)
        core, tail = self.config.head_depth, self.config.depth - self.config.tail_depth
        s = run(self.blocks[:core], s, c, rope)  # (B, N, D)
        latents, spatial = self.interface.read(s, c, grid, level)  # (B, K, D)
        latents = run(self.blocks[core:tail], latents, c, self.interface.core_rope(grid, level, s.device))
        s = self.interface.write(latents, spatial, grid)  # (B, N, D)
        return run(self.blocks[tail:], s, c, rope)

    def spatial_rope(self, size: Triple, device: torch.device) -> Rotary | None:
        """Rotary positions (N, d / 2) of the spatial tokens: (row, column), for video (time, row, column)."""
        config = self.config
        if config.positions != "rotary":
            return None
        if size == config.grid_size:
            return self.rope_table()
        axes = position_axes(config.grid_size)  # a clip of one frame has the frequencies of longer ones
        return rotary(coordinates(size, axes, device), config.width // config.num_heads, config.rope_theta)


class DiT(Transformer):
    """Velocity of x at time t for class y, at a budget of latents.

    Args:
        config: what to build. Weights are drawn from torch's global generator.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__(config)
        self.patch = triple(config.patch_size)
        values = config.in_channels * math.prod(self.patch)
        self.patch_embed = nn.Linear(values, config.width)
        self.time_embed = TimeEmbed(config.width)
        self.final = FinalLayer(config.width, values)
        init_model(self)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None, budget: float | None = None) -> Tensor:
        """Velocity of the same shape as x.

        Args:
            x: (B, C, H, W), or (B, C, T, H, W) for video, in the dtype of the weights.
            t: (B,) in [0, 1], float32.
            y: (B,) labels; the label ``num_classes`` is the null class. None for an unconditional model.
            budget: fraction of the latents in (0, 1]; None is all of them.

        Raises:
            ElitError: a budget outside (0, 1] or without an interface, labels that are missing, or a size that does
                not fit.
        """
        level = self.level(budget)
        size = self.check_input(x, y, self.patch)
        s = self.embed(x, size)  # (B, N, D)
        c = self.condition(self.time_embed(t), y)  # (B, D)
        s = self.transform(s, c, size, level)  # head, Read, core, Write, tail
        return self.project(s, c, size).view_as(x)

    def embed(self, x: Tensor, size: Triple) -> Tensor:
        """Spatial tokens (B, N, D) of an input."""
        return self.place(self.patch_embed(patchify(x, size, self.patch)), size)

    def project(self, s: Tensor, c: Tensor, size: Triple) -> Tensor:
        """Velocity (B, C, T, H, W) of spatial tokens."""
        return unpatchify(self.final(s, c), size, self.patch)


def run(blocks: nn.ModuleList, x: Tensor, c: Tensor, rope: Rotary | None) -> Tensor:
    for block in blocks:
        x = block(x, c, rope)
    return x


def patchify(x: Tensor, size: Triple, patch: Triple) -> Tensor:
    """(B, C, H, W) or (B, C, T, H, W) -> (B, N, values of a patch as (time, row, column, channel))."""
    (t, h, w), (pt, ph, pw) = size, patch
    x = x.reshape(x.shape[0], x.shape[1], t, pt, h, ph, w, pw).permute(0, 2, 4, 6, 3, 5, 7, 1)
    return x.reshape(x.shape[0], t * h * w, -1)


def unpatchify(x: Tensor, size: Triple, patch: Triple) -> Tensor:
    """The inverse of :func:`patchify`: (B, N, values) -> (B, C, T, H, W)."""
    (t, h, w), (pt, ph, pw) = size, patch
    x = x.reshape(x.shape[0], t, h, w, pt, ph, pw, -1).permute(0, 7, 1, 4, 2, 5, 3, 6)
    return x.reshape(x.shape[0], -1, t * pt, h * ph, w * pw)
