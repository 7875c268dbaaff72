"""The interface that training asks of a data set, and the simplest data set: tensors in memory."""

from abc import ABC, abstractmethod
from collections.abc import Callable
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

        Training calls this in a thread of its own, some steps before it needs the batch, in the order of the steps.
        """
        ...


class StagedData(ABC):
    """Makes its batches in two stages, so that training can read ahead of the device and transfer little.

    :meth:`read` gets from the disk what a batch needs, in another thread, and :meth:`finish` makes samples of it, on
    whatever device its tensors have been brought to in between. Data sets that have nothing to do on the device need
    no stages: they only have a ``batch``.
    """

    @abstractmethod
    def read(self, indices: Tensor, seed: int | None = None) -> Any:
        """Reads what the samples at indices (B,) are made of: tensors in tuples, on the processor. Pixels are bytes."""

    @abstractmethod
    def finish(self, raw: Any) -> tuple[Tensor, Any]:
        """Makes samples (B, C, H, W) and labels (B,) or text of what :meth:`read` gave."""

    def batch(self, indices: Tensor, seed: int | None = None) -> tuple[Tensor, Any]:
        """Returns samples and labels or text at indices (B,), see :meth:`Data.batch`."""
        return self.finish(self.read(indices, seed))


def read(data: Data, indices: Tensor, seed: int | None = None) -> Any:
    """Does the part of ``data.batch`` that needs no device: the first stage, or all of it where there are no stages."""
    return data.read(indices, seed) if isinstance(data, StagedData) else data.batch(indices, seed)


def finish(data: Data, raw: Any) -> tuple[Tensor, Any]:
    """Does what :func:`read` has left to do."""
    return data.finish(raw) if isinstance(data, StagedData) else raw


def map_tensors(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Applies a function to the tensors in tuples and lists, nested at will; anything else stays as it is."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple | list):
        changed = [map_tensors(change, each) for each in value]
        return type(value)(*changed) if hasattr(value, "_fields") else type(value)(changed)
    return value


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
