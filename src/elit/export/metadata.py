"""What an exported file says of itself: the model behind it, its levels, and how to sample from it."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from elit import __version__
from elit.decode import decode
from elit.digest import weights_digest
from elit.errors import ElitError
from elit.models import Model, TransformerConfig
from elit.models.registry import ARCHITECTURES

Format = Literal["pt2", "onnx", "aoti"]
Precision = Literal["fp32", "fp16", "bf16", "int8"]
KEY = "elit"  # of the metadata in an ONNX file; in an archive it is the file elit.json
VERSION = 1


@dataclass(frozen=True)
class Metadata:
    """Describes an exported model, for our loader and for whoever runs the file without it.

    Attributes:
        architecture: the class of the model.
        levels: the numbers of latents per window J~ that ``latent_index`` may have; empty without an interface.
        num_latents: J.
        input_shape: of one sample; ``stage_shapes`` are those of a model of several stages.
        guided: whether the graph computes both terms of guidance.
        batch: the only batch size; None is any.
        precision: of the weights. Inputs and outputs are float32 in each.
        path, solver, steps: how to sample: the path that the model was trained on, and what to begin with.
        class_names: one for each class, where they were given.
        weights: the digest of the weights that were exported.
        empty_prompt: of a model of text, the embedding of the empty prompt.
        time: what t means.
        elit_version: of the library that wrote the file.
    """

    architecture: str
    levels: tuple[int, ...]
    num_latents: int
    input_shape: tuple[int, ...]
    stage_shapes: tuple[tuple[int, ...], ...] | None
    guided: bool
    batch: int | None
    precision: Precision
    path: Literal["linear", "cosine"]
    solver: Literal["euler", "heun", "sde"]
    steps: int
    class_names: tuple[str, ...] | None
    weights: str
    empty_prompt: tuple[tuple[float, ...], ...] | None = None
    time: str = "t = 1 is noise and t = 0 is data; the output is the velocity dx/dt"
    elit_version: str = __version__


def describe(
    model: Model,
    levels: tuple[int, ...],
    *,
    guided: bool,
    batch: int | None,
    precision: Precision,
    path: Literal["linear", "cosine"],
    solver: Literal["euler", "heun", "sde"],
    steps: int,
    class_names: tuple[str, ...] | None,
) -> Metadata:
    """Describes a model that is exported with some options; see :func:`elit.export`.

    Raises:
        ElitError: a number of class names that does not fit.
    """
    if class_names is not None and len(class_names) != model.config.num_classes:
        raise ElitError(f"{len(class_names)} class names for {model.config.num_classes} classes; give one for each")
    stages, prompt = model.stage_shapes, getattr(model, "empty_prompt", None)
    on_meta = model.device.type == "meta"
    return Metadata(
        architecture=type(model).__name__,
        levels=levels,
        num_latents=model.num_latents,
        input_shape=model.input_shape(),
        stage_shapes=None if stages is None else tuple(stages),
        guided=guided,
        batch=batch,
        precision=precision,
        path=path,
        solver=solver,
        steps=steps,
        class_names=class_names,
        weights="" if on_meta else weights_digest(model),
        empty_prompt=None if prompt is None or on_meta else tuple(map(tuple, prompt.float().tolist())),
    )


def to_json(metadata: Metadata, config: TransformerConfig) -> str:
    """Writes metadata, and the configuration of the model, as JSON."""
    return json.dumps({"format": VERSION, **asdict(metadata), "config": asdict(config)})


def from_json(text: str | None, file: Path) -> tuple[Metadata, TransformerConfig]:
    """Reads metadata and the configuration of the model, whose levels are those of the metadata.

    Raises:
        ElitError: there is none, it is damaged, or another version of the library wrote it.
    """
    try:
        values: dict[str, Any] = json.loads(text or "")
        version, config = values.pop("format"), values.pop("config")
        architecture = values["architecture"]
        known = isinstance(config, dict) and architecture in ARCHITECTURES
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise ElitError(f"{file} was not written by elit export: it says nothing of a model of ours") from error
    if version != VERSION:
        raise ElitError(f"{file} has the format {version!r}, and this version of elit reads {VERSION}; export it again")
    if not known:
        raise ElitError(f"{file} names the architecture {architecture!r}; known are {', '.join(ARCHITECTURES)}")
    metadata = decode(Metadata, values, file)
    config = decode(ARCHITECTURES[architecture][1], config, file)
    if config.interface is not None:
        config = replace(config, interface=replace(config.interface, levels=metadata.levels))
    return metadata, config


def as_tensor(prompt: tuple[tuple[float, ...], ...] | None) -> Tensor | None:
    """Returns the empty prompt of metadata as a tensor."""
    return None if prompt is None else torch.tensor(prompt)
