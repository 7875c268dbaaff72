"""Tensors in safetensors files, and into modules of exactly their names and shapes."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from elit.atomic import atomic_file
from elit.errors import ElitError


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Reads all tensors of a safetensors file.

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
    """Writes a safetensors file, whole or not at all.

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
    check_fit(model.state_dict(), tensors, source)
    model.load_state_dict(tensors)


def check_fit(wanted: Mapping[str, Tensor], tensors: Mapping[str, Tensor], source: object) -> None:
    """Checks that tensors have exactly the wanted names and shapes.

    Raises:
        ElitError: names the tensors that are missing, unexpected or of another shape.
    """
    want = {k: tuple(v.shape) for k, v in wanted.items()}
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
