"""What a forward costs: FLOPs and MACs (counted, on the ``meta`` device), parameters, latency."""

import statistics
import time
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

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
    """Times a forward at several budgets, in turns, so that a busy moment of the machine meets all of them."""
    device = model.device
    x, t = model.example(batch_size)
    y = model.example_condition(batch_size)

    def run(budget: float | None) -> float:
        _synchronize(device)
        start = time.perf_counter()
        model(x, t, y, budget=budget)
        _synchronize(device)
        return time.perf_counter() - start

    seconds: list[list[float]] = [[] for _ in budgets]
    for turn in range(warmup + repeats):
        for i, budget in enumerate(budgets):
            elapsed = run(budget)
            if turn >= warmup:
                seconds[i].append(elapsed)
    quartiles = [statistics.quantiles(s, n=4, method="inclusive") for s in seconds]
    return [Latency(median, low, high) for low, median, high in quartiles]


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
