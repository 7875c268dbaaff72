"""Files and folders that are whole or absent, whatever kills the process while they are written."""

import errno
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from elit.errors import ElitError

_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}  # full, or not to be written


@contextmanager
def atomic_file(path: str | Path, sync: bool = True) -> Iterator[Path]:
    """Gives a temporary path in the same folder, and renames the file that was written there when the block ends well.

    Args:
        sync: wait until the file is on the disk. Without it (for many small files), a power failure can leave an empty
            one.

    Raises:
        ElitError: the folder cannot be written, or the disk is full; nothing is left behind. Any other error of the
            block is raised as it is.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{path.suffix}")
    with _told_as_of(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))  # with the rights of any new file
    try:
        with _disk_errors_told_as_of(path, temporary):
            yield temporary
        with _told_as_of(path):
            if sync:
                _sync(temporary)
            temporary.replace(path)
            if sync:
                _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(
    path: str | Path, content: object, indent: int | None = 2, default: Callable[[Any], Any] | None = None
) -> None:
    """Writes a JSON file, whole or not at all.

    Args:
        indent, default: of :func:`json.dumps`.

    Raises:
        ElitError: see :func:`atomic_file`.
    """
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=indent, default=default) + "\n")


@contextmanager
def atomic_folder(path: str | Path, replace: bool = False) -> Iterator[Path]:
    """Gives a temporary folder beside the wanted one, and renames it when the block ends well.

    Args:
        replace: put it in the place of a folder that exists already, which stays until the new one is whole.

    Raises:
        ElitError: the wanted folder exists, cannot be written, or the disk is full; nothing is left behind. Any other
            error of the block is raised as it is.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    replaced = temporary.with_name(f"{temporary.name}.replaced")
    if not replace:
        _refuse_existing(path)
    with _told_as_of(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
    try:
        with _disk_errors_told_as_of(path, temporary):
            yield temporary
        with _told_as_of(path):
            for file in temporary.rglob("*"):
                _sync(file)
            if replace and path.exists():
                path.rename(replaced)
            _refuse_existing(path)  # it may have come meanwhile
            temporary.rename(path)
            _sync(path.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def make_folder(path: Path) -> None:
    """Makes a folder, and those above it, unless it exists.

    Raises:
        ElitError: it cannot be made.
    """
    with _told_as_of(path):
        path.mkdir(parents=True, exist_ok=True)


@contextmanager
def _told_as_of(path: Path) -> Iterator[None]:
    """Turns an error of the system into the sentence that a path cannot be written."""
    try:
        yield
    except OSError as error:
        raise ElitError(f"cannot write {path}: {error.strerror or error}") from error


@contextmanager
def _disk_errors_told_as_of(path: Path, temporary: Path) -> Iterator[None]:
    """Does the same in a caller's block, which may also read files and talk to a network: only for errors of the disk
    or of the temporary path itself.
    """
    try:
        yield
    except OSError as error:
        about = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else None
        ours = about is not None and (about == temporary or temporary in about.parents)
        if error.errno not in _DISK and not ours:
            raise
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
