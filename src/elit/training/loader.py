"""The batches of training, which a thread reads while the device computes.

What a process sees in a step is a function of the configuration, the step and the number of samples before it, so it
can be read ahead: a run that is stopped and continued, with other batches on their way, sees the same.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from elit.data import Data, sample_indices
from elit.data.dataset import map_tensors, read
from elit.errors import ElitError
from elit.flow import TrainingFlow
from elit.models import Model
from elit.seeding import derive_seed
from elit.training.batch import MicroBatch, TrainingDraws, draw, micro_batches, pad_micro_batches, share
from elit.training.budgets import TrainingLevels, scaled_batch_size
from elit.training.config import RunConfig
from elit.training.repa import AlignmentFeatures

Place = TypeVar("Place")
Item = TypeVar("Item")


class StepBatch(NamedTuple):
    """What a process trains on in one step.

    Attributes:
        step: number of steps before it.
        levels: J~ of each sample of the global batch.
        raw: of this process's samples, what :func:`elit.data.dataset.read` gave.
        pixels: bytes of their images, where hidden tokens are aligned with what an encoder sees in images that are not
            the samples themselves; else None.
        draws: their times, noise and dropped labels.
        parts: the micro-batches that they are cut into.
    """

    step: int
    levels: list[int]
    raw: Any
    pixels: Tensor | None
    draws: TrainingDraws
    parts: list[MicroBatch]

    @property
    def size(self) -> int:
        """Number of samples, over all processes."""
        return len(self.levels)

    def to(self, device: torch.device) -> "StepBatch":
        """Starts to copy all tensors to a device; from pinned memory, nothing waits for that."""
        if device.type == "cpu":
            return self
        return map_tensors(lambda tensor: tensor.to(device, non_blocking=True), self)


class BatchLoader:
    """Reads the share of one process in the batch of each step.

    Args:
        config: of the run.
        model: what is trained; only its configuration is looked at.
        levels: that steps draw from.
        flow: of the model.
        data: where samples come from.
        features: of alignment, or None.
        device: that they are for. Batches for a GPU lie in pinned memory, from which it copies them by itself.
        process: the number of this process.
        processes: how many there are.
    """

    def __init__(
        self,
        config: RunConfig,
        model: Model,
        levels: TrainingLevels,
        flow: TrainingFlow,
        data: Data,
        features: AlignmentFeatures | None = None,
        device: torch.device = torch.device("cpu"),  # noqa: B008
        process: int = 0,
        processes: int = 1,
    ) -> None:
        self.config, self.model, self.levels, self.flow = config, model, levels, flow
        self.data, self.features, self.device = data, features, device
        self.process, self.processes = process, processes
        wanted, smallest = config.elit.levels_per_step, config.batch_size // processes
        if smallest < wanted:
            raise ElitError(
                f"elit.levels_per_step is {wanted}, and a process has {smallest} samples of a step; raise batch_size"
            )
        self.batch_sizes = dict.fromkeys(levels.levels or (0,), config.batch_size)  # by level, over all processes
        if config.elit.batching == "scaled":
            self.batch_sizes = {
                level: scaled_batch_size(model, level, config.batch_size) if level else config.batch_size
                for level in self.batch_sizes
            }

    def batches(self, step: int, seen: int) -> Iterator[Future[StepBatch]]:
        """Yields the batches of a step and those after it, to the end of the run, which a thread reads ahead.

        ``result()`` of each waits until it is read. Close the iterator to end the thread.

        Args:
            step: number of steps done.
            seen: number of samples seen in them.
        """
        return prefetch(self.read, self._places(step, seen), self.config.prefetch)

    def _places(self, step: int, seen: int) -> Iterator[tuple[int, int]]:
        """Yields (step, samples seen before it)."""
        for later in range(step, self.config.steps):
            yield later, seen
            seen += self.batch_sizes[self.levels.draw(self.config.seed, later)]

    def read(self, place: tuple[int, int]) -> StepBatch:
        """Reads the batch of one step, given with the number of samples seen before it.

        Raises:
            ElitError: the data cannot be read; it names the step.
        """
        config, (step, seen) = self.config, place
        level = self.levels.draw(config.seed, step)
        count = self.batch_sizes[level]
        own = share(count, self.process, self.processes)
        indices = sample_indices(config.seed, seen, count, len(self.data))[own]
        draws, times = draw(self.flow, config.label_dropout, derive_seed(config.seed, "step", step), count, own)
        levels = self._levels(times, step)
        parts = micro_batches(levels[own], config.micro_batch_size)
        if config.parallel == "fsdp" and self.processes > 1:
            parts = pad_micro_batches(parts, levels, config.micro_batch_size, self.processes)
        try:
            raw = read(self.data, indices, derive_seed(config.seed, "data", step))
            pixels = None if self.features is None else self.features.read(indices, raw)
        except ElitError as error:
            raise ElitError(f"{error} (in the batch of step {step + 1})") from error
        batch = StepBatch(step, levels, raw, pixels, draws, parts)
        if self.device.type != "cuda":
            return batch
        with torch.cuda.device(self.device):  # of this thread, which would take the first GPU
            return map_tensors(lambda tensor: tensor if tensor.is_cuda else tensor.pin_memory(), batch)

    def _levels(self, t: Tensor, step: int) -> list[int]:
        """Returns J~ of every sample: drawn for the step, or by the sample's own noise level."""
        by_noise = self.config.elit.by_noise
        if by_noise is None:
            return self.levels.draw_for(len(t), self.config.seed, step, self.config.elit.levels_per_step)
        return [self.model.level(by_noise(noise)) for noise in self.flow.noise_level(t).tolist()]


def prefetch(read: Callable[[Place], Item], places: Iterable[Place], ahead: int) -> Iterator[Future[Item]]:
    """Yields a future of ``read(place)`` for each place in order, which a thread does up to ``ahead`` places early.

    An error of ``read`` is raised by the future of its own place. The thread ends with the iterator: after the last
    place, or when it is closed.
    """
    thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
    waiting: deque[Future[Item]] = deque()
    try:
        for place in places:
            waiting.append(thread.submit(read, place))
            if len(waiting) > ahead:
                yield waiting.popleft()
        yield from waiting
    finally:
        thread.shutdown(cancel_futures=True)
