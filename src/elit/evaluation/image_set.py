"""Opens the images that are to be scored, as bytes: a folder, a zip, an ADM-style ``.npz``, or an embedded data set."""

import hashlib
import json
import threading
import time
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from elit.atomic import atomic_file
from elit.data import EMBEDDED, open_data
from elit.data.pixels import to_uint8
from elit.data.remote import cache_folder
from elit.data.sources import SUFFIXES, image_names, read_bytes
from elit.data.transforms import CorruptImageError, read_rgb
from elit.errors import ElitError
from elit.launch import file_lock
from elit.threads import map_ahead

SETTINGS = "settings.json"  # what `elit sample` writes beside its images
READERS = 4  # threads that read and decode files
CLOCK_TICK = 2 * 10**9  # nanoseconds: the coarsest clock of a file system


@dataclass(frozen=True)
class ImageSet:
    """Images to score, which are read in slices.

    Attributes:
        source: where they come from.
        count: how many.
        content: SHA-256 of all bytes in order, 16 digits.
        read: (start, stop) -> bytes (stop - start, H, W, 3); several threads may call it.
        settings: of `elit sample`, where it made them.
    """

    source: str
    count: int
    content: str
    read: Callable[[int, int], Tensor]
    settings: dict[str, Any] = field(default_factory=dict)


def open_image_set(source: str | Path) -> ImageSet:
    """Opens the images of a folder or zip (sorted by name), of ``arr_0`` of an ``.npz``, or of an embedded data set.

    Args:
        source: a path, or the name of an embedded data set: ``scenes``, and ``scenes:held-out`` for its other part.

    Raises:
        ElitError: there are none, or they cannot be read.
    """
    name, _, part = str(source).partition(":")
    if name in EMBEDDED and part in ("", "held-out"):
        return _embedded(str(source), open_data(name, held_out=bool(part)).batch)
    path = Path(source)
    if not path.exists():
        raise ElitError(f"there is nothing at {source}: give a folder, a .zip, a .npz or one of {', '.join(EMBEDDED)}")
    if path.suffix == ".npz":
        return _archive(path)
    names = image_names(path)
    if names:
        return _pictures(path, names)
    if (path / "samples.npz").is_file():
        return _archive(path / "samples.npz")
    raise ElitError(f"{path} holds no images ({', '.join(SUFFIXES)}) and no samples.npz")


def _settings(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / SETTINGS).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _embedded(source: str, batch: Callable[[Tensor], tuple[Tensor, Tensor]]) -> ImageSet:
    name, _, part = source.partition(":")
    count = len(open_data(name, held_out=bool(part)))
    pixels = _rgb(to_uint8(batch(torch.arange(count))[0]))
    content = hashlib.sha256(pixels.contiguous().numpy().tobytes()).hexdigest()[:16]
    return ImageSet(source, count, content, lambda start, stop: pixels[start:stop])


def _pictures(source: Path, names: list[str]) -> ImageSet:
    """Opens the images of a folder or zip, which must all have the size of the first."""

    def hash_all() -> str:
        digest = hashlib.sha256()
        for of_file in map_ahead(lambda name: hashlib.sha256(_read(source, name)).digest(), names, READERS, ahead=64):
            digest.update(of_file)
        return digest.hexdigest()[:16]

    content = _remembered([source / name for name in names] if source.is_dir() else [source], hash_all)
    first = _decode(source, names[0])

    def read(start: int, stop: int) -> Tensor:
        images = [_decode(source, name) for name in names[start:stop]]
        for name, image in zip(names[start:stop], images, strict=True):
            if image.shape != first.shape:
                sizes = " and ".join(f"{n} is {i.shape[1]}x{i.shape[0]}" for n, i in ((names[0], first), (name, image)))
                raise ElitError(f"images of {source} differ in size: {sizes}; bring them to one size first")
        return torch.stack(images)

    return ImageSet(str(source), len(names), content, read, _settings(source))


def _remembered(files: Sequence[Path], hash_all: Callable[[], str]) -> str:
    """Returns the hash of files, which one process computes, once for all processes and later runs.

    It is kept in the cache under the names, sizes and times of the files, as git does. Files that have just been
    written may change again within one tick of the clock: their hash is not kept.
    """
    try:
        states = [(str(file.resolve()), (found := file.stat()).st_size, found.st_mtime_ns) for file in files]
    except OSError as error:
        raise ElitError(f"{error.filename} cannot be read ({error.strerror}); copy it again or remove it") from error
    key = hashlib.sha256(json.dumps(states).encode()).hexdigest()[:32]
    kept = cache_folder() / "contents" / key
    with file_lock(kept.with_suffix(".lock")):
        if kept.exists():
            return kept.read_text()
        content = hash_all()
        if time.time_ns() - max(changed for *_, changed in states) > CLOCK_TICK:
            with atomic_file(kept) as temporary:
                temporary.write_text(content)
        return content


def _read(source: Path, name: str) -> bytes:
    try:
        return read_bytes(source, name)
    except CorruptImageError as error:
        raise ElitError(f"{source / name} cannot be read ({error}); copy it again or remove it") from error


def _decode(source: Path, name: str) -> Tensor:
    """Decodes an image to bytes (H, W, 3), in the way that training does."""
    data = _read(source, name)
    try:
        return torch.from_numpy(np.array(read_rgb(data)))
    except CorruptImageError as error:
        raise ElitError(f"{source / name} is a damaged image ({error}); remove it or make it again") from error


def _archive(path: Path) -> ImageSet:
    """Opens ``arr_0`` (M, H, W, 3), of which only the wanted slices are ever in memory."""
    member, shape, offset = _open_array(path, "arr_0")
    size, reading = int(np.prod(shape[1:])), threading.Lock()

    def read(start: int, stop: int) -> Tensor:
        try:
            with reading:
                member.seek(offset + start * size)
                data = bytearray(member.read((min(stop, shape[0]) - start) * size))
            return _rgb(torch.frombuffer(data, dtype=torch.uint8).view(-1, *shape[1:]))
        except (OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
            raise ElitError(f"{path} is damaged ({error}); copy it again or make it anew") from error

    def hash_all() -> str:
        digest = hashlib.sha256()
        for start in range(0, shape[0], 256):
            digest.update(read(start, start + 256).contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    return ImageSet(str(path), shape[0], _remembered([path], hash_all), read, _settings(path.parent))


def _open_array(path: Path, name: str) -> tuple[Any, tuple[int, ...], int]:
    """Opens an array of bytes inside an ``.npz``: returns an open file, the shape, and where the data begin."""
    try:
        member = zipfile.ZipFile(path).open(f"{name}.npy")  # noqa: SIM115 (it is read from for as long as the images)
        version = np.lib.format.read_magic(member)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(member)
    except (zipfile.BadZipFile, ValueError) as error:
        raise ElitError(f"{path} is damaged or no .npz file") from error
    except KeyError as error:
        raise ElitError(f"{path} holds no images: it has no {name}") from error
    if dtype != np.uint8 or fortran or len(shape) != 4 or shape[-1] not in (1, 3):
        raise ElitError(f"{name} of {path} is {dtype} of shape {shape}; it must be bytes (M, H, W, 3)")
    if not shape[0]:
        raise ElitError(f"{path} holds no images: {name} is empty")
    return member, shape, member.tell()


def _rgb(pixels: Tensor) -> Tensor:
    return pixels.expand(*pixels.shape[:-1], 3) if pixels.shape[-1] == 1 else pixels
