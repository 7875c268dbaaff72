"""Encodes images or clips to the posteriors of their latents, and captions to text, in safetensors shards with an
index."""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from elit.atomic import atomic_file, make_folder, write_json
from elit.conditions import Text
from elit.data.autoencoder import latent_shape, posterior, scaling
from elit.data.clips import ClipFolder
from elit.data.folder import ImageFolder
from elit.data.latents import INDEX, read_index
from elit.data.pixels import from_uint8
from elit.data.sources import fingerprint
from elit.data.text import UNUSABLE
from elit.digest import weights_digest
from elit.errors import ElitError, first_line
from elit.launch import rank_and_world_size

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class EncodeReport(NamedTuple):
    """What one batch took.

    Attributes:
        images: in the batch.
        waited: seconds for images to be read.
        encoded: seconds of the autoencoder, until the latents are in main memory.
    """

    images: int
    waited: float
    encoded: float


class Encoding:
    """Encodes images into a folder, one batch per turn of ``for report in encoding``.

    A shard holds ``mean`` and ``std`` (n, C, h, w), not scaled, and ``labels`` (n,). With flips each image is followed
    by its mirror image. With a text encoder, it also holds the embedded captions: ``text_tokens`` (L, D) one after the
    other without padding, ``text_starts`` and ``text_lengths`` (n,) to find that of each image, and ``text_empty``, the
    empty prompt. Shards appear whole; those of an earlier, killed run are kept, and as batches never span
    shards, the bytes are the same as without the interruption. Under ``torchrun`` or ``accelerate launch`` process r
    of n makes the shards r, r + n, ...; they need not talk to each other, and whichever then sees all shards writes
    ``index.json``.

    Args:
        images: what to encode: images or clips.
        out: the folder.
        autoencoder: of diffusers, on its device.
        name: of the autoencoder, for the index: a folder or a Hub id.
        revision: of the autoencoder on the Hub, for the index.
        flips: whether to add mirror images.
        dtype: of what is stored: float32, float16 or bfloat16.
        shard_size: images per shard.
        batch_size: images at a time.
        workers: processes that read images; 0 reads them in this one.
        text_encoder: embeds the captions, see :func:`~elit.data.text.open_encoder`; None leaves them as they are.
        text_encoder_name: for the index.

    Raises:
        ElitError: a wrong option, an image that cannot be read, a text encoder without captions, or a folder with
            shards of other settings.
    """

    def __init__(
        self,
        images: ImageFolder | ClipFolder,
        out: Path,
        autoencoder: Any,
        name: str,
        revision: str | None = None,
        flips: bool = False,
        dtype: str = "float32",
        shard_size: int = 4096,
        batch_size: int = 32,
        workers: int = 0,
        text_encoder: Callable[[Sequence[str]], Text] | None = None,
        text_encoder_name: str | None = None,
    ) -> None:
        if shard_size < 1 or batch_size < 1 or workers < 0:
            raise ElitError(
                f"shard_size and batch_size must be at least 1, not {shard_size} and {batch_size}, and workers at "
                f"least 0, not {workers}"
            )
        if dtype not in DTYPES:
            raise ElitError(f"dtype is {dtype!r}; it is one of {', '.join(DTYPES)}")
        if text_encoder is not None and images.captions is None:
            raise ElitError(f"text_encoder is {text_encoder_name}, and {images.source.root} has no captions")
        self.images, self.out, self.autoencoder, self.text_encoder = images, out, autoencoder, text_encoder
        self.dtype, self.workers = DTYPES[dtype], workers
        scale, shift = scaling(autoencoder.config)
        self.settings: dict[str, Any] = {
            "resolution": list(images.shape[1:]) if len(images.shape) > 3 else images.shape[1],
            "images": len(images),
            "source": fingerprint(images.source),
            "num_classes": images.num_classes,
            "autoencoder": name,
            "revision": revision,
            "weights_sha256": weights_digest(autoencoder, digits=64),
            "scaling_factor": scale,
            "shift_factor": shift,
            "flips": flips,
            "dtype": dtype,
            "shard_size": shard_size,
            "batch_size": batch_size,
        }
        if isinstance(images, ClipFolder):
            self.settings["stride"] = images.stride
        if text_encoder is not None:
            self.settings["text_encoder"] = text_encoder_name
            self.settings["text_pooled"] = getattr(text_encoder, "pooled", 0)
        self.shards = [
            range(start, min(start + shard_size, len(images))) for start in range(0, len(images), shard_size)
        ]
        self._done = {shard for shard in range(len(self.shards)) if self._is_there(shard)}
        rank, processes = rank_and_world_size()
        self.todo = [shard for shard in range(rank, len(self.shards), processes) if shard not in self._done]

    def __iter__(self) -> Iterator[EncodeReport]:
        if self.todo:
            latent_shape(self.images.shape, self.autoencoder)
            self._check_text()
        make_folder(self.out)  # one that cannot be made is told before the work
        batches = {shard: self._batches(self.shards[shard]) for shard in self.todo}
        loader = iter(self._loader([batch for shard in self.todo for batch in batches[shard]]))
        for shard in self.todo:
            means, stds = [], []
            for _ in batches[shard]:
                start = time.perf_counter()
                pixels = next(loader)
                if isinstance(pixels, ElitError):
                    raise pixels
                read = time.perf_counter()
                mean, std = self._encode(pixels)
                means.append(mean)
                stds.append(std)
                yield EncodeReport(len(pixels), read - start, time.perf_counter() - read)
            self._write(shard, torch.cat(means), torch.cat(stds))
        self._write_index()

    def _check_text(self) -> None:
        """Embeds the empty prompt, which every shard holds: what is wrong is told before images are encoded."""
        try:
            is_there = self.text_encoder is None or bool(self.text_encoder([""]).mask.any())
        except UNUSABLE as error:
            reason = first_line(error)
            raise ElitError(f"{self.settings['text_encoder']} cannot embed the empty prompt ({reason})") from error
        if not is_there:
            raise ElitError(f"{self.settings['text_encoder']} makes no token of the empty prompt")

    def _batches(self, images: range) -> list[range]:
        size = self.settings["batch_size"]
        return [images[start : start + size] for start in range(0, len(images), size)]

    def _loader(self, batches: list[range]) -> "DataLoader[Tensor | ElitError]":
        pinned = self.autoencoder.device.type == "cuda"
        return DataLoader(
            PixelBatches(self.images), batch_size=None, sampler=batches, num_workers=self.workers, pin_memory=pinned
        )

    def _encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Encodes bytes (b, 3, ..., R, R) to mean and std of each image, and of its mirror image after it."""
        pixels = pixels.to(self.autoencoder.device, non_blocking=True)
        if self.settings["flips"]:
            pixels = torch.stack((pixels, pixels.flip(-1)), dim=1).flatten(0, 1)
        mean, std = posterior(from_uint8(pixels), self.autoencoder)
        return mean.to(self.dtype).cpu(), std.to(self.dtype).cpu()

    def _write(self, shard: int, mean: Tensor, std: Tensor) -> None:
        images = self.shards[shard]
        labels = self.images.labels[images.start : images.stop]
        if self.settings["flips"]:
            labels = labels.repeat_interleave(2)
        file = self._file(shard)
        for leftover in file.parent.glob(f".{file.name}.*"):  # of a run that was killed here
            leftover.unlink(missing_ok=True)
        # One entry of metadata: the order of several is not defined, and the bytes shall be.
        with atomic_file(file) as temporary:
            tensors = {"mean": mean.contiguous(), "std": std.contiguous(), "labels": labels} | self._text(images)
            save_file(tensors, temporary, metadata={"elit": json.dumps(self.settings)})

    def _text(self, images: range) -> dict[str, Tensor]:
        """Embeds the captions of a shard, each different one once; nothing without a text encoder."""
        if self.text_encoder is None or self.images.captions is None:
            return {}
        wanted = [self.images.captions[i] for i in images for _ in range(2 if self.settings["flips"] else 1)]
        different = list(dict.fromkeys(wanted))
        tokens: list[Tensor] = []
        for start in range(0, len(different), self.settings["batch_size"]):
            text = self.text_encoder(different[start : start + self.settings["batch_size"]])
            tokens += [each[mask].to(self.dtype).cpu() for each, mask in zip(*text, strict=True)]
        empty = self.text_encoder([""])
        lengths = torch.tensor([len(each) for each in tokens])
        starts = lengths.cumsum(0) - lengths
        place = {caption: i for i, caption in enumerate(different)}
        rows = torch.tensor([place[caption] for caption in wanted])
        return {
            "text_tokens": torch.cat(tokens),
            "text_starts": starts[rows],
            "text_lengths": lengths[rows],
            "text_empty": empty.tokens[0, empty.mask[0]].to(self.dtype).cpu().contiguous(),
        }

    def _write_index(self) -> None:
        files = [self._file(shard) for shard in range(len(self.shards))]
        complete = (self.out / INDEX).exists() and not self.todo
        if complete or not all(file.exists() for file in files):
            return
        copies = 2 if self.settings["flips"] else 1
        shards = [
            {"file": file.name, "count": copies * len(images), "sha256": _hash(file)}
            for file, images in zip(files, self.shards, strict=True)
        ]
        with safe_open(files[0], framework="pt") as first:
            shape = first.get_slice("mean").get_shape()[1:]
        totals = {"shape": shape, "count": copies * len(self.images), "classes": self.images.source.classes}
        if self.images.captions is not None:
            totals["captions"] = [caption for caption in self.images.captions for _ in range(copies)]
        write_json(self.out / INDEX, self.settings | totals | {"shards": shards}, indent=None)

    def _file(self, shard: int) -> Path:
        return self.out / f"shard-{shard:05d}.safetensors"

    def _is_there(self, shard: int) -> bool:
        """Returns whether a shard was written before, with these settings."""
        file = self._file(shard)
        if not file.exists():
            return False
        try:
            with safe_open(file, framework="pt") as content:
                before = json.loads(content.metadata()["elit"])
        except (SafetensorError, TypeError, KeyError, ValueError) as error:
            raise ElitError(f"{file} is damaged or no shard of latents; delete it to have it made again") from error
        for name, value in self.settings.items():
            if before.get(name) != value:
                raise ElitError(f"{file} was made with {name} = {before.get(name)}, not {value}; choose another folder")
        return True


class PixelBatches(Dataset[Tensor | ElitError]):
    """Batches of images by their indices. An error is handed over: a loader would bury one that is raised."""

    def __init__(self, images: ImageFolder | ClipFolder) -> None:
        self.images = images

    def __getitem__(self, batch: range) -> Tensor | ElitError:
        try:
            return torch.stack([self.images.item(index) for index in batch])
        except ElitError as error:
            return error


def verify_shards(folder: Path) -> Iterator[Path | None]:
    """Reads one shard per turn and compares it with its checksum in ``index.json``.

    Yields:
        None, or the file of a shard that is missing or damaged.

    Raises:
        ElitError: see :func:`~elit.data.latents.read_index`.
    """
    for shard in read_index(folder / INDEX)["shards"]:
        file = folder / shard["file"]
        yield None if file.is_file() and _hash(file) == shard["sha256"] else file


def _hash(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
