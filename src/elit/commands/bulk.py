"""Sampling any number of images into a folder, by any number of processes, in any order.

Each image is a function of its index alone. Indices are drawn in pieces of ``batch_size``: piece c is the indices
[c * B, (c + 1) * B), always whole, even where fewer are wanted. So an image always meets the same kernels at the same
place of the same batch, and its bytes do not depend on who draws it, when, or after which interruption. The batch size
is therefore one of the settings of a folder.

Threads compress and write the images of a piece while the next piece is drawn.
"""

import io
import json
import zipfile
from collections.abc import Callable, Iterator, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from tqdm import tqdm

from elit.atomic import atomic_file, write_json
from elit.commands.processes import Process
from elit.data.pixels import round_to_uint8, start_copy
from elit.errors import ElitError
from elit.launch import file_lock
from elit.seeding import derive_seed
from elit.threads import map_ahead

Labels = Literal["balanced", "random"] | list[int]
Format = Literal["png", "npz", "both"]
SETTINGS_FILE, ARCHIVE_FILE, LOCK_FILE = "settings.json", "samples.npz", ".lock"
COUNT = "num_images"  # the one setting that may change: a folder can be extended
WRITERS = 4  # threads that compress images while the next ones are drawn
LISTS = ("labels", "prompts")  # these may grow with it


class Drawn(NamedTuple):
    """An image that is drawn and not written yet.

    Attributes:
        path: where it belongs.
        pixels: waits for the bytes (B, H, W, C) of the images that were drawn with it.
        place: which of them it is.
        about: what is written into the file beside the image.
    """

    path: Path
    pixels: Callable[[], Tensor]
    place: int
    about: dict[str, Any]


def label_of(index: int, labels: Labels, num_classes: int, seed: int) -> int:
    """Returns the class of an image: in turn, drawn from (seed, index), or listed (repeated beyond the list)."""
    if labels == "balanced":
        return index % num_classes
    if labels == "random":
        return derive_seed(seed, "label", index) % num_classes
    return int(labels[index % len(labels)])


def claim_folder(folder: Path, settings: dict[str, Any]) -> None:
    """Writes the settings of a new folder, or compares them with those of an old one.

    Raises:
        ElitError: names the first setting that differs, or the folder holds something else.
    """
    path, larger = folder / SETTINGS_FILE, settings
    with file_lock(folder / LOCK_FILE):
        empty = all(p.name.startswith(".") or p == path for p in folder.iterdir())
        if not path.exists() and not empty:
            raise ElitError(f"{folder} is not empty and has no {SETTINGS_FILE}; sample into a new folder")
        if path.exists() and not empty:  # settings without an image may have been refused: others may take the place
            try:
                old = json.loads(path.read_text())
                both = min(old[COUNT], settings[COUNT])
                differing = [k for k in settings | old if k != COUNT and not _agree(old, settings, k, both)]
                larger = max(old, settings, key=itemgetter(COUNT))
            except (ValueError, TypeError, AttributeError, KeyError) as error:
                raise ElitError(f"{path} is damaged; sample into a new folder") from error
            if differing:
                k = differing[0]
                raise ElitError(
                    f"{folder} holds images with {k} {old.get(k)!r}, not {settings.get(k)!r}; take the same "
                    "settings to continue, or another folder"
                )
        write_json(path, larger)


def _agree(old: dict[str, Any], new: dict[str, Any], key: str, count: int) -> bool:
    """Tells whether a setting is the same; a list is, where it says the same of the first ``count`` images."""
    a, b = old.get(key), new.get(key)
    if key in LISTS and isinstance(a, list) and isinstance(b, list):
        return all(a[i % len(a)] == b[i % len(b)] for i in range(count))
    return a == b


def draw_folder(
    folder: Path,
    settings: dict[str, Any],
    draw: Callable[[Sequence[int]], Tensor],
    labels_of: Callable[[Sequence[int]], list[int] | None],
    kind: Format,
    process: Process,
) -> bool:
    """Draws the missing images of this process's share; the process that finds all of them there writes the archive.

    Args:
        settings: ``num_images``, ``batch_size``, ``seed`` and whatever else made the images.
        draw: indices (B,) -> images (B, C, H, W) in [-1, 1].
        labels_of: indices (B,) -> their classes, None without classes.

    Returns:
        Whether the folder is complete; otherwise other processes are still at work.

    Raises:
        ElitError: see :func:`claim_folder`, or a file that cannot be written.
    """
    claim_folder(folder, settings)
    count, size = settings["num_images"], settings["batch_size"]
    if kind == "npz" and _archived(folder) >= count:
        return _finish(folder, count, labels_of, kind)
    there = present(folder)
    own = [index for index in range(count) if process.owns(index // size)]
    missing = {index for index in own if index not in there}
    described = {k: v for k, v in settings.items() if k not in (COUNT, *LISTS)}
    prompts = settings.get("prompts")

    def drawn() -> Iterator[Drawn]:
        for piece in sorted({index // size for index in missing}):
            indices = range(piece * size, (piece + 1) * size)
            pixels, classes = start_copy(round_to_uint8(draw(indices))), labels_of(indices)
            for place, index in enumerate(indices):
                if index in missing:
                    about = {**described, "index": index, "label": classes[place] if classes else None}
                    about |= {"prompt": prompts[index % len(prompts)]} if prompts else {}
                    yield Drawn(folder / _name(index), pixels, place, about)

    title = "sampling" if process.total == 1 else f"sampling, process {process.rank + 1} of {process.total}"
    with tqdm(total=len(own), desc=title, unit="image", dynamic_ncols=True, disable=process.rank != 0) as bar:
        bar.initial = bar.n = len(own) - len(missing)  # the time left counts from here
        for _ in map_ahead(_write_png, drawn(), WRITERS, ahead=2 * size):
            bar.update()
    return present(folder).issuperset(range(count)) and _finish(folder, count, labels_of, kind)


def present(folder: Path) -> set[int]:
    """Lists the indices of the images in a folder, without empty files, which a power failure may leave."""
    return {int(p.stem) for p in folder.glob("*.png") if p.stem.isdigit() and p.stat().st_size}


def _name(index: int) -> str:
    return f"{index:06d}.png"


def _write_png(image: Drawn) -> None:
    pixels, record, buffer = image.pixels()[image.place].numpy(), PngInfo(), io.BytesIO()
    record.add_text("elit", json.dumps(image.about, default=str))
    Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(buffer, "PNG", pnginfo=record)
    with atomic_file(image.path, sync=False) as temporary:
        temporary.write_bytes(buffer.getvalue())


def _finish(folder: Path, count: int, labels_of: Callable[[Sequence[int]], list[int] | None], kind: Format) -> bool:
    """Writes the archive where it is wanted, and removes what is needed only on the way to it."""
    with file_lock(folder / LOCK_FILE):
        if kind != "png" and _archived(folder) < count:
            _write_archive(folder, count, labels_of)
        for half_written in (
            ".*.png.*",
            f".{SETTINGS_FILE}.*",
            f".{ARCHIVE_FILE}.*",
        ):  # left by processes that were killed
            for path in folder.glob(half_written):
                path.unlink(missing_ok=True)
        if kind == "npz":
            for index in present(folder):
                (folder / _name(index)).unlink(missing_ok=True)
    return True


def _archived(folder: Path) -> int:
    """Counts the images in the archive; 0 without one."""
    try:
        with zipfile.ZipFile(folder / ARCHIVE_FILE) as archive, archive.open("arr_0.npy") as member:
            np.lib.format.read_magic(member)
            return int(np.lib.format.read_array_header_1_0(member)[0][0])
    except (FileNotFoundError, zipfile.BadZipFile, KeyError, ValueError):  # a damaged one is written again
        return 0


def _write_archive(folder: Path, count: int, labels_of: Callable[[Sequence[int]], list[int] | None]) -> None:
    """Writes the archive in the layout of the ADM suite, one image at a time.

    ``arr_0`` is bytes (M, H, W, 3); ``arr_1`` is labels (M,), if there are any.
    """
    labels = labels_of(range(count))

    def pixels() -> Iterator[np.ndarray]:
        for index in range(count):
            with Image.open(folder / _name(index)) as image:
                yield np.asarray(image.convert("RGB"))

    with Image.open(folder / _name(0)) as first:
        shape = (count, first.height, first.width, 3)
    with atomic_file(folder / ARCHIVE_FILE) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        with archive.open(_member("arr_0.npy"), "w", force_zip64=True) as member:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(member, header)
            for image in tqdm(pixels(), total=count, desc="packing", unit="image", dynamic_ncols=True):
                member.write(image.tobytes())
        if labels is not None:
            with archive.open(_member("arr_1.npy"), "w") as member:
                np.lib.format.write_array(member, np.array(labels, dtype=np.int64))


def _member(name: str) -> zipfile.ZipInfo:
    """Returns an entry of a fixed date, so that equal images make equal files."""
    return zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
