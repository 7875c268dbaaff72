"""Models on disk: ``config.json`` beside ``model.safetensors``, and `load`. Nothing that is read is executed."""

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from elit import __version__
from elit.atomic import atomic_file
from elit.decode import decode
from elit.errors import ElitError, first_line
from elit.launch import default_device
from elit.models.base import Model
from elit.models.registry import ARCHITECTURES, build_on_meta, describe_name
from elit.tensors import check_fit, read_tensors, write_tensors

logger = logging.getLogger("elit")

CONFIG, WEIGHTS = "config.json", "model.safetensors"
HUB = "hf://"
LOCAL = ("", ".", "..", "~", "runs")  # where paths begin that are no Hub ids; runs is where training writes by default
TRAINING = "training.safetensors"  # beside them in the checkpoint of a run: raw weights (``raw.*``) and optimizer state
RAW = "raw."
HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download")


def save_model(model: Model, folder: str | Path, weights: dict[str, Tensor] | None = None) -> None:
    """Writes a model's configuration and weights (or others of the same names, such as an average) into a folder.

    Raises:
        ElitError: the folder cannot be written.
    """
    folder = Path(folder)
    write_tensors(folder / WEIGHTS, model.state_dict() if weights is None else weights)
    described = {"architecture": type(model).__name__, "elit_version": __version__, **asdict(model.config)}
    with atomic_file(folder / CONFIG) as path:
        path.write_text(json.dumps(described, indent=2) + "\n")


def load_model(
    folder: str | Path, dtype: torch.dtype | None = None, raw: bool = False, device: torch.device | str = "cpu"
) -> Model:
    """Loads the model that :func:`save_model` wrote into a folder, in evaluation mode, by default as saved.

    It is built without memory and given the mapped tensors themselves, so that its weights are in memory once at most.

    Args:
        raw: take the raw weights of a checkpoint, which training goes on from, in place of the average.

    Raises:
        ElitError: a missing, truncated or foreign file, an unknown key, or weights that do not fit the configuration.
    """
    folder = Path(folder)
    file = folder / (TRAINING if raw else WEIGHTS)
    model, tensors = build_on_meta(read_config(folder / CONFIG)), read_tensors(file)
    if raw:
        tensors = {name.removeprefix(RAW): value for name, value in tensors.items() if name.startswith(RAW)}
    check_fit(model.state_dict(), tensors, file)
    model.load_state_dict(tensors, assign=True)
    return model.to(device, dtype or model.dtype).eval()


def read_config(path: Path) -> Any:
    """Reads a ``config.json`` into its configuration dataclass.

    Raises:
        ElitError: it is missing, no JSON, of an unknown architecture, or has an unknown key or a wrong type.
    """
    try:
        described = json.loads(path.read_text())
        architecture = described.pop("architecture")
        described.pop("elit_version", None)
        known = architecture in ARCHITECTURES
    except OSError as error:
        raise ElitError(f"no model in {path.parent}: cannot read {path.name} ({error.strerror})") from error
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise ElitError(f"{path} is not a model configuration of this library") from error
    if not known:
        raise ElitError(f"{path} names the architecture {architecture!r}; known are {', '.join(ARCHITECTURES)}")
    return decode(ARCHITECTURES[architecture][1], described, path)


# ------------------------------------------------------------------------------------------------ finding them


def checkpoints(run: str | Path) -> list[Path]:
    """Lists the checkpoints of a run directory, oldest first. Each is whole: it took its name when it was complete."""
    return sorted(path for path in Path(run).glob("checkpoints/step-*") if path.is_dir())


def resolve(source: str | Path, **hub: Any) -> Path:
    """Finds the folder of a model's files, or the file of a published checkpoint, and downloads it where necessary.

    Args:
        source: see :func:`load`.
        hub: ``revision``, ``cache_dir``, ``token``, ``force_download``, ``local_files_only`` for a Hub id.

    Raises:
        ElitError: there is none. What looks like a local path is never looked up on the Hub.
    """
    path = Path(source)
    on_hub = str(source).startswith(HUB)
    if not on_hub and (path.is_file() or (path / CONFIG).is_file()):
        return path
    if not on_hub and path.is_dir():
        found = checkpoints(path)
        if not found:
            raise ElitError(f"{path} holds no model: neither {CONFIG} nor checkpoints/; give a run or a saved model")
        return found[-1]
    owner, _, rest = str(source).removeprefix(HUB).partition("/")
    repo, _, file = rest.partition("/")
    is_id = bool(owner and repo) and (not file or file.endswith(".pt"))
    local = not on_hub and (owner in LOCAL or path.exists() or Path(owner).exists())
    if local or not is_id:
        hint = f"; for the Hub's write {HUB}{source}" if local and is_id and owner not in LOCAL else ""
        raise ElitError(
            f"there is no model at {source}: give a run directory, a saved model, a published .pt file, or a Hub id "
            f"(OWNER/NAME, or OWNER/NAME/FILE.pt){hint}"
        )
    return _download(f"{owner}/{repo}", file, **hub)


def _download(repo: str, file: str, **hub: Any) -> Path:
    """Downloads the published checkpoint ``file`` of a Hub repository, or without ``file`` the folder of our format."""
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = f"{repo}/{file}" if file else repo
    try:
        if file:
            return Path(hf_hub_download(repo, file, **hub))
        folder = Path(snapshot_download(repo, allow_patterns=[CONFIG, WEIGHTS], **hub))
    except HFValidationError as error:
        raise ElitError(f"there is no model at {wanted}, and it is no Hub id either") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = first_line(error)
        kind = "file" if file else "folder"
        raise ElitError(
            f"there is no {kind} {wanted}, and the Hub does not give a model of that id ({reason})"
        ) from error
    if not (folder / CONFIG).is_file():
        raise ElitError(f"{repo} on the Hub has no {CONFIG}; for a published checkpoint in it give {repo}/FILE.pt")
    return folder


def load(
    source: str | Path,
    *,
    weights: Literal["ema", "raw"] = "ema",
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    num_heads: int | None = None,
    head_depth: int | None = None,
    tail_depth: int | None = None,
    untrained_levels: bool = False,
    **hub: Any,
) -> Model:
    """Loads a model, ready to use and in evaluation mode, and tells the logger ``elit`` what it found.

    Args:
        source: a run directory (its latest checkpoint), a folder written by ``save_pretrained``, a Hub id
            (``owner/name``), or a published checkpoint: a ``.pt`` file, or ``owner/name/file.pt`` on the Hub. With
            ``hf://`` before it an id is one of the Hub even where a folder has the owner's name.
        weights: ``ema`` is the moving average of the weights, ``raw`` those that training goes on from.
        device: where to put the model: ``cpu``, ``cuda``, ``cuda:1``, ...; ``auto`` is a GPU where there is one.
        dtype: of the weights, such as ``torch.bfloat16``; None keeps that of the files.
        num_heads: the number of attention heads, for a published checkpoint of a size that has no name: such a file
            does not tell it.
        head_depth, tail_depth: the numbers of blocks before Read and after Write, for the same files where they do not
            tell them.
        untrained_levels: let the model run with any number of latents. By default it refuses budgets below the lowest
            that it was trained for, because what it then makes may mean nothing.
        hub: ``revision``, ``token``, ``cache_dir``, ``local_files_only`` and ``force_download``, for a Hub id.

    Raises:
        ElitError: there is no model at ``source``, or its files are damaged or of something else; a published
            checkpoint leaves something open that is not given, or ``num_heads``, ``head_depth`` or ``tail_depth`` is
            given for a model that is none; or another argument has no meaning.
    """
    if weights not in ("ema", "raw"):
        raise ElitError(f"weights is {weights!r}; it is 'ema' or 'raw'")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ElitError(f"dtype is {dtype!r}; it must be a floating-point dtype of torch, such as torch.bfloat16")
    unknown = sorted(hub.keys() - set(HUB_OPTIONS))
    if unknown:
        raise ElitError(f"load has no option {unknown[0]!r}; those of the Hub are {', '.join(HUB_OPTIONS)}")
    device = default_device(device)
    path = resolve(source, **hub)
    overrides = {"num_heads": num_heads, "head_depth": head_depth, "tail_depth": tail_depth}
    if path.is_file():
        from elit.models.published import load_published  # it builds on this file

        model = load_published(path, weights=weights, **overrides).to(device=device, dtype=dtype)
        return model.allow_untrained_levels() if untrained_levels else model

    given = [name for name, value in overrides.items() if value is not None]
    if given:
        raise ElitError(f"{source} says its {given[0]} itself; only for a published .pt file can it be given")
    model = load_model(path, dtype, weights == "raw", device)
    kind = "saved model" if path == Path(source) else "run directory" if Path(source).is_dir() else "model of the Hub"
    logger.info("%s is a %s: %s weights of %s from %s", source, kind, weights, describe_name(model.config), path)
    return model.allow_untrained_levels() if untrained_levels else model
