"""Models on disk: ``config.json`` beside ``model.safetensors``, and `load`. Nothing that is read is executed."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from elit import __version__
from elit.atomic import atomic_file
from elit.errors import ElitError
from elit.models.base import Model
from elit.models.registry import ARCHITECTURES, model_class_of

CONFIG, WEIGHTS = "config.json", "model.safetensors"
TRAINING = "training.safetensors"  # beside them in the checkpoint of a run: raw weights (``raw.*``) and optimizer state


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


def load_model(folder: str | Path, dtype: torch.dtype | None = None) -> Model:
    """The model that :func:`save_model` wrote into a folder, in evaluation mode on the CPU, by default as saved.

    Raises:
        ElitError: a missing, truncated or foreign file, an unknown key, or weights that do not fit the configuration.
    """
    folder = Path(folder)
    config = read_config(folder / CONFIG)
    tensors = read_tensors(folder / WEIGHTS)
    saved = next((value.dtype for value in tensors.values() if value.is_floating_point()), None)
    model = model_class_of(config)(config).to(dtype or saved)
    load_weights(model, tensors, folder / WEIGHTS)
    return model.eval()


def read_config(path: Path) -> Any:
    """The configuration dataclass of a ``config.json``.

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
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ElitError(f"{path} is not a model configuration of this library") from error
    if not known:
        raise ElitError(f"{path} names the architecture {architecture!r}; known are {', '.join(ARCHITECTURES)}")
    return decode(ARCHITECTURES[architecture][1], described, path)


def decode(config_class: type, values: dict[str, Any], source: Path) -> Any:
    """A configuration dataclass from plain values, with keys and types checked."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(config_class, "config")
    try:
        return parser.instantiate(parser.parse_object({"config": values})).config
    except Exception as error:  # jsonargparse raises several kinds, also the dataclass's own
        raise ElitError(f"{source}: {' '.join(str(error).split())}") from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file.

    Raises:
        ElitError: it is missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise ElitError(f"no weights: {path} does not exist") from error
    except (SafetensorError, OSError) as error:
        raise ElitError(f"{path} is damaged or not a safetensors file ({error}); copy or save it again") from error


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """A safetensors file, whole or absent.

    Raises:
        ElitError: the folder cannot be written, or the disk is full.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with atomic_file(path) as temporary:
        try:
            save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary, {"format": "pt"})
        except SafetensorError as error:  # what it makes of an error of the system
            raise ElitError(f"cannot write {path}: {error}") from error


def load_weights(model: torch.nn.Module, tensors: dict[str, Tensor], source: object) -> None:
    """Copies tensors into a model of exactly these names and shapes.

    Raises:
        ElitError: names the tensors that are missing, unexpected or of another shape.
    """
    want = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    have = {k: tuple(v.shape) for k, v in tensors.items()}
    wrong = [
        f"{k} is {list(have[k])}, not {list(want[k])}" for k in sorted(want.keys() & have.keys()) if want[k] != have[k]
    ]
    for what, found in (
        ("lacks", sorted(want.keys() - have.keys())),
        ("has unexpected", sorted(have.keys() - want.keys())),
        ("has wrong shapes:", wrong),
    ):
        if found:
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            raise ElitError(f"{source} does not fit the model: it {what} {', '.join(found[:3])}{more}")
    model.load_state_dict(tensors)


# ------------------------------------------------------------------------------------------------ finding them


def checkpoints(run: str | Path) -> list[Path]:
    """Checkpoints of a run directory, oldest first. Each is whole: it took its name when it was complete."""
    return sorted(path for path in Path(run).glob("checkpoints/step-*") if path.is_dir())


def resolve(source: str | Path, **hub: Any) -> Path:
    """The folder with a model's files, for a folder, a run directory (its latest checkpoint) or a Hub id.

    Args:
        hub: ``revision``, ``cache_dir``, ``token``, ``force_download``, ``local_files_only`` for a Hub id.

    Raises:
        ElitError: there is none.
    """
    path = Path(source)
    if (path / CONFIG).is_file():
        return path
    if path.is_dir():
        found = checkpoints(path)
        if not found:
            raise ElitError(f"{path} holds no model: neither {CONFIG} nor checkpoints/; give a run or a saved model")
        return found[-1]
    if path.exists() or str(source).count("/") != 1 or str(source).startswith((".", "/", "~")):
        raise ElitError(f"there is no model at {source}: give a run directory, a saved model or a Hub id")
    return _download(str(source), **hub)


def _download(repo: str, **hub: Any) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, allow_patterns=[CONFIG, WEIGHTS], **hub))
    except HFValidationError as error:
        raise ElitError(f"there is no model at {repo}, and it is no Hub id either") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ElitError(
            f"there is no folder {repo}, and the Hub does not give a model of that id ({reason})"
        ) from error


def load(
    source: str | Path,
    *,
    weights: Literal["ema", "raw"] = "ema",
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    **hub: Any,
) -> Model:
    """A model ready to use, in evaluation mode.

    Args:
        source: a run directory (its latest checkpoint), a folder written by ``save_pretrained``, or a Hub id.
        weights: of a run: the moving average, or the raw weights that training goes on from.
        device, dtype: where to put it, and in what precision (default: as saved).
        hub: ``revision``, ``token``, ``cache_dir``, ``local_files_only`` for a Hub id.

    Raises:
        ElitError: nothing is there, or it is damaged or not a model.
    """
    folder = resolve(source, **hub)
    model = load_model(folder, dtype)
    if weights == "raw":
        raw = {k.removeprefix("raw."): v for k, v in read_tensors(folder / TRAINING).items() if k.startswith("raw.")}
        load_weights(model, raw, folder / TRAINING)
    elif weights != "ema":
        raise ElitError(f"weights is {weights!r}; it is 'ema' or 'raw'")
    return model.to(device)
