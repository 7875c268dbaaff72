"""Image folders and zips as training data: pixels that are read when a batch asks for them."""

from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from elit.data.dataset import StagedData
from elit.data.pixels import from_uint8
from elit.data.sources import find_images, read_bytes
from elit.data.transforms import CorruptImageError, read_rgb, to_pixels
from elit.errors import ElitError

READERS = 8  # threads; Pillow decodes outside of the interpreter's lock


class ImageFolder(StagedData):
    """Images of one square size, as ``elit prepare convert`` writes them; grey ones become RGB.

    Attributes:
        num_classes: 0 without labels.
        captions: one per image, where there are any.
        shape: (3, R, R).

    Raises:
        ElitError: see :func:`find_images`; or an image that is not square, has another size or cannot be read.
    """

    def __init__(self, root: str | Path) -> None:
        self.source = find_images(root)
        self.num_classes, self.captions = self.source.num_classes, self.source.captions
        self.labels = torch.tensor(self.source.labels or [0] * len(self.source))
        first = self._read(0)
        self.shape: tuple[int, ...] = tuple(first.shape)
        if self.shape[1] != self.shape[2]:
            raise ElitError(f"{self._path(0)} is not square; run elit prepare convert first")

    def __len__(self) -> int:
        return len(self.source)

    def read(self, indices: Tensor, seed: int | None = None) -> tuple[Tensor, Tensor]:
        """Reads images as bytes (B, 3, R, R), and labels (B,), whatever the seed."""
        return self.pixels(indices), self.labels[indices]

    def finish(self, raw: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Returns images (B, 3, R, R) in [-1, 1] and labels (B,)."""
        pixels, labels = raw
        return from_uint8(pixels), labels

    def pixels(self, indices: Tensor) -> Tensor:
        """Reads images as bytes (B, 3, R, R), in several threads."""
        return torch.stack(list(self._threads.map(self.item, indices.tolist())))

    def item(self, index: int) -> Tensor:
        """Reads one image as bytes (3, R, R)."""
        pixels = self._read(index)
        if pixels.shape != self.shape:
            height, width = pixels.shape[1:]
            raise ElitError(
                f"{self._path(index)} is {width}x{height} and the first image {self.shape[2]}x{self.shape[1]}; "
                "run elit prepare convert first"
            )
        return pixels

    def _read(self, index: int) -> Tensor:
        try:
            return to_pixels(read_rgb(read_bytes(self.source.root, self.source.names[index])))
        except CorruptImageError as error:
            raise ElitError(f"{self._path(index)} cannot be read ({error}); run elit prepare convert first") from error

    def _path(self, index: int) -> Path:
        return self.source.root / self.source.names[index]

    @cached_property
    def _threads(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(READERS)
