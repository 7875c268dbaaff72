"""The interface that training asks of a data set, and the simplest data set: tensors in memory."""

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor


class Data(Protocol):
    """A data set: samples in the model's space (pixels or latents), with labels or text."""

    @property
    def num_classes(self) -> int:
        """The number of classes; 0 for unlabelled data."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one sample, (C, H, W)."""
        ...

    def __len__(self) -> int: ...

    def batch(self, indices: Tensor, seed: int | None = None) -> tuple[Tensor, Any]:
        """Returns samples (B, C, H, W) and labels (B,), or :class:`~elit.conditions.Text`, at indices (B,).

        Data with chance in it (latents of a posterior, mirror images) derives it from the seed and the index of each
        sample, so that processes that share a batch see the same samples as one process alone. Without a seed there is
        no chance: a posterior gives its mean. Unlabelled data has labels 0.
        """
        ...


@dataclass(frozen=True)
class ImageData:
    """A data set in memory.

    Attributes:
        images: (M, C, H, W).
        labels: (M,).
        num_classes: number of labels.
    """

    images: Tensor
    labels: Tensor
    num_classes: int

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.images.shape[1:])

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: Tensor, seed: int | None = None) -> tuple[Tensor, Tensor]:
        return self.images[indices], self.labels[indices]
