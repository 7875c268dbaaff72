"""Where images come from: a folder or a zip file of them, with labels, captions or neither."""

import hashlib
import json
import os
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from elit.data.transforms import CorruptImageError
from elit.errors import ElitError

LABELS, CAPTIONS = "dataset.json", "metadata.jsonl"
SETTINGS = "prepare.json"  # of a conversion, which writes its labels last
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
T = TypeVar("T")


@dataclass(frozen=True)
class Source:
    """The images of a folder or zip file in a fixed order, that of their sorted names.

    Attributes:
        root: the folder or zip file.
        names: of the images, relative to the root, with forward slashes.
        labels: one per image, or None for unlabelled images.
        classes: names of the classes, where they are known.
        captions: one per image, or None for images without captions.
    """

    root: Path
    names: Sequence[str]
    labels: Sequence[int] | None
    classes: Sequence[str] | None = None
    captions: Sequence[str] | None = None

    def __len__(self) -> int:
        return len(self.names)

    @property
    def num_classes(self) -> int:
        """The number of classes; 0 without labels."""
        return count_classes(self.labels, self.classes)


def count_classes(labels: Sequence[int] | None, classes: Sequence[str] | None) -> int:
    """Counts classes: one per name, or up to the largest label where there are no names; 0 without labels."""
    if labels is None:
        return 0
    return len(classes) if classes is not None else max(labels, default=-1) + 1


def find_images(root: str | Path) -> Source:
    """Finds the images of a folder or zip file, and their labels or captions.

    With a ``metadata.jsonl`` they have captions: a line ``{"file_name": name, "text": caption}`` for each, the form of
    Hugging Face's image folders. Else labels come from its ``dataset.json`` (``{"labels": [[name, label], ...]}``, or
    null for none); without that file, from the class folders that the images lie in, sorted by name; images that lie in
    no folder have none.

    Raises:
        ElitError: there are no images, or their captions or labels are missing, wrong or ambiguous.
    """
    root = Path(root)
    if not root.exists():
        raise ElitError(f"there is no folder or zip file {root}; give one of images")
    names = image_names(root)
    if not names:
        clips = f"of a folder of videos, {root}@8x64x64 are clips of 8 frames of 64x64 pixels"
        raise ElitError(f"{root} holds no images; it needs files that end in {', '.join(SUFFIXES)} ({clips})")
    listed = _list(root)
    if SETTINGS in listed and LABELS not in listed:
        raise ElitError(f"{root} was not converted to its end; run elit prepare convert again, it continues")
    if CAPTIONS in listed:
        return Source(root, names, None, captions=captions_of(names, _listed_bytes(root, CAPTIONS), root / CAPTIONS))
    if LABELS in listed:
        content = parse_labels(_listed_bytes(root, LABELS), root / LABELS)
        labels = None if content["labels"] is None else labels_of(names, content["labels"], root / LABELS)
        return Source(root, names, labels, content.get("classes"))
    folders = [name.partition("/")[0] if "/" in name else "" for name in names]
    classes = sorted(set(folders))
    if classes == [""]:
        return Source(root, names, None)
    if "" in classes:
        loose = names[folders.index("")]
        raise ElitError(f"{root / loose} lies in no class folder and others do; move it, or add a {LABELS}")
    number = {name: label for label, name in enumerate(classes)}
    return Source(root, names, [number[folder] for folder in folders], classes)


def _listed_bytes(root: Path, name: str) -> bytes:
    try:
        return read_bytes(root, name)
    except CorruptImageError as error:
        raise ElitError(f"{root / name} cannot be read ({error}); copy it again") from error


def parse_labels(text: bytes, file: Path) -> dict[str, Any]:
    """Parses a ``dataset.json``: returns ``labels`` as a dictionary from name to label or None, and ``classes``.

    Raises:
        ElitError: it is not of that form.
    """
    remedy = f'{file} must be {{"labels": [["name.png", 0], ...]}}, or null for no labels'
    try:
        content = json.loads(text)
        rows = content["labels"]
        labels = None if rows is None else {str(name): label for name, label in rows}
    except (ValueError, TypeError, KeyError) as error:
        raise ElitError(f"{remedy} ({error})") from error
    for name, label in (labels or {}).items():
        if not isinstance(label, int) or isinstance(label, bool) or label < 0:
            raise ElitError(f"{file} gives {name} the label {label!r}; labels are whole numbers from 0 up")
    classes = content.get("classes")
    if classes is not None and labels and max(labels.values()) >= len(classes):
        raise ElitError(f"{file} uses label {max(labels.values())} and names {len(classes)} classes")
    return {"labels": labels, "classes": classes}


def labels_of(names: Sequence[str], labels: dict[str, int], file: Path) -> list[int]:
    """Returns the labels of the names, in their order.

    Raises:
        ElitError: a name has no label, or a label no file.
    """
    return _of_each(names, labels, "label", file)


def captions_of(names: Sequence[str], text: bytes, file: Path) -> list[str]:
    """Parses a ``metadata.jsonl`` and returns the captions of the names, in their order; other entries are ignored.

    Raises:
        ElitError: a line is of another form, a name has no caption, or a caption no file.
    """
    captions: dict[str, str] = {}
    for number, line in enumerate(text.split(b"\n"), 1):
        try:
            if line.strip():
                row = json.loads(line)
                captions[row["file_name"]] = _as_text(row["text"])
        except (ValueError, TypeError, KeyError) as error:
            remedy = '{"file_name": "name.png", "text": "a caption"}'
            raise ElitError(f"line {number} of {file} must be like {remedy} ({error})") from error
    return _of_each(names, captions, "caption", file)


def _as_text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"the text is {value!r}")
    return value


def _of_each(names: Sequence[str], values: Mapping[str, T], kind: str, file: Path) -> list[T]:
    for name in names:
        if name not in values:
            raise ElitError(f"{file} has no {kind} for {name}; add it, or remove the image")
    if len(values) > len(names):
        lost = min(values.keys() - set(names))
        raise ElitError(f"{file} has a {kind} for {lost}, and there is no such file")
    return [values[name] for name in names]


def image_names(root: Path) -> list[str]:
    """Lists the names of the images of a folder or zip file, sorted and without hidden files.

    Raises:
        ElitError: it is neither.
    """
    return sorted(name for name in _list(root) if name.lower().endswith(SUFFIXES))


def read_bytes(root: Path, name: str) -> bytes:
    """Reads a file of a folder or zip file.

    Raises:
        CorruptImageError: it cannot be read.
    """
    try:
        return (root / name).read_bytes() if root.is_dir() else _open_zip(root, os.getpid()).read(name)
    except (OSError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:  # of zips: encrypted, or other bytes
        raise CorruptImageError(f"{type(error).__name__}: {error}") from error


def _list(root: Path) -> list[str]:
    if root.is_dir():
        paths = (path.relative_to(root) for path in root.rglob("*"))
        return [path.as_posix() for path in paths if not any(part.startswith(".") for part in path.parts)]
    names = _open_zip(root, os.getpid()).namelist()
    return [name for name in names if not any(part.startswith((".", "__MACOSX")) for part in name.split("/"))]


@lru_cache(maxsize=4)
def _open_zip(root: Path, process: int) -> zipfile.ZipFile:
    """Opens a zip file and keeps it open, as the table of contents of a large one takes long to read.

    Each process opens its own, as forks would share the position in the file.
    """
    try:
        return zipfile.ZipFile(root)
    except (OSError, zipfile.BadZipFile) as error:
        raise ElitError(f"{root} is neither a folder nor a zip file that can be read ({error})") from error


def fingerprint(source: Source) -> str:
    """Hashes the names and labels or captions, to tell whether work can be continued."""
    of_images = source.labels if source.captions is None else source.captions
    return hashlib.sha256(json.dumps([list(source.names), of_images]).encode()).hexdigest()
