"""`export`: one file from a model, in one of three formats."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from elit.errors import ElitError
from elit.export import archive, onnx
from elit.export.graph import trace
from elit.export.metadata import Format, Metadata, Precision, describe, to_json
from elit.flow.paths import path_named
from elit.flow.solvers import check_steps, solver_named
from elit.interface.budget import valid_levels
from elit.models import Model

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.float32}
SUFFIX = {"pt2": ".pt2", "aoti": ".pt2", "onnx": ".onnx"}


def export(
    model: Model,
    file: str | Path,
    *,
    format: Format | None = None,
    levels: Sequence[int] | None = None,
    batch: int | None = None,
    precision: Precision = "fp32",
    guided: bool = False,
    class_names: Sequence[str] | None = None,
    path: Literal["linear", "cosine"] = "linear",
    solver: Literal["euler", "heun", "sde"] = "euler",
    steps: int = 40,
) -> Metadata:
    """Writes a model as one file that runs without this library, at every budget.

    Args:
        model: any backbone; :func:`elit.load_exported` turns the file back into a model.
        file: what to write. Where the weights of an ONNX file exceed 2 GiB, they go to FILE.data beside it.
        format: ``pt2`` (torch.export), ``onnx``, or ``aoti``: a package of AOTInductor, machine code for this kind of
            processor. By default what the file's ending says.
        levels: the numbers of latents per window that the file may be used with; None is all that were trained.
        batch: the only batch size; None is any.
        precision: of the weights; inputs and outputs are float32. ``int8`` quantizes the linear layers of an ONNX file.
        guided: compute both terms of guidance in one call, for runtimes that combine them themselves.
        class_names: one for each class, kept in the file.
        path, solver, steps: how to sample, kept in the file; see :func:`elit.sample`.

    Returns:
        What the file says of itself.

    Raises:
        ElitError: options that do not fit each other or the model, or a file that cannot be written.
    """
    file = Path(file)
    if format is None and file.suffix not in SUFFIX.values():
        raise ElitError(f"file is {file}; name one that ends in .pt2 or .onnx")
    format = format or ("onnx" if file.suffix == ".onnx" else "pt2")
    check_options(file, format, precision, batch)
    path_named(path)
    solver_named(solver)
    check_steps(steps)
    if precision != "int8" and model.dtype != DTYPES[precision]:
        model = copy.deepcopy(model).to(DTYPES[precision])
    metadata = describe(
        model,
        chosen_levels(model, levels),
        guided=guided,
        batch=batch,
        precision=precision,
        path=path,
        solver=solver,
        steps=steps,
        class_names=None if class_names is None else tuple(class_names),
    )
    text = to_json(metadata, model.config)
    program = trace(model, guided, batch)
    if format == "pt2":
        archive.save_program(program, file, text)
    elif format == "aoti":
        archive.save_package(program, file, text)
    else:
        converted = onnx.convert(program, text)
        onnx.save(onnx.quantize(converted) if precision == "int8" else converted, file)
    return metadata


def check_options(file: Path, format: Format, precision: Precision, batch: int | None) -> None:
    """Checks what does not depend on the model.

    Raises:
        ElitError: see :func:`export`.
    """
    if format not in SUFFIX:
        raise ElitError(f"no format is named {format!r}; there are {', '.join(SUFFIX)}")
    if precision not in DTYPES:
        raise ElitError(f"precision is {precision!r}; it is {', '.join(DTYPES)}")
    if file.suffix != SUFFIX[format]:
        raise ElitError(f"file is {file}; a file of the format {format} ends in {SUFFIX[format]}")
    if file.is_dir():
        raise ElitError(f"{file} is a folder; name a file")
    if precision == "int8" and format != "onnx":
        raise ElitError("int8 is for ONNX files; take the format onnx, or precision fp16")
    if precision == "bf16" and format == "onnx":
        raise ElitError("ONNX Runtime has no bf16 on CPUs; take precision fp16, or the format pt2")
    if batch is not None and (isinstance(batch, bool) or not isinstance(batch, int) or batch < 1):
        raise ElitError(f"batch is {batch!r}; it must be a whole number, at least 1, or None for any")


def chosen_levels(model: Model, levels: Sequence[int] | None) -> tuple[int, ...]:
    """Returns the levels of a file, ascending: those that were asked for, or all that were trained.

    Raises:
        ElitError: a level that the model was not trained for, or any of a model without levels.
    """
    if levels is None:
        return model.levels
    if model.interface is None:
        raise ElitError("levels are given, but this model has no latent interface: it always runs in full")
    wanted = valid_levels(model.num_latents, None, model.interface.level_step, levels)
    untrained = sorted(set(wanted) - set(model.levels))
    if untrained:
        raise ElitError(f"level {untrained[0]} was not trained; the model has the levels {list(model.levels)}")
    return wanted
