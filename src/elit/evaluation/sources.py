"""Images to score, as bytes: a folder, a zip, an ADM-style ``.npz``, or an embedded data set."""

import hashlib
import io
import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from elit.data import EMBEDDED, open_data
from elit.data.pixels import to_uint8
from elit.errors import ElitError

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
SETTINGS = "settings.json"  # what `elit sample` writes beside its images


@dataclass(frozen=True)
class Images:
    """Images that are read in slices.

    Attributes:
        source: where they come from.
        count: how many.
        content: SHA-256 of all bytes in order, 16 digits.
        read: (start, stop) -> bytes (stop - start, H, W, 3).
        settings: of `elit sample`, where it made them.
    """

    source: str
    count: int
    content: str
    read: Callable[[int, int], Tensor]
    settings: dict[str, Any] = field(default_factory=dict)


def open_images(source: str | Path) -> Images:
    """Images of a folder or zip (by name), of ``arr_0`` of an ``.npz``, or of an embedded data set (``digits``, and
    ``digits:held-out`` for its other part).

    Raises:
        ElitError: there are none, or they cannot be read.
    """
    name, _, part = str(source).partition(":")
    if name in EMBEDDED and part in ("", "held-out"):
        return _embedded(str(source), open_data(name, held_out=bool(part)).batch)
    path = Path(source)
    if path.is_dir():
        pictures = sorted(p for p in path.rglob("*") if p.suffix.lower() in PICTURES and not p.name.startswith("."))
        if pictures:
            return _pictures(path, [p.read_bytes for p in pictures], _settings(path))
        if (path / "samples.npz").is_file():
            return _archive(path / "samples.npz")
        raise ElitError(f"{path} holds no images ({', '.join(PICTURES)}) and no samples.npz")
    if not path.is_file():
        raise ElitError(f"there is nothing at {source}: give a folder, a .zip, a .npz or one of {', '.join(EMBEDDED)}")
    if path.suffix == ".npz":
        return _archive(path)
    return _zip(path)


def _settings(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / SETTINGS).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _embedded(source: str, batch: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Images:
    name, _, part = source.partition(":")
    count = len(open_data(name, held_out=bool(part)))
    pixels = _rgb(to_uint8(batch(torch.arange(count))[0]))
    content = hashlib.sha256(pixels.contiguous().numpy().tobytes()).hexdigest()[:16]
    return Images(source, count, content, lambda start, stop: pixels[start:stop])


def _pictures(source: Path, files: list[Callable[[], bytes]], settings: dict[str, Any]) -> Images:
    """Each file gives the bytes of one picture."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(hashlib.sha256(file()).digest())

    def read(start: int, stop: int) -> Tensor:
        images = [_decode(source, file()) for file in files[start:stop]]
        sizes = {tuple(image.shape[:2]) for image in images}
        if len(sizes) > 1:
            raise ElitError(f"images of {source} differ in size ({sorted(sizes)}); bring them to one size first")
        return torch.stack(images)

    return Images(str(source), len(files), digest.hexdigest()[:16], read, settings)


def _decode(source: Path, data: bytes) -> Tensor:
    try:
        with Image.open(io.BytesIO(data)) as image:
            return torch.from_numpy(np.array(image.convert("RGB")))
    except (UnidentifiedImageError, OSError) as error:
        raise ElitError(f"{source} holds a damaged image ({error}); remove it or make it again") from error


def _zip(path: Path) -> Images:
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise ElitError(f"{path} is no zip or .npz of images, or it is damaged") from error
    names = sorted(n for n in archive.namelist() if Path(n).suffix.lower() in PICTURES)
    if not names:
        raise ElitError(f"{path} holds no images ({', '.join(PICTURES)})")

    def reader(name: str) -> Callable[[], bytes]:
        return lambda: archive.read(name)

    return _pictures(path, [reader(name) for name in names], {})


def _archive(path: Path) -> Images:
    """``arr_0`` (M, H, W, 3) in slices, never as a whole."""
    member, shape, offset = _open_array(path, "arr_0")
    size = int(np.prod(shape[1:]))

    def read(start: int, stop: int) -> Tensor:
        member.seek(offset + start * size)
        data = bytearray(member.read((min(stop, shape[0]) - start) * size))
        return _rgb(torch.frombuffer(data, dtype=torch.uint8).view(-1, *shape[1:]))

    digest = hashlib.sha256()
    for start in range(0, shape[0], 256):
        digest.update(read(start, start + 256).contiguous().numpy().tobytes())
    return Images(str(path), shape[0], digest.hexdigest()[:16], read, _settings(path.parent))


def _open_array(path: Path, name: str) -> tuple[Any, tuple[int, ...], int]:
    """An array of bytes inside an ``.npz``: an open file, the shape, and where the data begin."""
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
    return member, shape, member.tell()


def _rgb(pixels: Tensor) -> Tensor:
    return pixels.expand(*pixels.shape[:-1], 3) if pixels.shape[-1] == 1 else pixels
