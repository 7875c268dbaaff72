"""What a launcher (torchrun, accelerate launch) tells a process: its place and its GPU. And taking turns."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from elit.atomic import make_folder
from elit.errors import ElitError


def place() -> tuple[int, int]:
    """The number of this process and how many there are: 0 of 1 without a launcher."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def processes_here() -> int:
    """How many processes of the launch share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def own_device(name: str = "auto") -> torch.device:
    """A device by name; ``auto`` is a GPU where there is one, and ``cuda`` the GPU of this process.

    Raises:
        ElitError: there is no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{int(os.environ.get('LOCAL_RANK', 0))}"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ElitError(f"there is no device {name!r} here ({str(error).splitlines()[0]})") from error
    return device


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """One process at a time; the system lets go of it when the process dies.

    Raises:
        ElitError: the folder cannot be made.
    """
    make_folder(folder)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
