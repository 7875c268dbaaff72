"""What a launcher (torchrun, accelerate launch) tells a process; its device and precision; how processes take turns."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch

from elit.atomic import make_folder
from elit.errors import ElitError, first_line

Precision = Literal["auto", "fp32", "tf32", "bf16", "fp16"]
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # of weights


def rank_and_world_size() -> tuple[int, int]:
    """Returns the number of this process and how many there are: 0 of 1 without a launcher."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def local_world_size() -> int:
    """Returns how many processes of the launch share this machine: 1 without a launcher."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def default_device(name: torch.device | str = "auto") -> torch.device:
    """Returns a device by name.

    Args:
        name: ``cpu``, ``cuda:1`` and so on as PyTorch has them, or the device itself. ``cuda`` is the GPU of this
            process, and ``auto`` is that GPU where there is one and else the CPU.

    Raises:
        ElitError: there is no such device here, or it is Apple's MPS, which has no float64.
    """
    name = str(name)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{int(os.environ.get('LOCAL_RANK', 0))}"
    if name.partition(":")[0] == "mps":
        raise ElitError("device mps is not supported: sampling computes in float64, which MPS lacks; take device cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ElitError(f"there is no device {name!r} here ({first_line(error)})") from error
    return device


def to_device(values: Sequence[Any], device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Returns values as a tensor on a device; the CPU does not wait until they have arrived on a GPU."""
    tensor = torch.tensor(values, dtype=dtype)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def choose_precision(name: Precision, device: torch.device) -> Precision:
    """Returns the precision that a device computes in: for auto, bf16 on a GPU and fp32 on a CPU.

    Raises:
        ElitError: tf32 or fp16 on a CPU.
    """
    if name == "auto":
        return "fp32" if device.type == "cpu" else "bf16"
    if name in ("tf32", "fp16") and device.type == "cpu":
        raise ElitError(f"precision is {name}, which needs a GPU, and the device is cpu; take bf16 or fp32")
    return name


def allow_tf32(allowed: bool) -> None:
    """Lets float32 matrix products and convolutions of this process be rounded to TF32 on GPUs, or forbids it."""
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed


@contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Lets one process at a time run the block, by a lock on a file; the system frees it when the process dies.

    Locks of a file, unlike those of a folder, also hold between the machines that share a network file system.

    Args:
        path: the lock file, which is made and stays.

    Raises:
        ElitError: the file cannot be made.
    """
    from filelock import FileLock

    make_folder(path.parent)
    try:
        with FileLock(path):
            yield
    except PermissionError as error:
        if error.filename != str(path):
            raise
        raise ElitError(f"cannot write {path}: {error.strerror}") from error
