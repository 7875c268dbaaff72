"""Latency and memory: what is timed, in which order, and what is made of it."""

from collections.abc import Callable

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from elit.analysis import count_flops, example_inputs, measure_costs, measure_latency, measure_peak_memory
from elit.analysis import measure as measuring
from elit.models import Model
from tests.helpers.models import tiny


class Clock:
    """A clock that stands still, but for what runs."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def runs(self, name: str, seconds: list[float], log: list[str]) -> Callable[[], None]:
        """Returns what takes so many seconds, each time it is called, and writes itself down."""
        left = iter(seconds)

        def run() -> None:
            log.append(name)
            self.now += next(left)

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(measuring, "time", clock)
    return clock


@pytest.mark.parametrize("level", [1, 4])
def test_peak_memory_against_the_profiler(level: int) -> None:
    model = tiny(width=64)
    measured = measure_peak_memory(model, level, batch_size=8)
    x, t, y = example_inputs(model, 8)
    with torch.inference_mode():
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            model(x, t, y, num_latents=level)
        events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    assert measured == pytest.approx(peak, rel=0.02)  # scratch space inside an operation is the profiler's alone


def test_timed_in_turns_after_a_warm_up(clock: Clock) -> None:
    log: list[str] = []
    runs = [clock.runs("a", [99, 5, 1, 3, 2, 4], log), clock.runs("b", [50, 9, 9, 9, 9, 19], log)]
    a, b = measuring.time_interleaved(runs, torch.device("cpu"), repeats=5, warmup=1)
    assert log == ["a", "b"] * 6
    assert (a.low, a.median, a.high) == (2, 3, 4)
    assert (b.low, b.median, b.high) == (9, 9, 9)


def test_every_level_is_what_is_timed(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    """The clock moves by a second for each latent that a forward is asked for."""
    model, seen = tiny(), []

    def forward(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor, num_latents: int) -> None:
        seen.append(len(x))
        clock.now += num_latents

    monkeypatch.setattr(model, "forward", forward)
    latencies = measure_latency(model, [1, 3, 4], batch_size=2, repeats=2, warmup=1)
    assert [latency.median for latency in latencies] == [1, 3, 4]
    assert seen == [2] * 9


def test_costs_stand_beside_the_highest_level(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    """The lowest level takes 3 s and the highest 4 s, on a model whose FLOPs are known."""
    model: Model = tiny()
    counted = [count_flops(model.config, level).total for level in (1, 4)]
    forward = model.forward

    def timed(*arguments: torch.Tensor, num_latents: int) -> torch.Tensor:
        clock.now += {1: 3.0, 4: 4.0}[num_latents]
        return forward(*arguments, num_latents=num_latents)

    monkeypatch.setattr(model, "forward", timed)
    low, full = measure_costs(model, [1, 4], batch_size=4, repeats=3)
    assert (low.budget, low.num_latents, full.budget, full.num_latents) == (0.25, 1, 1.0, 4)
    assert [low.flops, full.flops] == [2 * low.macs, 2 * full.macs] == counted
    assert (low.latency_ms, low.latency_ms_quartiles, full.latency_ms) == (3000, (3000, 3000), 4000)
    assert low.latency_ratio == 0.75
    assert low.elastic_efficiency == pytest.approx(0.75 * counted[1] / counted[0]) and full.elastic_efficiency == 1
    assert 0 < low.peak_memory < full.peak_memory


def test_a_plain_model_has_one_cost() -> None:
    (cost,) = measure_costs(tiny(interface=None), [0], batch_size=1, repeats=2)
    assert (cost.budget, cost.num_latents, cost.elastic_efficiency) == (1.0, 0, 1.0)
