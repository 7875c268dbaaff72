"""The named models, and `create`."""

import re
from dataclasses import fields, replace
from typing import Any

from elit.errors import ElitError
from elit.interface import InterfaceConfig
from elit.models.base import Model
from elit.models.dfm import DFM, DFMConfig
from elit.models.dit import DiT, DiTConfig
from elit.models.hdit import HDiT, HDiTConfig
from elit.models.mmdit import MMDiT, MMDiTConfig
from elit.models.uvit import UViT, UViTConfig

ARCHITECTURES: dict[str, tuple[type[Model], type]] = {
    "DiT": (DiT, DiTConfig),
    "UViT": (UViT, UViTConfig),
    "HDiT": (HDiT, HDiTConfig),
    "MMDiT": (MMDiT, MMDiTConfig),
    "DFM": (DFM, DFMConfig),
}
"""Model class and configuration by the name that a saved ``config.json`` carries."""

SIZES = {  # depth, width, heads
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
}
PAPER_SPLITS = {"S": (2, 2), "B": (3, 3), "L": (4, 4), "XL": (4, 4)}
RELEASED_SPLITS = PAPER_SPLITS | {"XL": (8, 4)}
SPLITS = {  # blocks in head and tail; only ELIT-SiT-XL was released
    "DiT": PAPER_SPLITS,
    "SiT": RELEASED_SPLITS,
    "DFM-SiT": RELEASED_SPLITS,
    "UViT": PAPER_SPLITS,
    "HDiT": PAPER_SPLITS,
    "MMDiT": PAPER_SPLITS,
}
PATCH_SIZES = {
    "DiT": (1, 2, 4, 8),
    "SiT": (1, 2, 4, 8),
    "DFM-SiT": (2, 4, 8),  # the last stage's, of two
    "UViT": (1, 2, 4, 8),
    "HDiT": (1, 2, 4),  # at 256px larger ones leave no four tokens in a window
    "MMDiT": (1, 2, 4, 8),
}
CONFIGS: dict[str, type[DiTConfig]] = {
    "DiT": DiTConfig, "SiT": DiTConfig, "DFM-SiT": DFMConfig, "UViT": UViTConfig, "HDiT": HDiTConfig,
    "MMDiT": MMDiTConfig,
}  # fmt: skip
INNER_DEPTHS = {"S": 4, "B": 4, "L": 10, "XL": 12}  # of HDiT; the paper's for XL, and about its share for the others
WINDOWS_PER_SIDE = 4  # 16 windows an image: group size 4 at 256px, 8 at 512px

NAME = re.compile(rf"(?P<elit>ELIT-)?(?P<family>{'|'.join(SPLITS)})-(?P<size>{'|'.join(SIZES)})/(?P<patch>\d+)")


def model_class_of(config: object) -> type[Model]:
    """The model class that a configuration builds."""
    return next(model for model, of in ARCHITECTURES.values() if of is type(config))


def names() -> list[str]:
    """Every name that :func:`create` knows."""
    return [
        f"{elit}{family}-{size}/{patch}"
        for elit in ("", "ELIT-")
        for family in SPLITS
        for size in SIZES
        for patch in PATCH_SIZES[family]
    ]


def is_name(name: str) -> bool:
    """Whether :func:`create` knows a name."""
    return name in names()


def config_for(name: str, resolution: int | tuple[int, int] = 256, downsample: int = 8, **overrides: Any) -> DiTConfig:
    """The configuration behind a name, see :func:`create`."""
    found = NAME.fullmatch(name)
    if not found or not is_name(name):
        raise ElitError(
            f"no model is named {name!r}; names are [ELIT-]{{{','.join(SPLITS)}}}-{{{','.join(SIZES)}}}/{{1,2,4,8}}, "
            "like ELIT-SiT-XL/2 (the patch size is at least 2 for DFM-SiT, and at most 4 for HDiT)"
        )
    family, patch = found["family"], int(found["patch"])
    depth, width, num_heads = SIZES[found["size"]]
    head_depth, tail_depth = SPLITS[family][found["size"]]
    published = "SiT" in family
    of_family: dict[str, Any] = {"inner_depth": INNER_DEPTHS[found["size"]]} if family == "HDiT" else {}
    config = CONFIGS[family](
        input_size=_input_size(resolution, downsample),
        patch_size=patch,
        width=width,
        depth=depth,
        num_heads=num_heads,
        head_depth=head_depth,
        tail_depth=tail_depth,
        positions="sincos" if published else "rotary",
        qk_norm=not published,
        **of_family,
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
    chosen = {"variant": "published" if published else "paper"} | {k: overrides[k] for k in of_interface}
    if "group_size" not in chosen:
        chosen["group_size"] = _group_size(config)
    return replace(config, interface=InterfaceConfig(**chosen))


def create(name: str, resolution: int | tuple[int, int] = 256, downsample: int = 8, **overrides: Any) -> Model:
    """A named model with fresh weights, drawn from torch's global generator.

    Args:
        name: ``DiT-B/2``, ``ELIT-SiT-XL/2``, ...: family, size and patch size (:func:`names` lists them all).
        resolution: pixels of a side, or (height, width).
        downsample: pixels per latent of the autoencoder; 1 for models on pixels.
        overrides: any field of the configuration (:class:`DiTConfig`, or what a backbone makes of it) or of
            :class:`~elit.interface.InterfaceConfig`, such as ``num_classes=10`` or ``group_size=8`` (unless given, 16
            windows an image).

    Raises:
        ElitError: no such name or field, or sizes that do not fit.
    """
    return build(config_for(name, resolution, downsample, **overrides))


def build(config: DiTConfig) -> Model:
    """The model that a configuration describes, with fresh weights."""
    return model_class_of(config)(config)


def _input_size(resolution: int | tuple[int, int], downsample: int) -> int | tuple[int, ...]:
    sides = (resolution,) if isinstance(resolution, int) else resolution
    if any(side <= 0 or side % downsample for side in sides):
        raise ElitError(f"resolution {resolution} is not a positive multiple of the autoencoder's {downsample}")
    return resolution // downsample if isinstance(resolution, int) else tuple(s // downsample for s in resolution)


def _group_size(config: DiTConfig) -> tuple[int, int, int]:
    t, h, w = config.grid_size
    if h % WINDOWS_PER_SIDE or w % WINDOWS_PER_SIDE:
        raise ElitError(
            f"a grid of {h}x{w} tokens has no {WINDOWS_PER_SIDE}x{WINDOWS_PER_SIDE} windows; give group_size"
        )
    return (2 if t % 2 == 0 else 1), h // WINDOWS_PER_SIDE, w // WINDOWS_PER_SIDE
