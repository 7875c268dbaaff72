"""What a forward costs: FLOPs and MACs (counted, on the ``meta`` device), parameters, latency, memory."""

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
from torch.utils.flop_counter import FlopCounterMode

from elit.analysis.formula import closed_form
from elit.flow import Guidance, time_grid, weak_level
from elit.interface import Budget, budget_schedule
from elit.models import Model
from elit.models.registry import model_class_of


@dataclass(frozen=True)
class Cost:
    """Of one forward of one sample. One multiply-add is one MAC and two FLOPs."""

    budget: float | None
    num_latents: int
    flops: int

    @property
    def macs(self) -> int:
        return self.flops // 2


@dataclass(frozen=True)
class Latency:
    """Of one forward of a batch, in seconds: the median, and the quartiles around it."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class BudgetCost:
    """A budget beside full budget: one forward, FLOPs and MACs of a sample, time and memory of a batch.

    Attributes:
        latency_ms: median, and ``latency_ms_quartiles`` around it.
        peak_memory: bytes, see :func:`measure_peak_memory`.
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


def on_meta(config: object) -> Model:
    """A model without memory: shapes only."""
    with torch.device("meta"):
        return model_class_of(config)(config).requires_grad_(False)


def count_parameters(model: Model) -> int:
    """All parameters, a frozen position table included."""
    return sum(p.numel() for p in model.parameters())


def count_flops(model: Model, budget: float | None = None) -> Cost:
    """Of one sample: matrix products and attention, as PyTorch's counter sees them; no norms, no activations."""
    meta = model if model.device.type == "meta" else on_meta(model.config)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        meta(*meta.example(1), meta.example_condition(1), budget=budget)
    return Cost(budget, meta.level(budget), counter.get_total_flops())


@torch.inference_mode()
def measure_latency(
    model: Model, budgets: list[float | None], batch_size: int, repeats: int = 20, warmup: int = 3
) -> list[Latency]:
    """Times a forward at several budgets, in turns."""
    x, t = model.example(batch_size)
    y = model.example_condition(batch_size)
    return time_in_turns([partial(model, x, t, y, budget=budget) for budget in budgets], model.device, repeats, warmup)


def time_in_turns(
    runs: Sequence[Callable[[], object]], device: torch.device, repeats: int, warmup: int
) -> list[Latency]:
    """Times several things, one after the other and again, so that a busy moment of the machine meets all of them."""
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
def measure_peak_memory(model: Model, budget: float | None, batch_size: int) -> int:
    """Most bytes of tensors that a forward has at one time, beside the weights and its input.

    On a GPU the allocator counts; elsewhere every operation is watched, which sees no scratch space inside of one.
    """
    x, t = model.example(batch_size)
    y = model.example_condition(batch_size)
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)
        before = torch.cuda.memory_allocated(model.device)
        model(x, t, y, budget=budget)
        return torch.cuda.max_memory_allocated(model.device) - before
    with _Allocations((*model.parameters(), *model.buffers(), *tree_leaves((x, t, y)))) as allocations:
        model(x, t, y, budget=budget)
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


def measure_costs(model: Model, budgets: Sequence[float], batch_size: int, repeats: int = 20) -> list[BudgetCost]:
    """Every budget beside the last one, which is to be the full one."""
    latencies = measure_latency(model, list(budgets), batch_size, repeats)
    meta = on_meta(model.config)
    flops = [count_flops(meta, budget) for budget in budgets]
    costs = []
    for budget, cost, latency in zip(budgets, flops, latencies, strict=True):
        of_flops, of_latency = cost.flops / flops[-1].flops, latency.median / latencies[-1].median
        costs.append(
            BudgetCost(
                budget=budget,
                num_latents=cost.num_latents,
                flops=cost.flops,
                macs=cost.macs,
                batch_size=batch_size,
                latency_ms=latency.median * 1e3,
                latency_ms_quartiles=(latency.low * 1e3, latency.high * 1e3),
                peak_memory=measure_peak_memory(model, budget, batch_size),
                flops_ratio=of_flops,
                latency_ratio=of_latency,
                elastic_efficiency=of_latency / of_flops,
            )
        )
    return costs


def sampling_flops(model: Model, steps: int, budget: Budget | None = None, guidance: Guidance | None = None) -> int:
    """FLOPs of one sample by ``euler``, in closed form: all steps, with the weak term of guidance wherever it is on.

    Raises:
        ElitError: settings that :func:`elit.sample` refuses too.
    """
    times = time_grid("euler", steps)[:-1]
    strong = [model.level(each) for each in budget_schedule(budget, times.tolist())]
    macs = sum(_macs(model, level) for level in strong)
    if guidance is None:
        return 2 * macs
    weak, shares_encode = weak_level(model, guidance), not guidance.drops_condition
    for level, on in zip(strong, guidance.active(times).tolist(), strict=True):
        if on:
            macs += _macs(model, level if weak is None else weak, beside=level if shares_encode else None)
    return 2 * macs


SHARED = ("embed", "head", "Read")  # by the terms of autoguidance: Read runs once, at the higher of their levels


def _macs(model: Model, level: int, beside: int | None = None) -> int:
    """Counts the MACs of a term at a level; of one that shares what it can with another term, what it adds to that."""
    parts = {part.name: part.macs for part in closed_form(model.config, level)}
    if beside is None:
        return sum(parts.values())
    of_other = {part.name: part.macs for part in closed_form(model.config, beside)}
    more_reading = max(0, parts["Read"] - of_other["Read"])
    return more_reading + sum(macs for name, macs in parts.items() if name not in SHARED)


def synchronize(device: torch.device) -> None:
    """Waits until a device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
