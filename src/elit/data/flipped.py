"""Mirror images as augmentation."""

from typing import Any

import torch
from torch import Tensor

from elit.data.dataset import Data, StagedData, finish, read
from elit.seeding import derive_seed


class Flipped(StagedData):
    """Pixels, each sample mirrored left to right with probability 1/2: by the seed and its index alone.

    Args:
        data: samples (C, ..., W).
    """

    def __init__(self, data: Data) -> None:
        self.data = data

    @property
    def num_classes(self) -> int:
        return self.data.num_classes

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    def __len__(self) -> int:
        return len(self.data)

    def read(self, indices: Tensor, seed: int | None = None) -> tuple[Tensor, Any]:
        """Reads samples (B, C, ..., W), bytes or numbers, and labels; without a seed no sample is mirrored."""
        x, y = read(self.data, indices, seed)
        if seed is None:
            return x, y
        mirrored = torch.tensor([bool(derive_seed(seed, "flip", index) % 2) for index in indices.tolist()])
        return torch.where(mirrored.view(-1, *(1,) * (x.dim() - 1)), x.flip(-1), x), y

    def finish(self, raw: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        return finish(self.data, raw)
