"""The named models, and `create`."""

import re
from dataclasses import fields, replace
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from elit.errors import ElitError
from elit.interface import InterfaceConfig, triple
from elit.models.base import Model
from elit.models.dfm import DFM, DFMConfig
from elit.models.dit import DiT, DiTConfig
from elit.models.hdit import HDiT, HDiTConfig
from elit.models.mmdit import MMDiT, MMDiTConfig
from elit.models.transformer import TransformerConfig
from elit.models.uvit import UViT, UViTConfig

SIZES = {  # depth, width, heads
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
}
PAPER_SPLITS = {"S": (2, 2), "B": (3, 3), "L": (4, 4), "XL": (4, 4)}  # blocks in head and tail
RELEASED_SPLITS = PAPER_SPLITS | {"XL": (8, 4)}  # only ELIT-SiT-XL was released
INNER_DEPTHS = {"S": 4, "B": 4, "L": 10, "XL": 12}  # of HDiT; the paper's for XL, and about its share for the others
WINDOWS_PER_SIDE = 4  # 16 windows an image: group size 4 at 256px, 8 at 512px


class Family(NamedTuple):
    """Describes a family of named models.

    Attributes:
        config: its configuration class.
        splits: blocks in head and tail, by size.
        patch_sizes: the patch sizes that have a name.
        published: whether it is the released variant (sine-cosine positions, no query-key norms in the blocks).
    """

    config: type[TransformerConfig]
    splits: dict[str, tuple[int, int]] = PAPER_SPLITS
    patch_sizes: tuple[int, ...] = (1, 2, 4, 8)
    published: bool = False


FAMILIES = {
    "DiT": Family(DiTConfig),
    "SiT": Family(DiTConfig, RELEASED_SPLITS, published=True),
    "DFM-SiT": Family(DFMConfig, RELEASED_SPLITS, patch_sizes=(2, 4, 8), published=True),  # the last stage's, of two
    "UViT": Family(UViTConfig),
    "HDiT": Family(HDiTConfig, patch_sizes=(1, 2, 4)),  # at 256px larger ones leave no four tokens in a window
    "MMDiT": Family(MMDiTConfig),
}
ARCHITECTURES: dict[str, tuple[type[Model], type[TransformerConfig]]] = {
    "DiT": (DiT, DiTConfig),
    "UViT": (UViT, UViTConfig),
    "HDiT": (HDiT, HDiTConfig),
    "MMDiT": (MMDiT, MMDiTConfig),
    "DFM": (DFM, DFMConfig),
}
"""Model class and configuration by the name that a saved ``config.json`` carries."""

NAME = re.compile(rf"(?P<elit>ELIT-)?(?P<family>{'|'.join(FAMILIES)})-(?P<size>{'|'.join(SIZES)})/(?P<patch>\d+)")


def model_class_of(config: object) -> type[Model]:
    """Returns the model class that a configuration builds."""
    return next(model for model, of in ARCHITECTURES.values() if of is type(config))


def names() -> list[str]:
    """Lists every name that :func:`create` knows."""
    return [
        f"{elit}{family}-{size}/{patch}"
        for elit in ("", "ELIT-")
        for family in FAMILIES
        for size in SIZES
        for patch in FAMILIES[family].patch_sizes
    ]


def is_name(name: str) -> bool:
    """Whether :func:`create` knows a name."""
    return str(name) in names()


def config_for(
    name: str, resolution: int | tuple[int, int] = 256, downsample: int = 8, **overrides: Any
) -> TransformerConfig:
    """Returns the configuration of a named model; the arguments are those of :func:`create`."""
    found = NAME.fullmatch(str(name))
    if not found or not is_name(name):
        raise ElitError(
            f"no model is named {name!r}; names are [ELIT-]{{{','.join(FAMILIES)}}}-{{{','.join(SIZES)}}}/{{1,2,4,8}}, "
            "like ELIT-SiT-XL/2 (the patch size is at least 2 for DFM-SiT, and at most 4 for HDiT)"
        )
    overrides = {key: tuple(value) if isinstance(value, list) else value for key, value in overrides.items()}
    family, patch = FAMILIES[found["family"]], int(found["patch"])
    depth, width, num_heads = SIZES[found["size"]]
    head_depth, tail_depth = family.splits[found["size"]]
    inner: dict[str, Any] = {"inner_depth": INNER_DEPTHS[found["size"]]} if family.config is HDiTConfig else {}
    config: TransformerConfig = family.config(
        input_size=_input_size(resolution, downsample),
        patch_size=patch,
        width=width,
        depth=depth,
        num_heads=num_heads,
        head_depth=head_depth,
        tail_depth=tail_depth,
        positions="sincos" if family.published else "rotary",
        qk_norm=not family.published,
        **inner,
    )
    of_interface = {f.name for f in fields(InterfaceConfig)} & overrides.keys()
    unknown = overrides.keys() - {f.name for f in fields(config)} - of_interface
    if unknown:
        raise ElitError(f"{name} has no field {sorted(unknown)[0]!r}")
    if of_interface and not found["elit"]:
        raise ElitError(f"{name} has no latent interface, so no {sorted(of_interface)[0]!r}; take ELIT-{name}")
    config = replace(config, **{k: v for k, v in overrides.items() if k not in of_interface})
    if not found["elit"] or "interface" in overrides:
        return config
    chosen = {"variant": "published" if family.published else "paper"} | {k: overrides[k] for k in of_interface}
    if "group_size" not in chosen:
        chosen["group_size"] = _group_size(config)
    return replace(config, interface=InterfaceConfig(**chosen))


def create(name: str, resolution: int | tuple[int, int] = 256, downsample: int = 8, **overrides: Any) -> Model:
    """Builds a named model with fresh weights, drawn from torch's global generator.

    Args:
        name: ``DiT-B/2``, ``ELIT-SiT-XL/2``, ...: family, size and patch size (:func:`names` lists them all).
        resolution: pixels of a side, or (height, width).
        downsample: pixels per latent of the autoencoder; 1 for models on pixels.
        overrides: any field of the configuration (:class:`TransformerConfig` and what the backbone adds to it) or of
            :class:`~elit.interface.InterfaceConfig`, such as ``num_classes=10`` or ``group_size=8``. Without
            ``group_size`` an image has 16 windows.

    Raises:
        ElitError: there is no such name or field, or sizes do not fit each other.
    """
    return build(config_for(name, resolution, downsample, **overrides))


def build(config: TransformerConfig) -> Model:
    """Builds the model that a configuration describes, with fresh weights."""
    return model_class_of(config)(config)


def describe_name(config: TransformerConfig) -> str:
    """Returns the name of a configuration's size, such as ``ELIT-DiT-B/2``, or one like ``ELIT-DiT-8x96/2`` (depth and
    width) where the size has none."""
    published, architecture = config.positions == "sincos", model_class_of(config).__name__
    families = [name for name, of in FAMILIES.items() if of.config is type(config) and of.published == published]
    sizes = {dimensions: size for size, dimensions in SIZES.items()}
    size = sizes.get((config.depth, config.width, config.num_heads), f"{config.depth}x{config.width}")
    elit = "ELIT-" if config.interface else ""
    return f"{elit}{families[0] if families else architecture}-{size}/{triple(config.patch_size)[1]}"


def build_on_meta(config: TransformerConfig) -> Model:
    """Builds the model that a configuration describes on the ``meta`` device: it has shapes and no memory.

    It draws nothing: torch's random numbers are afterwards what they were before.
    """
    with torch.device("meta"), _WithoutNormalDraws():
        return build(config)


class _WithoutNormalDraws(TorchFunctionMode):
    """Leaves out :func:`torch.nn.init.normal_`, for which torch imports its compiler on the meta device: 2 seconds."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is nn.init.normal_:
            return kwargs["tensor"]
        return function(*args, **(kwargs or {}))


def _input_size(resolution: int | tuple[int, int], downsample: int) -> int | tuple[int, ...]:
    sides = tuple(resolution) if isinstance(resolution, tuple | list) else (resolution,)
    if len(sides) > 2 or any(type(number) is not int for number in (*sides, downsample)) or downsample < 1:
        raise ElitError(
            f"resolution is {resolution!r} and downsample {downsample!r}; they must be whole numbers of pixels, or a "
            "resolution of two, (height, width)"
        )
    if any(side <= 0 or side % downsample for side in sides):
        raise ElitError(f"resolution {resolution} is not a positive multiple of the autoencoder's {downsample}")
    return sides[0] // downsample if len(sides) == 1 else tuple(side // downsample for side in sides)


def _group_size(config: TransformerConfig) -> tuple[int, int, int]:
    t, h, w = config.grid_size
    if h % WINDOWS_PER_SIDE or w % WINDOWS_PER_SIDE:
        raise ElitError(
            f"a grid of {h}x{w} tokens has no {WINDOWS_PER_SIDE}x{WINDOWS_PER_SIDE} windows; give group_size"
        )
    return (2 if t % 2 == 0 else 1), h // WINDOWS_PER_SIDE, w // WINDOWS_PER_SIDE
