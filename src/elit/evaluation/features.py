"""Features of all images of a source, in files of a cache that any number of processes fill together.

A file holds a shard: SHARD images that follow each other. Inside, images meet the extractor in batches that are a
function of their index, the last one filled up. So features do not depend on which process computed them, or when. They
do depend on the kind of device, by rounding; that is part of the key of the cache, so one result never mixes two kinds.
Threads read and decode the next images meanwhile.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from elit.data.remote import cache_folder
from elit.errors import ElitError
from elit.evaluation.extractors import Extractor
from elit.evaluation.frechet import Moments
from elit.evaluation.image_set import READERS, ImageSet
from elit.evaluation.statistics import RunningMoments
from elit.tensors import read_tensors, write_tensors
from elit.threads import map_ahead

SHARD, BATCH, GPU_BATCH = 512, 32, 128


class CachedFeatures:
    """The features of an image set by an extractor, kept on disk."""

    def __init__(self, images: ImageSet, extractor: Extractor) -> None:
        self.images, self.extractor = images, extractor
        self.batch = BATCH if torch.device(extractor.device).type == "cpu" else GPU_BATCH
        key = json.dumps([images.content, extractor.protocol(), torch.__version__, SHARD, self.batch])
        self.folder = cache_folder() / "features" / hashlib.sha256(key.encode()).hexdigest()[:32]
        self.shards = -(-images.count // SHARD)

    def missing(self) -> list[int]:
        """Returns the shards that nobody has computed yet."""
        return [shard for shard in range(self.shards) if not self._file(shard).exists()]

    def compute(self, owns: Callable[[int], bool] = lambda shard: True, progress: bool = False) -> None:
        """Computes the missing shards that this process owns.

        Raises:
            ElitError: images that cannot be read, or a cache that cannot be written.
        """
        todo = [shard for shard in self.missing() if owns(shard)]
        with tqdm(
            total=len(todo) * SHARD, desc="features", unit="image", dynamic_ncols=True, disable=not progress or not todo
        ) as bar:
            starts = [start for shard in todo for start in self._batches(shard)]
            with closing(map_ahead(self._read, starts, READERS, ahead=2 * READERS)) as batches:
                for shard in todo:
                    pieces = []
                    for _ in self._batches(shard):
                        pieces.append(self._extract(next(batches)))
                        bar.update(self.batch)
                    write_tensors(self._file(shard), {k: torch.cat([piece[k] for piece in pieces]) for k in pieces[0]})

    def read(self, name: str) -> Tensor:
        """Reads one kind of features of all images, (M, F), to the device of the extractor."""
        return torch.cat(list(self.parts(name)))

    def parts(self, name: str) -> Iterator[Tensor]:
        """Reads one kind of features shard by shard, to the device of the extractor.

        Raises:
            ElitError: a damaged file of the cache.
        """
        for shard in range(self.shards):
            tensors = read_tensors(self._file(shard))
            if name not in tensors:
                raise ElitError(f"{self._file(shard)} lacks {name}; remove the folder to compute it again")
            yield tensors[name].to(self.extractor.device)

    def moments(self, name: str) -> Moments:
        """Computes mean and covariance of one kind of features, in bounded memory."""
        running: RunningMoments | None = None
        for part in self.parts(name):
            running = running or RunningMoments(part.shape[1], part.device)
            running.add(part)
        assert running is not None  # a source is never empty
        return running.moments()

    def _batches(self, shard: int) -> range:
        """Returns where the batches of a shard start."""
        return range(shard * SHARD, min((shard + 1) * SHARD, self.images.count), self.batch)

    def _read(self, start: int) -> Tensor:
        return self.images.read(start, min(start + self.batch, self.images.count))

    def _extract(self, pixels: Tensor) -> dict[str, Tensor]:
        filling = pixels.new_zeros(self.batch - len(pixels), *pixels.shape[1:])
        found = self.extractor(torch.cat((pixels, filling)))
        return {name: values[: len(pixels)].contiguous() for name, values in found.items()}

    def _file(self, shard: int) -> Path:
        return self.folder / f"{shard:05d}.safetensors"
