"""`elit convert`: between the published checkpoints and our format."""

import json
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from elit.atomic import atomic_folder
from elit.errors import ElitError
from elit.models.files import load_model, resolve, save_model
from elit.models.published import describe, model_of, read, save_published

PROVENANCE = "published.json"  # beside a converted model: the args and steps of the file it came from


def convert_model(
    source: Path,
    target: Path,
    num_heads: int | None = None,
    head_depth: int | None = None,
    tail_depth: int | None = None,
    format: Literal["diffusers"] | None = None,
    autoencoder: str | None = None,
) -> None:
    """Convert a published FILE.pt to a folder of our format, a model of ours to a published FILE.pt, or both for
    diffusers.

    Args:
        source: a published .pt file; or a run directory, a saved model or a Hub id.
        target: a new folder; or a new .pt file.
        format: diffusers writes a folder that ElitPipeline.from_pretrained reads; by default the format is the other
            one of the two.
        autoencoder: of diffusers, a folder or a Hub id: saved with the pipeline of a model of latents.
        num_heads: number of attention heads, where a published file of an unpublished size leaves it open.
        head_depth: number of blocks before Read, where the file leaves it open.
        tail_depth: number of blocks after Write, where the file leaves it open.

    Raises:
        ElitError: a source that cannot be read or held by the other format, or a target that exists.
    """
    depths = {"num_heads": num_heads, "head_depth": head_depth, "tail_depth": tail_depth}
    console = Console(soft_wrap=True, highlight=False)
    if format == "diffusers":
        console.print(convert_to_diffusers(source, target, autoencoder, **depths))
        console.print("next: elit.integrations.pipeline.ElitPipeline.from_pretrained, see docs/retrofit.md")
        return
    if autoencoder is not None:
        raise ElitError("an autoencoder is saved with --format diffusers only; leave it out")
    console.print(convert(source, target, **depths))
    console.print(f"next: elit info {target}")


def convert_to_diffusers(source: Path, target: Path, autoencoder: str | None = None, **depths: int | None) -> str:
    """Writes any model that :func:`elit.load` takes as a pipeline of diffusers.

    Args:
        source: the model.
        target: a new folder.
        autoencoder: a folder or a Hub id, for a model of latents.
        depths: what a published file leaves open; see :func:`elit.load`.

    Returns:
        A sentence that says what was done.

    Raises:
        ElitError: a source or an autoencoder that cannot be read, a target that exists, or diffusers is missing.
    """
    try:
        from elit.integrations.pipeline import ElitPipeline
    except ImportError as error:
        raise ElitError(f"a pipeline needs {error.name}: pip install 'elit-diffusion[retrofit]'") from error
    if target.exists():
        raise ElitError(f"{target} exists already; remove it or choose another name")
    pipeline = ElitPipeline.from_elit(source, autoencoder, **depths)
    with atomic_folder(target) as folder:
        pipeline.save_pretrained(folder)
    return f"wrote {describe(pipeline.transformer.model)}, from {source}, to the pipeline {target}"


def convert(
    source: Path,
    target: Path,
    *,
    num_heads: int | None = None,
    head_depth: int | None = None,
    tail_depth: int | None = None,
) -> str:
    """Converts a published checkpoint into our format, or a model of ours into the published one, as ``source`` is.

    The ``ema`` tensors of a file that is converted and converted back are those of the file, bit by bit, with ``args``
    and ``steps`` (kept in ``published.json``); its raw weights, optimizer state and projectors are not.

    Args:
        source: a published ``.pt`` file; or a run directory, a saved model or a Hub id.
        target: a new folder; or a new ``.pt`` file.
        num_heads, head_depth, tail_depth: what a published file leaves open; see :func:`elit.load`.

    Returns:
        A sentence that says what was done.

    Raises:
        ElitError: a source that cannot be read or held by the other format, or a target that exists or is of the
            wrong kind.
    """
    path = resolve(source)
    if target.exists():
        raise ElitError(f"{target} exists already; remove it or choose another name")
    if path.is_file():
        if target.suffix == ".pt":
            raise ElitError(f"{source} is a published checkpoint already; give a folder to write our format to")
        found = read(path)
        model = model_of(found, num_heads, head_depth, tail_depth)
        with atomic_folder(target) as folder:
            save_model(model, folder)
            provenance = {"args": vars(found.args), "steps": found.steps}
            (folder / PROVENANCE).write_text(json.dumps(provenance, indent=2, default=str, skipkeys=True) + "\n")
        return f"wrote {describe(model)}, from {found.key} of the published checkpoint {source}, to {target}"

    if target.suffix != ".pt":
        raise ElitError(f"{source} is in our format already; give a .pt file to write the published format to")
    if (num_heads, head_depth, tail_depth) != (None, None, None):
        raise ElitError(f"{source} says its heads and depths itself; only for a published .pt file can they be given")
    model = load_model(path)
    save_published(model, target, **_provenance(path / PROVENANCE))
    return f"wrote {describe(model)}, from {path}, to the published checkpoint {target}"


def _provenance(path: Path) -> dict[str, Any]:
    """Reads ``args`` and ``steps`` of the file that a folder was converted from, if it was."""
    if not path.exists():
        return {}
    try:
        told = json.loads(path.read_text())
        return {"args": dict(told["args"]), "steps": int(told["steps"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ElitError(f"{path} is damaged; remove it to do without") from error
