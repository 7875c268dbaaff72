"""Files and folders that are whole or absent, whatever kills the process while they are written."""

import json
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from elit.errors import ElitError

_UMASK = threading.Lock()  # it is read by being set, for all threads


@contextmanager
def atomic_file(path: str | Path, sync: bool = True) -> Iterator[Path]:
    """Gives a temporary path in the same folder; what is written there takes its name when the block ends well.

    Args:
        sync: wait until it is on the disk. Without (for many small files), a power failure can leave one empty.

    Raises:
        ElitError: the folder cannot be written, or the disk is full; nothing is left behind.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
        os.close(handle)
        temporary = Path(name)
        temporary.chmod(0o666 & ~_umask())
        yield temporary
        if sync:
            _sync(temporary)
        temporary.replace(path)
        if sync:
            _sync(path.parent)
    except OSError as error:
        raise ElitError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_json(
    path: str | Path, content: object, indent: int | None = 2, default: Callable[[Any], Any] | None = None
) -> None:
    """A JSON file, whole or not at all.

    Args:
        indent, default: of :func:`json.dumps`.

    Raises:
        ElitError: see :func:`atomic_file`.
    """
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=indent, default=default) + "\n")


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """The same for a folder of files. An existing folder of that name is an error.

    Raises:
        ElitError: the folder exists, cannot be written, or the disk is full.
    """
    path = Path(path)
    temporary = None
    _refuse_existing(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
        temporary.chmod(0o777 & ~_umask())
        yield temporary
        for file in temporary.rglob("*"):
            _sync(file)
        _refuse_existing(path)  # it may have come meanwhile
        temporary.rename(path)
        _sync(path.parent)
    except OSError as error:
        raise ElitError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if temporary is not None and temporary.exists():
            shutil.rmtree(temporary, ignore_errors=True)


def make_folder(path: Path) -> None:
    """Makes a folder, and those above it, unless it is there.

    Raises:
        ElitError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ElitError(f"cannot write {path}: {error.strerror or error}") from error


def _refuse_existing(path: Path) -> None:
    if path.exists():
        raise ElitError(f"{path} exists already; remove it or choose another name")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    with _UMASK:
        mask = os.umask(0)
        os.umask(mask)
    return mask
