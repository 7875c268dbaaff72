"""Measures what a forward costs on a device: latency and memory, beside its FLOPs."""

import statistics
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from elit.analysis.flops import count_flops, example_inputs
from elit.models import Model


@dataclass(frozen=True)
class Latency:
    """Seconds that something takes: the median, and the quartiles around it."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class BudgetCost:
    """What one forward at a budget costs, beside one at full budget: FLOPs of a sample, time and memory of a batch.

    Attributes:
        budget: fraction of the latents; 1 without an interface.
        num_latents: the level, J~.
        latency_ms: median, and ``latency_ms_quartiles`` around it.
        peak_memory: bytes, see :func:`measure_peak_memory`.
        flops_ratio, latency_ratio: relative to the highest level.
        elastic_efficiency: ``latency_ratio / flops_ratio``: 1 when time falls as FLOPs do, above 1 when it falls less.
    """

    budget: float
    num_latents: int
    flops: int
    macs: int
    batch_size: int
    latency_ms: float
    latency_ms_quartiles: tuple[float, float]
    peak_memory: int
    flops_ratio: float
    latency_ratio: float
    elastic_efficiency: float


@torch.inference_mode()
def measure_latency(
    model: Model, levels: Sequence[int], batch_size: int, repeats: int = 20, warmup: int = 3
) -> list[Latency]:
    """Times a forward of a batch at each of several levels J~."""
    x, t, y = example_inputs(model, batch_size)
    forwards = [partial(model, x, t, y, num_latents=level) for level in levels]
    return time_interleaved(forwards, model.device, repeats, warmup)


def time_interleaved(
    runs: Sequence[Callable[[], object]], device: torch.device, repeats: int, warmup: int
) -> list[Latency]:
    """Times several things in turns, one after the other and again, so that a busy moment of the machine meets them
    all.

    Args:
        repeats: timed turns.
        warmup: turns before them that do not count.
    """
    seconds: list[list[float]] = [[] for _ in runs]
    for turn in range(warmup + repeats):
        for run, times in zip(runs, seconds, strict=True):
            synchronize(device)
            start = time.perf_counter()
            run()
            synchronize(device)
            if turn >= warmup:
                times.append(time.perf_counter() - start)
    quartiles = [statistics.quantiles(s, n=4, method="inclusive") for s in seconds]
    return [Latency(median, low, high) for low, median, high in quartiles]


@torch.inference_mode()
def measure_peak_memory(model: Model, num_latents: int, batch_size: int) -> int:
    """Measures the most bytes of tensors that a forward has at one time, beside the weights and its input.

    On a GPU the allocator counts; elsewhere every operation is watched, which sees no scratch space inside of one.

    Args:
        num_latents: the level, J~.
    """
    x, t, y = example_inputs(model, batch_size)
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)
        before = torch.cuda.memory_allocated(model.device)
        model(x, t, y, num_latents=num_latents)
        return torch.cuda.max_memory_allocated(model.device) - before
    with _Allocations((*model.parameters(), *model.buffers(), *tree_leaves((x, t, y)))) as allocations:
        model(x, t, y, num_latents=num_latents)
    return allocations.peak


class _Allocations(TorchDispatchMode):
    """Bytes of the storages that operations make, while they live."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.alive = self.peak = 0

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()).data_ptr() not in self.known:
                self.known.add(storage.data_ptr())
                self.alive += storage.nbytes()
                self.peak = max(self.peak, self.alive)
                weakref.finalize(storage, self._free, storage.data_ptr(), storage.nbytes())
        return out

    def _free(self, address: int, size: int) -> None:
        self.known.discard(address)
        self.alive -= size


def measure_costs(model: Model, levels: Sequence[int], batch_size: int, repeats: int = 20) -> list[BudgetCost]:
    """Measures a forward at several levels J~ beside the highest of them.

    Args:
        levels: ascending; ``[0]`` for a plain transformer.
    """
    latencies = measure_latency(model, levels, batch_size, repeats)
    flops = [count_flops(model.config, level) for level in levels]
    costs = []
    for level, counted, latency in zip(levels, flops, latencies, strict=True):
        flops_ratio, latency_ratio = counted.total / flops[-1].total, latency.median / latencies[-1].median
        costs.append(
            BudgetCost(
                budget=level / model.num_latents if level else 1.0,
                num_latents=level,
                flops=counted.total,
                macs=counted.macs,
                batch_size=batch_size,
                latency_ms=latency.median * 1e3,
                latency_ms_quartiles=(latency.low * 1e3, latency.high * 1e3),
                peak_memory=measure_peak_memory(model, level, batch_size),
                flops_ratio=flops_ratio,
                latency_ratio=latency_ratio,
                elastic_efficiency=latency_ratio / flops_ratio,
            )
        )
    return costs


def synchronize(device: torch.device) -> None:
    """Waits until a device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
