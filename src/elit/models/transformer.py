"""The stack that all backbones share, with or without the latent interface: head, Read, core, Write, tail.

Shapes: B batch, C channels, N spatial tokens, G windows, J latents per window, J~ of them in use, K = G * J~, D width.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elit.conditions import Text, condition_size
from elit.decode import check_types
from elit.errors import ElitError
from elit.interface import InterfaceConfig, LatentInterface, coordinates, triple
from elit.interface.grid import Triple, position_axes
from elit.launch import to_device
from elit.layers import Block, QKNorm, Rotary, RotaryTable, remembered_tables, rotary, sincos_table
from elit.models.base import Levels, Model


@dataclass(frozen=True)
class TransformerConfig:
    """What every backbone's configuration has. The defaults are those of DiT-XL/2 on 256px autoencoder latents.

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
        check_types(self)
        for name in ("in_channels", "width", "depth", "mlp_ratio", "rope_theta"):
            if not 0 < (value := getattr(self, name)) < math.inf:
                raise ElitError(f"{name} is {value}; it must be above 0")
        for name in ("num_classes", "label_std"):
            if not 0 <= (value := getattr(self, name)) < math.inf:
                raise ElitError(f"{name} is {value}; it must be at least 0")
        if round(self.width * self.mlp_ratio) < 1:
            raise ElitError(f"mlp_ratio is {self.mlp_ratio}, which leaves no hidden width of an MLP")
        if self.num_heads < 1 or self.width % self.num_heads or (self.width // self.num_heads) % 2:
            raise ElitError(f"width {self.width} does not give {self.num_heads} heads of an even size")
        if self.interface and (min(self.head_depth, self.tail_depth) < 0 or self.core_depth < 1):
            raise ElitError(
                f"head_depth {self.head_depth} and tail_depth {self.tail_depth} leave no core in depth {self.depth}"
            )
        tokens = self.grid_size  # tells what is no size, or has no whole patches
        if self.positions == "sincos" and (self.width % 4 or tokens[0] > 1):
            raise ElitError("sincos positions need a width divisible by 4 and images; use positions='rotary'")

    @property
    def core_depth(self) -> int:
        return self.depth - self.head_depth - self.tail_depth

    @property
    def qk_norm_kind(self) -> QKNorm:
        """The kind of query-key norm of every block."""
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


Rows = slice | Tensor | None
"""Some samples of a batch; None is all of them, as they stand."""


class Stream(NamedTuple):
    """What blocks take and give: tokens, and what a backbone carries beside them.

    Attributes:
        tokens: (B, L, D); spatial tokens in head and tail, latents in the core.
        text: of a model of text, its words (B, T, D) and their mask.
        skips: of a U-ViT, what earlier blocks gave and later ones will take.
    """

    tokens: Tensor
    text: Text | None = None
    skips: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Encoded:
    """What :meth:`Transformer.encode` knows of a batch: the same at every budget.

    Attributes:
        stream: after the head. Under the interface its tokens stand in windows, (B, G, J, D).
        condition: (B, D).
        size: tokens along (T, H, W).
        shape: of a sample of the input, (C, H, W) or (C, T, H, W).
    """

    stream: Stream
    condition: Tensor
    size: Triple
    shape: tuple[int, ...]

    def take(self, rows: Rows) -> "Encoded":
        """Returns the same of some samples."""
        if rows is None:
            return self
        tokens, text, skips = self.stream
        text = text and Text(text.tokens[rows], text.mask[rows])
        stream = Stream(tokens[rows], text, tuple(skip[rows] for skip in skips))
        return replace(self, stream=stream, condition=self.condition[rows])


class Effect(NamedTuple):
    """What the core blocks changed in a sample, to be used again at a step that skips them.

    Attributes:
        latents: (G, J~, D), or of a batch (B, G, J~, D). A lower level is a slice of it.
        text: (T, D) or (B, T, D), of a model of text.
    """

    latents: Tensor
    text: Tensor | None = None


class Core(NamedTuple):
    """Some samples after the core, all at one level.

    Attributes:
        latents: (B, G, J~, D), and behind them those beyond the budget where Write sees them. Of a plain transformer,
            which has no core, its tokens (B, N, D).
        text: the stream of text after the core.
        rows: which samples of the batch these are.
        entered: the latents (B, G, J~, D) and the text (B, T, D) as they entered the core.
    """

    latents: Tensor
    text: Text | None = None
    rows: Rows = None
    entered: tuple[Tensor, Tensor | None] | None = None

    def effect(self) -> Effect:
        """Returns what the core changed: (B, G, J~, D), and in the text (B, T, D)."""
        assert self.entered is not None
        latents, words = self.entered
        changed = self.latents[:, :, : latents.shape[2]] - latents
        return Effect(changed, None if words is None or self.text is None else self.text.tokens - words)


class Transformer(Model):
    """A stack of blocks between embedding and projection, with or without the interface.

    A backbone says how its input becomes tokens (:meth:`embed`) and a condition (:meth:`condition`), how tokens become
    a velocity (:meth:`project`), and calls :func:`~elit.layers.init_model` at the end of its constructor. One of
    another stack also says what it is made of (:meth:`build_stack`) and how tokens pass it (:meth:`run_blocks`).

    Attributes:
        LEVEL_STEP: levels are multiples of it.
    """

    LEVEL_STEP: ClassVar[int] = 1
    config: TransformerConfig
    blocks: nn.ModuleList

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        self.label_embed = nn.Embedding(config.num_classes + 1, config.width) if config.num_classes else None
        self.build_stack()
        head_dim = config.width // config.num_heads
        self.interface = None
        if config.interface is not None:
            self.interface = LatentInterface(
                config.interface, config.width, config.num_heads, config.grid_size, config.rope_theta, self.LEVEL_STEP
            )
        places = coordinates(config.grid_size, device="cpu")
        if config.positions == "sincos":
            table = sincos_table(places, config.width).to(torch.get_default_device())
            self.positions = nn.Parameter(table, requires_grad=False)
        else:
            self.rope_table = RotaryTable(places, head_dim, config.rope_theta)

    def build_stack(self) -> None:
        """Sets ``blocks``, in the order in which tokens pass them, and what is between them."""
        config = self.config
        self.blocks = nn.ModuleList(
            Block(config.width, config.num_heads, config.mlp_ratio, config.qk_norm_kind) for _ in range(config.depth)
        )

    @property
    def stacks(self) -> list[nn.ModuleList]:
        """The lists of its blocks: one."""
        return [self.blocks]

    def init_weights(self) -> None:
        if self.label_embed is not None:
            nn.init.normal_(self.label_embed.weight, std=self.config.label_std)

    # -------------------------------------------------------------------------------------------- the forward

    def encode(self, x: Any, t: Tensor, y: Any = None) -> Encoded:
        """Embeds a batch and runs the head: all that no budget changes. A plain transformer is all head.

        Args:
            x, t, y: as :meth:`forward`.
        """
        size = self.check_input(x, t, y)
        c = self.condition(t, y)  # (B, D)
        stream = Stream(self.embed(x, size), self.embed_text(y))  # (B, N, D)
        end = self.config.depth if self.interface is None else self.config.head_depth
        stream = self.run_blocks(0, end, stream, c, self.spatial_rope(size, c.device))
        if self.interface is not None:
            windows = self.interface.to_windows(stream.tokens, self.interface.grid_of(size))  # (B, G, J, D)
            stream = stream._replace(tokens=windows)
        return Encoded(stream, c, size, tuple(x.shape[1:]) if isinstance(x, Tensor) else ())

    def at_levels(self, encoded: Encoded, num_latents: Levels, rows: Sequence[int] | None = None) -> Any:
        """Runs Read, core, Write and tail, each sample at its level; see :meth:`Model.at_levels`."""
        if rows is None and isinstance(num_latents, int):
            return self.decode(encoded, self.core(encoded, num_latents))
        rows = range(len(encoded.condition)) if rows is None else rows
        levels = [num_latents] * len(rows) if isinstance(num_latents, int) else num_latents
        return self.at_levels_with_effects(encoded, levels, rows, [None] * len(rows))[0]

    def at_levels_with_effects(
        self, encoded: Encoded, levels: Sequence[int], rows: Sequence[int], effects: Sequence[Effect | None]
    ) -> tuple[Any, Callable[[], dict[int, Effect]]]:
        """Does as :meth:`at_levels`, but skips the core of those rows whose effect is given.

        Args:
            levels, rows: as for :meth:`at_levels`, one level per row.
            effects: what the core is taken to change in each row, at its level or a higher one; None where it runs.

        Returns:
            The velocities, and a function that gives the effects of the cores that ran, by place in ``rows``.
        """
        repeated = self.interface is not None and len(set(rows)) < len(rows)
        latents = self.read(encoded, max(levels)) if repeated else None
        groups: dict[tuple[int, bool], list[int]] = {}  # rows that run at one level, or are skipped at one
        for i, (level, effect) in enumerate(zip(levels, effects, strict=True)):
            groups.setdefault((level, effect is not None), []).append(i)
        cores = []
        for (level, _), group in groups.items():
            of_group = as_rows([rows[i] for i in group], encoded.condition)
            given = [effect for i in group if (effect := effects[i]) is not None]
            cores.append(self.core(encoded, level, of_group, latents, stack_effects(given, level)))
        # A sample that is wanted at two levels is decoded twice, in two batches: none is larger than the caller chose.
        batches = [[core] for core in cores] if repeated else [cores]
        order = [i for group in groups.values() for i in group]
        velocity = in_order([self.decode(encoded, *batch) for batch in batches], order)

        def computed() -> dict[int, Effect]:
            of_groups = zip(groups.items(), cores, strict=True)
            ran = [(group, unbind(core.effect())) for ((_, skipped), group), core in of_groups if not skipped]
            return {i: effect for group, found in ran for i, effect in zip(group, found, strict=True)}

        return velocity, computed

    def read(self, encoded: Encoded, num_latents: int) -> Tensor:
        """Fills latents from the spatial tokens: (B, G, J~, D), or all J of them where the tail is visible."""
        assert self.interface is not None
        return self.interface.read(encoded.stream.tokens, encoded.condition, num_latents)

    def core(
        self,
        encoded: Encoded,
        num_latents: int,
        rows: Rows = None,
        latents: Tensor | None = None,
        effect: Effect | None = None,
    ) -> Core:
        """Runs Read and the core blocks at one level. A plain transformer has none.

        Args:
            num_latents: J~.
            rows: the samples to run; None is all.
            latents: what :meth:`read` gave of all samples at this or a higher level, where it is known already.
            effect: what the blocks are taken to change in these samples, (B, G, J~, D) and (B, T, D), in place of
                running them.
        """
        part = encoded.take(rows)
        if self.interface is None:
            return Core(part.stream.tokens, part.stream.text, rows)
        latents = self.read(part, num_latents) if latents is None else take(latents, rows)
        grid, config = self.interface.grid_of(encoded.size), self.config
        used, text = latents[:, :, :num_latents], part.stream.text  # (B, G, J~, D)
        entered = used, None if text is None else text.tokens
        if effect is not None:
            done = used + effect.latents
            text = text and text._replace(tokens=text.tokens + as_long_as(text.tokens, effect.text))
        else:
            rope = self.interface.core_rope(grid, num_latents, latents.device)
            first, end = config.head_depth, config.depth - config.tail_depth
            stream = self.run_blocks(first, end, Stream(used.flatten(1, 2), text), part.condition, rope)  # (B, K, D)
            done, text = stream.tokens.unflatten(1, (grid.num_windows, -1)), stream.text
        return Core(self.interface.with_tail(done, latents), text, rows, entered)

    def decode(self, encoded: Encoded, *cores: Core) -> Any:
        """Writes latents back into the spatial tokens, runs the tail and projects to velocities.

        Args:
            cores: what :meth:`core` gave. Where there are several, their samples follow each other in the result.
        """
        parts = [encoded.take(core.rows) for core in cores]
        c = cat([part.condition for part in parts])
        if self.interface is None:
            return self.project(cat([core.latents for core in cores]), c, encoded)
        windows = [
            self.interface.write(part.stream.tokens, core.latents) for part, core in zip(parts, cores, strict=True)
        ]
        tokens = self.interface.grid_of(encoded.size).from_windows(cat(windows))  # (B, N, D)
        skips = tuple(cat(of_parts) for of_parts in zip(*(part.stream.skips for part in parts), strict=True))
        words = [core.text for core in cores if core.text is not None]
        text = Text(cat([t.tokens for t in words]), cat([t.mask for t in words])) if words else None
        rope = self.spatial_rope(encoded.size, c.device)
        first, end = self.config.depth - self.config.tail_depth, self.config.depth
        stream = self.run_blocks(first, end, Stream(tokens, text, skips), c, rope)
        return self.project(stream.tokens, c, encoded)

    def run_blocks(self, first: int, end: int, stream: Stream, c: Tensor, rope: Rotary | None) -> Stream:
        """Runs blocks first..end - 1 under condition c (B, D), at rotary positions (L, d / 2)."""
        x = stream.tokens
        for i in range(first, end):
            x = self.blocks[i](x, c, rope)
        return stream._replace(tokens=x)

    # -------------------------------------------------------------------------------------------- what backbones say

    def embed(self, x: Any, size: Triple) -> Tensor:
        """Turns an input into spatial tokens (B, N, D)."""
        raise NotImplementedError

    def embed_time(self, t: Tensor) -> Tensor:
        """Embeds times (B,), of a multi-scale model (B, S): (B, D)."""
        raise NotImplementedError

    def condition(self, t: Tensor, y: Any) -> Tensor:
        """Embeds times and conditions, here labels: (B, D)."""
        time = self.embed_time(t)
        return time if self.label_embed is None else time + self.label_embed(y)

    def project(self, s: Tensor, c: Tensor, encoded: Encoded) -> Any:
        """Turns spatial tokens (B, N, D) under condition c (B, D) into a velocity of the shape of the input."""
        raise NotImplementedError

    def embed_text(self, y: Any) -> Text | None:
        """Turns text into a stream of words (B, T, D) beside the tokens, where a model has one."""
        return None

    def check_input(self, x: Any, t: Tensor, y: Any) -> Triple:
        """Returns the token grid of an input, after a look at shapes (never at values).

        Raises:
            ElitError: another shape than the model takes, or conditions that are missing or too many.
        """
        size = self.check_size(x, y, triple(self.config.patch_size))
        check_batch(x.shape[0], t, y)
        return size

    def check_size(self, x: Tensor, y: Tensor | None, patch: Triple) -> Triple:
        """Returns the token grid of a tensor cut into patches, after a look at its shape and labels.

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

    def add_positions(self, s: Tensor, size: Triple) -> Tensor:
        """Adds sine-cosine positions, where the model has them, to spatial tokens (B, N, D)."""
        if self.config.positions != "sincos":
            return s
        if size == self.config.grid_size:
            return s + self.positions
        return s + token_sincos(size, self.config.width, s.device).to(s.dtype)

    def spatial_rope(self, size: Triple, device: torch.device) -> Rotary | None:
        """Returns rotary positions (N, d / 2) of the spatial tokens: (row, column), for video (time, row, column)."""
        config = self.config
        if config.positions != "rotary":
            return None
        if size == config.grid_size:
            return self.rope_table()
        axes = position_axes(config.grid_size)  # a clip of one frame has the frequencies of longer ones
        return token_rotary(size, axes, config.width // config.num_heads, config.rope_theta, device)


@remembered_tables
def token_rotary(size: Triple, axes: int, head_dim: int, theta: float, device: torch.device) -> Rotary:
    """Returns rotary positions (N, d / 2) of the tokens of any grid."""
    return rotary(coordinates(size, axes, device), head_dim, theta)


@remembered_tables
def token_sincos(size: Triple, width: int, device: torch.device) -> Tensor:
    """Returns sine-cosine positions (N, D) of the tokens of any grid."""
    return sincos_table(coordinates(size, device="cpu"), width).to(device)


def check_batch(batch_size: int, t: Tensor, y: Any, stages: int | None = None) -> None:
    """Looks whether there is one time (or one for each stage) and one condition per sample.

    Raises:
        ElitError: there is not.
    """
    wanted = (batch_size,) if stages is None else (batch_size, stages)
    if tuple(t.shape) != wanted:
        raise ElitError(f"t has shape {tuple(t.shape)}; for this input it must be {wanted}")
    if y is not None and (condition_size(y) != batch_size or (isinstance(y, Tensor) and y.dim() != 1)):
        raise ElitError(f"{condition_size(y)} conditions for {batch_size} samples; give one for each")


def take(x: Tensor, rows: Rows) -> Tensor:
    return x if rows is None else x[rows]


def cat(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts))


def stack_effects(effects: Sequence[Effect], num_latents: int) -> Effect | None:
    """Puts the effects of samples into a batch, cut to a level; None where there are none.

    Those on text are padded to the same length, for nothing looks at padding.
    """
    if not effects:
        return None
    latents = torch.stack([effect.latents[:, :num_latents] for effect in effects])
    words = [effect.text for effect in effects if effect.text is not None]
    return Effect(latents, nn.utils.rnn.pad_sequence(words, batch_first=True) if words else None)


def unbind(effect: Effect) -> list[Effect]:
    """Returns the effects of each sample of a batch, each with memory of its own."""
    words = [None] * len(effect.latents) if effect.text is None else effect.text.unbind()
    return [Effect(a.clone(), b if b is None else b.clone()) for a, b in zip(effect.latents, words, strict=True)]


def as_long_as(words: Tensor, change: Tensor | None) -> Tensor:
    """Pads or cuts a change of text (B, T', D) to the length of the words (B, T, D), beyond which is padding."""
    assert change is not None
    return F.pad(change, (0, 0, 0, words.shape[1] - change.shape[1]))


def as_rows(rows: Sequence[int], batch: Tensor) -> Rows:
    """Returns rows as they are selected fastest: None for all in order, a slice for a run, else an index."""
    first, end = rows[0], rows[-1] + 1
    if list(rows) != list(range(first, end)):
        return to_device(rows, batch.device)
    return None if end - first == len(batch) else slice(first, end)


def in_order(batches: Sequence[Any], order: list[int]) -> Any:
    """Puts samples that were computed in batches and in some order, tensors or lists of tensors, back into place."""
    if isinstance(batches[0], list):
        return [in_order(stage, order) for stage in zip(*batches, strict=True)]
    x = cat(batches)
    if order == list(range(len(order))):
        return x
    return x[to_device(sorted(range(len(order)), key=order.__getitem__), x.device)]


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
