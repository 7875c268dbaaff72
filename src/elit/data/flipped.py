"""Mirror images as augmentation."""

from typing import Any

import torch
from torch import Tensor

from elit.data.dataset import Data
from elit.seeding import derive_seed


class Flipped:
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

    def batch(self, indices: Tensor, seed: int | None = None) -> tuple[Tensor, Any]:
        """Returns samples (B, C, ..., W) and labels; without a seed no sample is mirrored."""
        x, y = self.data.batch(indices, seed)
        if seed is None:
            return x, y
        mirrored = torch.tensor([bool(derive_seed(seed, "flip", index) % 2) for index in indices.tolist()])
        return torch.where(mirrored.view(-1, *(1,) * (x.dim() - 1)), x.flip(-1), x), y
