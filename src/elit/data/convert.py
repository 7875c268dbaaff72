"""Converts images of any kind to a folder of square PNG with ``dataset.json`` (the EDM layout) or captions."""

import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from elit.atomic import atomic_file, write_json
from elit.data.sources import CAPTIONS, LABELS, SETTINGS, Source, fingerprint, read_bytes
from elit.data.transforms import TRANSFORMS, CorruptImageError, read_rgb
from elit.errors import ElitError

REPORT = "report.json"
FOLDER_SIZE = 1000  # images per folder


def convert_images(
    source: Source, out: Path, resolution: int, transform: str, workers: int, strict: bool
) -> Iterator[tuple[str, str] | None]:
    """Converts one image per turn, in order; what an earlier, killed run has converted stays.

    The i-th image of the source becomes ``out/00000/img00000000.png`` with i in place of the zeros, so names do not
    depend on other images. ``dataset.json`` is written last: with it the folder is complete.

    Yields:
        None, or the name of an image that cannot be read and why. These are skipped and listed in ``report.json``.

    Raises:
        ElitError: a wrong option, a folder that holds images of other settings, or under ``strict`` a corrupt image.
    """
    if transform not in TRANSFORMS:
        raise ElitError(f"there is no transform {transform!r}; there are {', '.join(TRANSFORMS)}")
    if resolution < 1 or workers < 1:
        raise ElitError(f"resolution and workers must be at least 1, not {resolution} and {workers}")
    settings = {"source": fingerprint(source), "resolution": resolution, "transform": transform}
    _write_or_compare(out / SETTINGS, settings)

    convert = partial(_convert_image, source.root, out, transform, resolution)
    skipped: dict[int, str] = {}
    for i, reason in enumerate(_in_processes(convert, list(enumerate(source.names)), workers)):
        if reason is not None and strict:
            raise ElitError(f"{source.root / source.names[i]} cannot be read ({reason}); repair or remove it")
        if reason is not None:
            skipped[i] = reason
        yield None if reason is None else (source.names[i], reason)

    for leftover in out.glob("*/.img*.png"):  # of a run that was killed
        leftover.unlink()
    kept = [i for i in range(len(source)) if i not in skipped]
    if not kept:
        raise ElitError(f"none of the {len(source)} images of {source.root} can be read")
    labels = None if source.labels is None else [[image_name(i), source.labels[i]] for i in kept]
    report = [{"name": source.names[i], "reason": reason} for i, reason in skipped.items()]
    write_json(out / REPORT, {"images": len(kept), "skipped": report}, indent=None)
    if source.captions is not None:
        rows = [{"file_name": image_name(i), "text": source.captions[i]} for i in kept]
        with atomic_file(out / CAPTIONS) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_json(out / LABELS, {"labels": labels} | ({"classes": source.classes} if source.classes else {}), indent=None)


def image_name(i: int) -> str:
    """Returns the name of the i-th image in the folder."""
    return f"{i // FOLDER_SIZE:05d}/img{i:08d}.png"


def available_cpus() -> int:
    """Counts the processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _convert_image(root: Path, out: Path, transform: str, resolution: int, job: tuple[int, str]) -> str | None:
    """Converts one image unless it is there; returns the reason why it could not be read."""
    i, name = job
    target = out / image_name(i)
    if target.exists() and target.stat().st_size:  # a power failure may leave an empty file
        return None
    try:
        image = read_rgb(read_bytes(root, name))
    except CorruptImageError as error:
        return str(error)
    with atomic_file(target, sync=False) as temporary:
        TRANSFORMS[transform](image, resolution).save(temporary)
    return None


def _in_processes(convert: "partial[str | None]", jobs: list[tuple[int, str]], workers: int) -> Iterable[str | None]:
    """Yields results in the order of the jobs."""
    if workers == 1:
        yield from map(convert, jobs)
        return
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))  # a fork would inherit PyTorch's threads
    try:
        yield from pool.map(convert, jobs, chunksize=16)
    finally:
        pool.shutdown(cancel_futures=True)


def _write_or_compare(file: Path, settings: dict[str, object]) -> None:
    if not file.exists():
        if file.parent.is_file():
            raise ElitError(f"{file.parent} is a file; choose a new or empty folder")
        if file.parent.exists() and any(not path.name.startswith(".") for path in file.parent.iterdir()):
            raise ElitError(f"{file.parent} holds other files; choose a new or empty folder")
        write_json(file, settings, indent=None)
        return
    try:
        before = json.loads(file.read_text())
    except ValueError as error:
        raise ElitError(f"{file} is damaged ({error}); delete {file.parent} and start anew") from error
    for name, value in settings.items():
        if before.get(name) != value:
            raise ElitError(f"{file.parent} was begun with another {name}; choose a new folder, or the old {name}")
