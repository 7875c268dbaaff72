"""What a batch costs on this machine: a table of seconds by level and batch size, and what follows from it."""

import time
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from elit.analysis.calibration import Calibration, choose_levels
from elit.analysis.flops import example_condition
from elit.analysis.measure import synchronize
from elit.flow import advance, trajectories
from elit.models import Model

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)
MEASURED_LEVELS = 5  # of more, the others are interpolated
ROUNDS = 5
ENOUGH_THROUGHPUT = 0.9  # of the best: where a larger batch is no longer worth the latency it adds
ENOUGH_GAIN = 1.03  # of throughput by a batch of twice the size; twice below, larger ones are not measured
LONG_STEP = 1.0  # seconds; nor are they after one that takes so long


@dataclass(frozen=True)
class CostTable:
    """Holds the seconds of a forward at some levels and batch sizes, and interpolates between them.

    Attributes:
        levels: J~, ascending; (0,) for a model without an interface.
        batch_sizes: ascending.
        seconds: (levels, batch sizes).
        mixing: seconds that every further level adds to a batch.
    """

    levels: tuple[int, ...]
    batch_sizes: tuple[int, ...]
    seconds: tuple[tuple[float, ...], ...]
    mixing: float = 0.0

    @classmethod
    def unmeasured(cls, levels: Sequence[int]) -> "CostTable":
        """Stands in until something is measured: every level costs the same, and next to nothing."""
        return cls(tuple(levels), (1,), ((1e-9,),) * len(levels))

    @classmethod
    def from_calibration(cls, calibration: Calibration) -> "CostTable":
        """Takes the times of a planner's calibration, which are those of one batch size.

        Smaller batches are taken to cost as much.
        """
        seconds = tuple((value,) for value in calibration.seconds)
        return cls(tuple(calibration.levels), (calibration.stamp["batch_size"],), seconds)

    def forward(self, rows: Mapping[int, float]) -> float:
        """Predicts the seconds of one forward of so many rows at each level; shares of rows may be given."""
        rows = {level: count for level, count in rows.items() if count > 0}
        total = sum(rows.values())
        if not total:
            return 0.0
        mean = sum(count * self._at(level, total) for level, count in rows.items()) / total
        return mean + self.mixing * (len(rows) - 1)

    def work(self, level: int) -> float:
        """Returns the work of one row, in units of a row at the highest level."""
        size = self.batch_sizes[-1]
        return self._at(level, size) / self._at(self.levels[-1], size)

    def saturating_work(self) -> float:
        """Returns the work of the smallest measured batch at the highest level that has nearly the best throughput."""
        throughput = [size / seconds for size, seconds in zip(self.batch_sizes, self.seconds[-1], strict=True)]
        return next(
            float(size)
            for size, found in zip(self.batch_sizes, throughput, strict=True)
            if found >= ENOUGH_THROUGHPUT * max(throughput)
        )

    def _at(self, level: int, size: float) -> float:
        """Interpolates the seconds of a batch at one level, linearly in the size and in the level."""
        if level in self.levels:
            return self._of_size(self.levels.index(level), size)
        above = min(max(bisect_right(self.levels, level), 1), len(self.levels) - 1)
        low, high = self.levels[above - 1 : above + 1]
        share = (level - low) / (high - low)
        return (1 - share) * self._of_size(above - 1, size) + share * self._of_size(above, size)

    def _of_size(self, row: int, size: float) -> float:
        sizes, seconds = self.batch_sizes, self.seconds[row]
        if size <= sizes[0]:
            return seconds[0]
        if size >= sizes[-1]:
            return seconds[-1] * size / sizes[-1]
        at = bisect_right(sizes, size)
        share = (size - sizes[at - 1]) / (sizes[at] - sizes[at - 1])
        return (1 - share) * seconds[at - 1] + share * seconds[at]


def measure_costs(
    model: Model,
    path: str = "linear",
    most_rows: float | None = None,
) -> CostTable:
    """Measures a model on its device: steps of trajectories, as an engine takes them, at some levels and batch sizes.

    Batch sizes double until they no longer gain throughput at the highest level, take long or do not fit into memory.

    Args:
        most_rows: the most rows in a batch that are of interest; None is 64.
    """
    clock = processor_seconds if model.device.type == "cpu" else time.perf_counter
    levels = choose_levels(model.levels, MEASURED_LEVELS) or (0,)
    sizes: list[int] = []
    columns: list[list[float]] = []
    gainless = 0
    for size in BATCH_SIZES:
        if sizes and most_rows is not None and size >= 2 * most_rows:
            break
        try:
            columns.append(_time_steps(model, path, [[level] * size for level in levels], clock))
        except (RuntimeError, MemoryError) as error:
            if not sizes or not is_out_of_memory(error):
                raise
            break
        sizes.append(size)
        gained = len(sizes) < 2 or columns[-1][-1] < 2 * columns[-2][-1] / ENOUGH_GAIN
        gainless = 0 if gained else gainless + 1
        if gainless == 2 or columns[-1][-1] > LONG_STEP:
            break
    # A larger batch or a higher level cannot take less: where it seems to, the other was disturbed.
    rising = np.minimum.accumulate(np.minimum.accumulate(np.array(columns).T[::-1, ::-1], 0), 1)[::-1, ::-1]
    table = CostTable(levels, tuple(sizes), tuple(map(tuple, rising.tolist())))
    if len(levels) == 1 or sizes[-1] == 1:
        return table
    half = sizes[-1] // 2
    (mixed,) = _time_steps(model, path, [[levels[0]] * half + [levels[-1]] * half], clock)
    mixing = max(0.0, mixed - table.forward({levels[0]: half, levels[-1]: half}))
    return replace(table, mixing=mixing)


def _time_steps(model: Model, path: str, batches: Sequence[Sequence[int]], clock: Callable[[], float]) -> list[float]:
    """Times one step of each of several batches, which the levels of their rows describe: the least of rounds in turns.

    How much longer steps take at present, on a machine that does other work too, the scheduler watches itself.
    """
    stamps: list[list[float]] = [[] for _ in batches]
    size = len(batches[0])
    y = example_condition(model, size)
    flight = trajectories(model, y, seeds=range(size), steps=len(batches) * (ROUNDS + 1), path=path)
    for turn in range(ROUNDS + 1):
        for levels, seconds in zip(batches, stamps, strict=True):
            for trajectory, level in zip(flight, levels, strict=True):
                if level:
                    trajectory.set_level(level)
            synchronize(model.device)
            start = clock()
            advance(model, flight)
            torch.cat([trajectory.x for trajectory in flight]).isfinite().all().item()
            seconds += [clock() - start] * (turn > 0)  # the first warms up
    return [min(seconds) for seconds in stamps]


def processor_seconds() -> float:
    """Tells the processor time of each of PyTorch's threads: what they take while nothing else wants the processor."""
    return time.process_time() / torch.get_num_threads()


def is_out_of_memory(error: Exception) -> bool:
    """Tells whether there was not enough memory, on a GPU or elsewhere."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)
