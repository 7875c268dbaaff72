"""Tensors in safetensors files, and into modules of exactly their names and shapes."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from elit.atomic import atomic_file
from elit.errors import ElitError

ALIGNMENT = 64  # bytes, of torch's own tensors on a CPU


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Maps all tensors of a safetensors file into memory.

    They are read from the disk when they are first used. Changing one does not change the file.

    Raises:
        ElitError: it is missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return {name: _aligned(tensor) for name, tensor in load_file(path).items()}
    except FileNotFoundError as error:
        raise ElitError(f"no weights: {path} does not exist") from error
    except (SafetensorError, OSError) as error:
        raise ElitError(f"{path} is damaged or not a safetensors file ({error}); copy or save it again") from error


def _aligned(tensor: Tensor) -> Tensor:
    """Returns a tensor that begins where one of torch's own would: matrix kernels round differently elsewhere.

    It copies tensors of files that safetensors before 0.8 wrote, which begin at any multiple of 8 bytes.
    """
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Writes a safetensors file, whole or not at all.

    Raises:
        ElitError: the folder cannot be written, or the disk is full.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with atomic_file(path) as temporary:
        try:
            rights = temporary.stat().st_mode
            save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary, {"format": "pt"})
            temporary.chmod(rights)  # it makes files that only their owner can read
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
