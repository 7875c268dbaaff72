"""Checkpoints of the published ELIT code (``.pt``): read safely, rebuilt as a model of ours, and written back.

Such a file is a pickled dict: ``ema`` and ``model`` (averaged and raw tensors by name), ``opt`` (optimizer state, not
looked at), ``args`` (an ``argparse.Namespace``) and ``steps``. For users: docs/published-checkpoints.md.
"""

import logging
import math
import pickle
import re
import zipfile
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from elit.atomic import atomic_file
from elit.errors import ElitError, first_line
from elit.interface import InterfaceConfig, triple
from elit.interface.budget import valid_levels
from elit.models.base import Model
from elit.models.dfm import DFMConfig
from elit.models.dit import DiTConfig
from elit.models.registry import NAME, RELEASED_SPLITS, SIZES, build_on_meta, describe_name
from elit.models.transformer import TransformerConfig
from elit.tensors import check_fit

logger = logging.getLogger("elit")

PROJECTORS = "projectors."  # heads of the REPA loss, of no use after training
DOWNSAMPLE = 8  # pixels per latent of the autoencoder that the published code works with

# ------------------------------------------------------------------------------------------------ names and layouts


class Layout(NamedTuple):
    """Moves the values of a tensor between the published arrangement and ours."""

    to_ours: Callable[[Tensor, Model], Tensor]
    to_published: Callable[[Tensor, Model], Tensor]


def _patch_side(linear: Tensor, model: Model) -> int:
    return math.isqrt(linear.shape[1] // model.config.in_channels)


def _latent_order(model: Model) -> Tensor:
    """Returns the raster position of each latent, in the group-major order of latents."""
    assert model.interface is not None
    return model.interface.grid.raster_index().flatten()


def _reorder(rows: Tensor, order: Tensor) -> Tensor:
    """Puts the rows of the grid in another order; those beyond the grid stay."""
    return torch.cat((rows[order], rows[len(order) :]))


AS_IS = Layout(lambda x, _: x, lambda x, _: x)
BATCHED = Layout(lambda x, _: x[0], lambda x, _: x[None])
CONVOLUTION = Layout(  # (D, C, p, p) <-> (D, p * p * C)
    lambda x, _: x.permute(0, 2, 3, 1).flatten(1),
    lambda x, model: x.unflatten(1, 2 * (_patch_side(x, model),) + (-1,)).permute(0, 3, 1, 2).contiguous(),
)
RASTER = Layout(  # indexed by raster position <-> group-major
    lambda x, model: _reorder(x, _latent_order(model)),
    lambda x, model: _reorder(x, _latent_order(model).argsort()),
)


class Row(NamedTuple):
    """Pairs the published name of a parameter, or of a module with all that is in it, with ours; # is a number."""

    published: str
    ours: str
    layout: Layout = AS_IS


def _cross_attention(published: str, ours: str) -> tuple[Row, ...]:
    return (
        Row(f"{published}.q_proj", f"{ours}.q"),
        Row(f"{published}.kv_proj", f"{ours}.kv"),
        Row(f"{published}.q_norm.scale", f"{ours}.q_norm.weight"),
        Row(f"{published}.k_norm.scale", f"{ours}.k_norm.weight"),
        Row(f"{published}.proj", f"{ours}.proj"),
    )


READ, WRITE = "input_token_editor.adapters.0", "output_token_editor.adapters.0"
TABLE = (
    Row("pos_embed", "positions", BATCHED),
    Row("x_embedder.proj.weight", "patch_embed.weight", CONVOLUTION),
    Row("x_embedder.proj.bias", "patch_embed.bias"),
    Row("t_embedder.mlp.0", "time_embed.fc1"),
    Row("t_embedder.mlp.2", "time_embed.fc2"),
    Row("y_embedder.embedding_table", "label_embed"),
    Row("blocks.#.attn", "blocks.#.attention"),
    Row("blocks.#.mlp", "blocks.#.mlp"),
    Row("blocks.#.adaLN_modulation.1", "blocks.#.modulation.linear"),
    Row("final_layer.linear", "final.linear"),
    Row("final_layer.adaLN_modulation.1", "final.modulation.linear"),
    # The multi-scale model
    Row("x_embedder.embedders.#.proj.weight", "patch_embed.#.weight", CONVOLUTION),
    Row("x_embedder.embedders.#.proj.bias", "patch_embed.#.bias"),
    Row("t_embedder.embedders.#.mlp.0", "time_embed.#.fc1"),
    Row("t_embedder.embedders.#.mlp.2", "time_embed.#.fc2"),
    Row("final_layer.projections.#.linear", "final.#.linear"),
    Row("final_layer.projections.#.adaLN_modulation.1", "final.#.modulation.linear"),
    # The interface
    Row(f"{READ}.learned_query_embed", "interface.latents"),
    Row(f"{READ}.pos_embed", "interface.read_positions"),
    Row(f"{READ}.latent_pos_embed", "interface.latent_positions", RASTER),
    Row(f"{READ}.fit_layer.adaLN_modulation.1", "interface.read_layer.modulation.linear"),
    Row(f"{READ}.fit_layer.read_ff.0", "interface.read_layer.mlp"),
    *_cross_attention(f"{READ}.fit_layer.latents_attend_to_patches.0", "interface.read_layer.attention"),
    Row(f"{WRITE}.pos_embed", "interface.write_positions"),
    Row(f"{WRITE}.write_ff.#", "interface.write_layers.#.mlp"),
    *_cross_attention(f"{WRITE}.patches_attend_to_latents.#", "interface.write_layers.#.attention"),
)


def translate(name: str, side: Literal["published", "ours"]) -> tuple[str, Layout]:
    """Finds the name on the other side of :data:`TABLE`, and the layout, for a name of one side.

    Raises:
        KeyError: no row has it.
    """
    for row in TABLE:
        here, there = (row.published, row.ours) if side == "published" else (row.ours, row.published)
        match = re.fullmatch(re.escape(here).replace(r"\#", r"(\d+)") + r"(\..+)?", name)
        if match:
            *numbers, rest = match.groups(default="")
            for number in numbers:
                there = there.replace("#", number, 1)
            return there + rest, row.layout
    raise KeyError(name)


def to_ours(tensors: dict[str, Tensor], model: Model) -> dict[str, Tensor]:
    """Converts published tensors to our names and layouts; ``model`` tells the sizes."""
    translated = ((translate(name, "published"), tensor) for name, tensor in tensors.items())
    return {name: layout.to_ours(tensor, model) for (name, layout), tensor in translated}


def to_published(model: Model) -> dict[str, Tensor]:
    """Converts the tensors of a model to their published names and layouts."""
    translated = ((translate(name, "ours"), tensor) for name, tensor in model.state_dict().items())
    return {name: layout.to_published(tensor, model) for (name, layout), tensor in translated}


# ------------------------------------------------------------------------------------------------ reading


@dataclass(frozen=True)
class Checkpoint:
    """Holds what is of use in a published file.

    Attributes:
        source: the file.
        key: ``ema`` or ``model``, whose tensors these are.
        tensors: by published name, mapped from the file.
        args: of training, as far as the file has them.
        steps: of training; 0 if the file does not tell.
    """

    source: Path
    key: str
    tensors: dict[str, Tensor]
    args: Namespace
    steps: int

    def shape(self, name: str, dims: int) -> tuple[int, ...]:
        """Returns the shape of a tensor that every such model has.

        Raises:
            ElitError: it is not there, or has not so many dimensions.
        """
        if name not in self.tensors:
            raise ElitError(f"{self.source} is no published SiT, ELIT-SiT or DFM-SiT: it lacks {name}")
        shape = tuple(self.tensors[name].shape)
        if len(shape) != dims or 0 in shape:
            raise ElitError(f"{self.source} has a wrong shape: {name} is {list(shape)}, not of {dims} dimensions")
        return shape

    def count(self, prefix: str) -> int:
        """Counts the modules ``prefix.0``, ``prefix.1``, ...

        Raises:
            ElitError: one between them is missing.
        """
        found = {int(m[1]) for name in self.tensors if (m := re.match(re.escape(prefix) + r"\.([0-9]{1,4})\.", name))}
        for number in range(len(found)):
            if number not in found:
                raise ElitError(f"{self.source} lacks all of {prefix}.{number}")
        return len(found)

    def arg(self, name: str, *kinds: type) -> Any:
        """Returns a value of ``args``; None where there is none.

        Raises:
            ElitError: it is of another type.
        """
        value = getattr(self.args, name, None)
        if value is not None and type(value) not in kinds:
            raise ElitError(f"{self.source}: args.{name} is {value!r}, not of type {kinds[0].__name__}")
        return value


def read(path: Path, weights: Literal["ema", "raw"] = "ema") -> Checkpoint:
    """Opens a published file. Nothing in it is executed: it may hold tensors, plain values and an argparse.Namespace.

    Args:
        weights: ``ema``, or where there is none the raw weights; or ``raw``.

    Raises:
        ElitError: another kind of file, a damaged one, or one with anything else in it.
    """
    contents = _unpickle(path)
    if not isinstance(contents, dict):
        raise ElitError(f"{path} is no published checkpoint: it holds a {type(contents).__name__}, not a dict")
    key = "ema" if weights == "ema" and "ema" in contents else "model"
    tensors = contents.get(key)
    if not isinstance(tensors, dict):
        raise ElitError(f"{path} is no published checkpoint: it has no weights under {key!r}")
    tensors = {name: tensor for name, tensor in tensors.items() if not str(name).startswith(PROJECTORS)}
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not _is_weight(tensor):
            raise ElitError(f"{path} holds {name!r} under {key!r}, which is no tensor of floating-point numbers")
    args, steps = contents.get("args", Namespace()), contents.get("steps")
    if not isinstance(args, Namespace):
        raise ElitError(f"{path} is no published checkpoint: its args are a {type(args).__name__}, not a Namespace")
    return Checkpoint(path, key, tensors, args, steps if isinstance(steps, int) else 0)


def _unpickle(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError as error:
        raise ElitError(f"cannot read {path} ({error.strerror})") from error
    if not start:
        raise ElitError(f"{path} is empty; copy or download it again")
    if not zipfile.is_zipfile(path):  # the directory of a zip file is at its end
        if start.startswith(b"PK"):
            raise ElitError(f"{path} is cut short; copy or download it again")
        raise ElitError(f"{path} is no PyTorch checkpoint; give a published .pt file, a run directory or a saved model")
    try:
        with torch.serialization.safe_globals([Namespace]):
            # Mapped: a tensor is read from disk when it is used, and what is not used (the raw weights, two optimizer
            # moments) never takes memory.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        culprit = re.search(r"GLOBAL (\S+)", str(error))
        what = culprit[1] if culprit else "something"
        raise ElitError(
            f"{path} is refused: it holds {what}, which is neither tensor nor plain value; nothing in it was run"
        ) from error
    except Exception as error:  # damaged bytes make torch raise anything
        reason = first_line(error)
        raise ElitError(f"{path} is damaged or no checkpoint ({reason}); copy or download it again") from error


def _is_weight(value: object) -> bool:
    return (
        isinstance(value, Tensor)
        and value.is_floating_point()
        and value.layout == torch.strided
        and value.device.type == "cpu"
    )


# ------------------------------------------------------------------------------------------------ the architecture


def recover_config(
    found: Checkpoint, num_heads: int | None = None, head_depth: int | None = None, tail_depth: int | None = None
) -> TransformerConfig:
    """Finds the configuration of a published model in its tensors' shapes and, where those do not say, in its args.

    Args:
        num_heads, head_depth, tail_depth: go before what the file says.

    Raises:
        ElitError: a tensor that tells a size is missing or has an impossible shape, or something stays open.
    """
    name = found.arg("model", str) or ""
    stages = found.count("x_embedder.embedders")
    multi_scale = stages > 0 or "DFM-" in name
    elastic = name.startswith("ELIT-") or any(k.startswith((f"{READ}.", f"{WRITE}.")) for k in found.tensors)
    if not elastic and (head_depth, tail_depth) != (None, None):
        raise ElitError(f"{found.source} has no latent interface, so no head_depth or tail_depth")
    if found.arg("prediction", str) not in (None, "v"):
        raise ElitError(f"{found.source} predicts {found.args.prediction!r}; only velocities ('v') are supported")

    _, tokens, width = found.shape("pos_embed", 3)
    embedder = f"x_embedder.embedders.{max(stages - 1, 0)}" if multi_scale else "x_embedder"
    _, channels, patch, _ = found.shape(f"{embedder}.proj.weight", 4)
    hidden, _ = found.shape("blocks.0.mlp.fc1.weight", 2)
    depth = found.count("blocks")

    named = NAME.fullmatch(name)
    size = named["size"] if named and SIZES[named["size"]][:2] == (depth, width) else None
    split = RELEASED_SPLITS[size] if size else (None, None) if elastic else (DiTConfig.head_depth, DiTConfig.tail_depth)

    def decide(what: str, *candidates: int | None) -> int:
        for value in candidates:
            if value is not None:
                return value
        raise ElitError(
            f"{found.source} leaves {what} open: {depth} blocks of width {width}, called {name!r}, are no published "
            f"size; give elit.load(..., {what}=N), or convert it once: elit convert {found.source} FOLDER "
            f"--{what.replace('_', '-')} N"
        )

    config = DiTConfig(
        input_size=patch * _side(tokens, found, "pos_embed"),
        patch_size=patch,
        in_channels=channels,
        num_classes=_num_classes(found),
        width=width,
        depth=depth,
        num_heads=decide("num_heads", num_heads, found.arg("num_heads", int), SIZES[size][2] if size else None),
        head_depth=decide("head_depth", head_depth, found.arg("encoder_depth", int), split[0]),
        tail_depth=decide("tail_depth", tail_depth, found.arg("tail_depth", int), split[1]),
        positions="sincos",
        qk_norm=bool(found.arg("qk_norm", bool)) or "blocks.0.attn.q_norm.weight" in found.tensors,
        mlp_ratio=hidden / width,
        interface=_interface(found) if elastic else None,
    )
    return DFMConfig(**vars(config), stages=max(stages, 1)) if multi_scale else config


def _interface(found: Checkpoint) -> InterfaceConfig:
    num_latents, _ = found.shape(f"{READ}.learned_query_embed", 2)
    tail_visible = found.arg("elit_tail_visible", bool)  # of our own exports
    return InterfaceConfig(
        group_size=_side(num_latents, found, f"{READ}.learned_query_embed"),
        levels=_trained_levels(found, num_latents),
        variant="published",
        write_depth=max(1, found.count(f"{WRITE}.patches_attend_to_latents")),  # a missing Write is told by its tensors
        tail_visible=True if tail_visible is None else tail_visible,
    )


def _trained_levels(found: Checkpoint, num_latents: int) -> tuple[int, ...] | None:
    """Recovers the levels of training, which masked a fraction of the latents: ``int(J * (1 - p))`` for every p from
    ``elit_min_mask_prob`` to ``elit_max_mask_prob``. None where the args do not tell."""
    listed = found.arg("elit_levels", list)  # of our own exports, whose levels may have gaps
    if listed is not None:
        return tuple(listed)
    ends: list[int] = []
    for name in ("elit_max_mask_prob", "elit_min_mask_prob"):
        masked = found.arg(name, float, int)
        if masked is None and not ends:
            return None
        if not 0 <= (masked or 0) < 1:
            raise ElitError(f"{found.source}: args.{name} is {masked}, not in [0, 1)")
        ends.append(max(1, math.floor(round((1 - (masked or 0)) * num_latents, 9))))  # 9 digits: as exact arithmetic
    lowest, highest = ends
    if lowest > highest:
        raise ElitError(f"{found.source}: args.elit_min_mask_prob is above args.elit_max_mask_prob")
    return tuple(range(lowest, highest + 1))


def _num_classes(found: Checkpoint) -> int:
    rows, _ = found.shape("y_embedder.embedding_table.weight", 2)  # the last is the null class
    told = found.arg("num_classes", int)
    if rows < 2 or told not in (None, rows - 1):
        raise ElitError(
            f"{found.source}: y_embedder.embedding_table.weight has {rows} rows, not one for each of "
            f"{told or 'at least 1'} classes and one for none"
        )
    return rows - 1


def _side(square: int, found: Checkpoint, name: str) -> int:
    if math.isqrt(square) ** 2 != square:
        raise ElitError(f"{found.source}: {name} has {square} rows, which is no square grid")
    return math.isqrt(square)


def load_published(
    path: str | Path,
    *,
    weights: Literal["ema", "raw"] = "ema",
    num_heads: int | None = None,
    head_depth: int | None = None,
    tail_depth: int | None = None,
) -> Model:
    """Loads the model of a published ``.pt`` file, in evaluation mode on the CPU. Nothing in the file is executed.

    Args:
        weights: ``ema``, or where there is none the raw weights; or ``raw``.
        num_heads, head_depth, tail_depth: what the file leaves open; they go before what it says.

    Raises:
        ElitError: see :func:`read` and :func:`recover_config`; or names the tensors that are missing, unexpected or
            of a wrong shape.
    """
    return model_of(read(Path(path), weights), num_heads, head_depth, tail_depth)


def model_of(found: Checkpoint, num_heads: int | None, head_depth: int | None, tail_depth: int | None) -> Model:
    config = recover_config(found, num_heads, head_depth, tail_depth)
    # Built without memory, and given the mapped tensors themselves instead of copies: the weights are in memory once at
    # most, and their pages can be dropped again. Changing them (training) does not change the file: the map is private.
    model = build_on_meta(config)
    check_fit(to_published(model), found.tensors, found.source)
    model.load_state_dict(to_ours(found.tensors, model), assign=True)
    path = found.arg("path_type", str) or "linear"
    hint = "" if path == "linear" else f"; sample with path={path!r}"
    logger.info("%s is a published checkpoint: %s of %s%s", found.source, found.key, describe(model), hint)
    return model.eval()


# ------------------------------------------------------------------------------------------------ converting


def describe(model: Model) -> str:
    """Describes a model: ``ELIT-SiT-XL/2 with 705.1 M parameters``."""
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    return f"{describe_name(model.config)} with {millions:.1f} M parameters"


def published_args(config: TransformerConfig) -> dict[str, Any]:
    """Returns the ``args`` from which the published code, and :func:`recover_config`, can rebuild a model."""
    args: dict[str, Any] = {
        "model": describe_name(config),
        "num_classes": config.num_classes,
        "resolution": triple(config.input_size)[1] * DOWNSAMPLE,
        "qk_norm": config.qk_norm,
        "prediction": "v",
        "encoder_depth": config.head_depth,
        "tail_depth": config.tail_depth,  # this and num_heads: of ours, for sizes that have no name
        "num_heads": config.num_heads,
    }
    if isinstance(config, DFMConfig):
        args["stages_count"] = config.stages
    if config.interface:
        _, group, _ = triple(config.interface.group_size)
        levels = valid_levels(group**2, config.interface.min_latents, trained=config.interface.levels)
        args |= {
            "elit_group_size": group,
            "elit_read_depth": 1,
            "elit_write_depth": config.interface.write_depth,
            "elit_max_mask_prob": 1 - levels[0] / group**2,
            "elit_min_mask_prob": 1 - levels[-1] / group**2,
            "elit_tail_visible": config.interface.tail_visible,  # of ours: the published code always does it
        }
        if len(levels) <= levels[-1] - levels[0]:  # there are gaps between them
            args |= {"elit_levels": list(levels)}
    return args


def save_published(model: Model, path: str | Path, args: dict[str, Any] | None = None, steps: int = 0) -> None:
    """Writes a model as a published ``.pt`` file: a dict of ``model``, ``ema`` (the same tensors), ``args``, ``steps``.

    Args:
        args: more for the Namespace; they go before what the model says.

    Raises:
        ElitError: a model that the published layout cannot hold, or a file that cannot be written.
    """
    check_publishable(model)
    tensors = to_published(model)
    namespace = Namespace(**(published_args(model.config) | (args or {})))
    with atomic_file(path) as temporary:
        torch.save({"model": tensors, "ema": tensors, "args": namespace, "steps": steps}, temporary)


def check_publishable(model: Model) -> None:
    """Checks that the published layout can hold a model.

    Raises:
        ElitError: the published code has no such model.
    """
    config = model.config
    reason = None
    if type(config) not in (DiTConfig, DFMConfig):
        reason = f"it is a {type(model).__name__}"
    elif config.positions != "sincos":
        reason = "its positions are rotary"
    elif config.num_classes == 0:
        reason = "it has no classes"
    elif not _square(config.input_size) or not _square(config.patch_size):
        reason = "its input or its patches are not square"
    elif config.interface and (config.interface.variant != "published" or not _square(config.interface.group_size)):
        reason = "its interface is not the published one with square windows"
    if reason:
        raise ElitError(f"the published layout has no place for this model: {reason}")


def _square(size: int | tuple[int, ...]) -> bool:
    frames, height, width = triple(size)
    return frames == 1 and height == width
