"""Which samples make up which batch: a function of (seed, step), so that any resume sees the same data."""

from functools import lru_cache

import torch
from torch import Tensor

from elit import seeding


@lru_cache(maxsize=2)
def permutation(seed: int, epoch: int, length: int) -> Tensor:
    """Returns the order of one epoch: (length,) indices."""
    return seeding.permutation(seeding.generator(seed, "epoch", epoch), length)


def sample_indices(seed: int, start: int, count: int, length: int) -> Tensor:
    """Returns the indices (count,) of the samples that training sees after ``start`` others.

    Epochs follow each other without a gap: a batch may end one and begin the next.
    """
    positions = torch.arange(start, start + count)
    epochs, places = positions // length, positions % length
    parts = [permutation(seed, int(epoch), length)[places[epochs == epoch]] for epoch in epochs.unique()]
    return torch.cat(parts)
