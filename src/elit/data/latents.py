"""Latents as training data: the posterior of every image, from which each step draws anew."""

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from elit.conditions import Text
from elit.data.autoencoder import Scaling, latent_shape, load_autoencoder, posterior, scaled, scaling
from elit.data.captions import pad_prompts
from elit.data.clips import ClipFolder
from elit.data.dataset import StagedData
from elit.data.folder import READERS, ImageFolder
from elit.data.pixels import from_uint8
from elit.data.sources import LABELS, count_classes, labels_of, parse_labels
from elit.errors import ElitError
from elit.launch import default_device
from elit.seeding import normals

INDEX = "index.json"
PUBLISHED = "vae-sd"
PUBLISHED_SCALING = (0.18215, 0.0)  # of the Stable Diffusion autoencoders, which that layout is for


class LatentData(ABC):
    """Samples ``(mean + std * noise - shift) * scale`` of posteriors that a subclass knows.

    Attributes:
        labels: (M,).
        num_classes: 0 without labels.
        captions: (M,), where there are any.
        shape: (C, h, w).
        scaling: scale and shift.
    """

    labels: Tensor
    num_classes: int
    captions: Sequence[str] | None = None
    shape: tuple[int, ...]
    scaling: Scaling

    @abstractmethod
    def moments(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Returns mean and standard deviation (B, C, h, w), float32 and not scaled, at indices (B,)."""

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Tensor, seed: int | None = None) -> tuple[Tensor, Any]:
        """Returns scaled latents (B, C, h, w) and labels (B,); without a seed the latents are the mean."""
        return self._draw(*self.moments(indices), self._noise(indices, seed)), self.labels[indices]

    def _noise(self, indices: Tensor, seed: int | None) -> Tensor | None:
        """Draws unit noise (B, C, h, w), for each index its own; none without a seed."""
        if seed is None:
            return None
        return normals([(seed, "posterior", index) for index in indices.tolist()], self.shape)

    def _draw(self, mean: Tensor, std: Tensor, noise: Tensor | None) -> Tensor:
        """Returns scaled samples of posteriors: (B, C, h, w)."""
        latents = mean if noise is None else mean + std * noise
        return scaled(latents, self.scaling)


class LatentShards(LatentData):
    """What ``elit prepare encode`` writes: ``index.json`` and safetensors shards, which are mapped, not loaded.

    Raises:
        ElitError: the index or a shard is missing or damaged.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        index = read_index(self.root / INDEX)
        self._shards = _Shards([self.root / shard["file"] for shard in index["shards"]])
        self.shape = tuple(index["shape"])
        self.num_classes, self.captions = index["num_classes"], index.get("captions")
        self.scaling = (index["scaling_factor"], index["shift_factor"])
        counts = [shard["count"] for shard in index["shards"]]
        self._ends = np.cumsum(counts)
        labels = [self._shards.tensor(shard, "labels") for shard in range(len(counts))]
        for shard, count in enumerate(counts):
            if len(labels[shard]) != count:
                file = self._shards.files[shard]
                raise ElitError(f"{file} holds {len(labels[shard])} images and the index has {count}; encode it again")
        self.labels = torch.cat(labels)
        self.text_encoder: str | None = index.get("text_encoder")
        self.text_pooled: int | None = index.get("text_pooled")  # width of the vector for the whole prompt; 0 is none

    def batch(self, indices: Tensor, seed: int | None = None) -> tuple[Tensor, Any]:
        """Returns scaled latents (B, C, h, w) and labels (B,), or the embedded captions where they are stored."""
        latents, labels = super().batch(indices, seed)
        return latents, labels if self.text_encoder is None else self._text(indices)

    @property
    def empty_prompt(self) -> Text | None:
        """The empty prompt as the text encoder embeds it, where embedded captions are stored; else None."""
        return None if self.text_encoder is None else pad_prompts([self._shards.tensor(0, "text_empty").float()])

    def _text(self, indices: Tensor) -> Text:
        tokens = []
        for shard, row in (self._place(index) for index in indices.tolist()):
            start, length = (int(self._shards.tensor(shard, f"text_{name}")[row]) for name in ("starts", "lengths"))
            tokens.append(self._shards.tensor(shard, "text_tokens")[start : start + length].float())
        return pad_prompts(tokens)

    def moments(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        places = [self._place(index) for index in indices.tolist()]
        mean, std = (
            torch.stack([self._shards.tensor(at, name)[row] for at, row in places]) for name in ("mean", "std")
        )
        return mean.float(), std.float()

    def _place(self, index: int) -> tuple[int, int]:
        """Returns shard and row of an index."""
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return shard, index - int(self._ends[shard - 1] if shard else 0)


class _Shards:
    """The tensors of safetensors files: mapped, so that only the rows that are looked at are read."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = files
        self._mapped: dict[tuple[int, str], Tensor] = {}
        for shard in range(len(files)):
            self.tensor(shard, "labels")

    def tensor(self, shard: int, name: str) -> Tensor:
        """Returns a tensor of a shard.

        Raises:
            ElitError: the file is missing or damaged, or has no such tensor.
        """
        if (shard, name) not in self._mapped:
            file = self.files[shard]
            try:
                with safe_open(file, framework="pt") as content:
                    self._mapped[shard, name] = content.get_tensor(name)
            except (OSError, SafetensorError) as error:
                raise ElitError(f"{file} is missing or damaged ({error}); delete it and encode again") from error
        return self._mapped[shard, name]


def read_index(file: Path) -> dict[str, Any]:
    """Reads the ``index.json`` of shards.

    Raises:
        ElitError: it is missing, damaged or something else.
    """
    try:
        index = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ElitError(f"{file} is missing or damaged; run elit prepare encode to its end") from error
    needed = {"shape", "num_classes", "scaling_factor", "shift_factor", "shards"}
    if not isinstance(index, dict) or not needed <= index.keys():
        raise ElitError(f"{file} is no index of latents: it lacks {', '.join(sorted(needed - set(index)))}")
    channels = [index["shape"][0]] if isinstance(index["shape"], list) and index["shape"] else []
    for value in (index["scaling_factor"], index["shift_factor"]):
        numbers = value if isinstance(value, list) and [len(value)] == channels else [value]
        if not all(type(each) in (int, float) for each in numbers):
            raise ElitError(f"{file} is damaged: scale and shift are one number, or one for each channel")
    if not all(isinstance(shard, dict) and {"file", "count", "sha256"} <= shard.keys() for shard in index["shards"]):
        raise ElitError(f"{file} is damaged: a shard needs file, count and sha256; run elit prepare encode again")
    return index


class PublishedLatents(LatentData):
    """The published layout: ``vae-sd/**/*.npy`` with mean and standard deviation (2C, h, w) stacked, not scaled.

    ``dataset.json`` lies in ``vae-sd``, beside it, or in ``images``, and names the arrays or the images, which then
    have the same number at the end of their names.

    Raises:
        ElitError: arrays or labels are missing or of another form.
    """

    scaling = PUBLISHED_SCALING

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        folder = self.root / PUBLISHED
        self.files = sorted(folder.rglob("*.npy"), key=lambda file: file.relative_to(folder).as_posix())
        if not self.files:
            raise ElitError(f"{folder} holds no .npy files")
        channels, *size = self._load(0).shape
        self.shape = (channels // 2, *size)
        labels, self.num_classes = self._labels(Path(root))
        self.labels = torch.tensor(labels)

    def moments(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        stacked = torch.stack(list(self._threads.map(self._load, indices.tolist())))
        mean, std = stacked.float().chunk(2, dim=1)
        return mean, std

    @cached_property
    def _threads(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(READERS)

    def source_images(self) -> ImageFolder:
        """Opens the images that were encoded, in the same order.

        Raises:
            ElitError: the folder ``images`` is missing, or holds others.
        """
        images = ImageFolder(self.root / "images")
        if [_number(name) for name in images.source.names] != [_number(file.name) for file in self.files]:
            raise ElitError(f"{images.source.root} does not hold one image for each array in {self.root / PUBLISHED}")
        return images

    def _load(self, index: int) -> Tensor:
        file = self.files[index]
        try:
            values = np.load(file, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise ElitError(f"{file} cannot be read ({error})") from error
        expected = (2 * self.shape[0], *self.shape[1:]) if index else values.shape
        if values.ndim != 3 or values.shape[0] % 2 or values.shape != expected:
            raise ElitError(f"{file} has the shape {values.shape}; it must hold mean and std, (2C, h, w), as the first")
        return torch.from_numpy(values)

    def _labels(self, root: Path) -> tuple[list[int], int]:
        """Returns labels in the order of the files, and the number of classes."""
        names = [file.relative_to(root / PUBLISHED).as_posix() for file in self.files]
        found = [file for file in (root / PUBLISHED / LABELS, root / LABELS, root / "images" / LABELS) if file.exists()]
        if not found:
            raise ElitError(f"{root} has no {LABELS}; it belongs in {root / PUBLISHED}")
        content = parse_labels(found[0].read_bytes(), found[0])
        labels = content["labels"]
        if labels is None:
            return [0] * len(names), 0
        if names[0] not in labels:
            labels, names = {_number(name): label for name, label in labels.items()}, [_number(name) for name in names]
        chosen = labels_of(names, labels, found[0])
        return chosen, count_classes(chosen, content["classes"])


def _number(name: str) -> str:
    """Returns the digits that end a file's name: ``00000/img-mean-std-00000012.npy`` -> ``00000012``."""
    stem = Path(name).stem
    return stem[len(stem.rstrip("0123456789")) :]


class RawImages(NamedTuple):
    """What samples of :class:`EncodedFolder` are made of.

    Attributes:
        pixels: bytes of images (B, 3, R, R) or clips (B, 3, T, H, W).
        labels: (B,).
        noise: (B, C, h, w) for the draw from their posteriors, or None for the mean.
    """

    pixels: Tensor
    labels: Tensor
    noise: Tensor | None


class EncodedFolder(LatentData, StagedData):
    """Images or clips that an autoencoder encodes whenever they are asked for: nothing is stored, and every step pays
    for it.

    Args:
        images: what it encodes.
        autoencoder: a diffusers autoencoder: a folder or a Hub id.
        batch_size: images that are encoded at a time.

    Raises:
        ElitError: see :func:`load_autoencoder`.
    """

    def __init__(self, images: ImageFolder | ClipFolder, autoencoder: str | Path, batch_size: int = 32) -> None:
        self.images = images
        self.autoencoder = load_autoencoder(autoencoder).to(default_device())
        self.batch_size = batch_size
        self.labels, self.num_classes, self.captions = images.labels, images.num_classes, images.captions
        self.scaling = scaling(self.autoencoder.config)

    @cached_property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return latent_shape(self.images.shape, self.autoencoder)

    def moments(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        return self._encode(self.images.read(indices)[0])

    def read(self, indices: Tensor, seed: int | None = None) -> RawImages:
        """Reads images as bytes, and draws their noise."""
        return RawImages(*self.images.read(indices), self._noise(indices, seed))

    def finish(self, raw: RawImages) -> tuple[Tensor, Tensor]:
        """Returns scaled latents (B, C, h, w) and labels (B,)."""
        mean, std = self._encode(raw.pixels)
        return self._draw(mean, std, None if raw.noise is None else raw.noise.to(std.device)), raw.labels

    def batch(self, indices: Tensor, seed: int | None = None) -> tuple[Tensor, Tensor]:
        return self.finish(self.read(indices, seed))

    def _encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Encodes bytes, some at a time, to mean and standard deviation in float32."""
        batches = (part.to(self.autoencoder.device) for part in pixels.split(self.batch_size))
        parts = [posterior(from_uint8(batch), self.autoencoder) for batch in batches]
        mean, std = (torch.cat(kind).float() for kind in zip(*parts, strict=True))
        return mean, std
