import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import elit
from elit import Guidance
from elit.analysis import count_flops, measure_costs, measure_peak_memory, sampling_flops
from elit.interface import BudgetByNoise
from tests.helpers.models import tiny


@pytest.mark.parametrize("budget", [0.25, None])
def test_peak_memory_against_the_profiler(budget: float | None) -> None:
    model = tiny(width=64)
    measured = measure_peak_memory(model, budget, batch_size=8)
    x, t = model.example(8)
    y = model.example_condition(8)
    with torch.inference_mode():
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            model(x, t, y, budget=budget)
        events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    assert measured == pytest.approx(peak, rel=0.02)  # scratch space inside an operation is the profiler's alone


def test_costs_stand_beside_full_budget() -> None:
    low, full = measure_costs(tiny(), [0.25, 1.0], batch_size=4, repeats=4)
    assert (low.num_latents, full.num_latents) == (1, 4)
    assert low.flops == 2 * low.macs == count_flops(tiny(), 0.25).flops
    assert low.flops_ratio == low.flops / full.flops < 1
    assert low.latency_ratio == pytest.approx(low.latency_ms / full.latency_ms)
    assert low.elastic_efficiency == pytest.approx(low.latency_ratio / low.flops_ratio)
    assert full.flops_ratio == full.latency_ratio == full.elastic_efficiency == 1
    assert low.latency_ms_quartiles[0] <= low.latency_ms <= low.latency_ms_quartiles[1]
    assert 0 < low.peak_memory < full.peak_memory


@pytest.mark.parametrize(
    ("budget", "guidance"),
    [
        (None, None),
        (0.5, Guidance("cfg", 2)),
        (BudgetByNoise([0.5], [0.25, 1.0]), Guidance("cfg", 2)),
        ([0.25, 0.5, 0.75, 1.0], Guidance("ccfg", 2, interval=(0.3, 0.8))),
        (0.75, Guidance("ag", 2, 0.5)),
        (0.75, Guidance("ag", 1)),
    ],
)
def test_sampling_flops_are_those_of_sampling(budget: elit.interface.Budget | None, guidance: Guidance | None) -> None:
    model = tiny().requires_grad_(False)  # the counter cannot look at gradients in inference mode
    with FlopCounterMode(display=False) as counter:
        elit.sample(model, [3], steps=4, budget=budget, guidance=guidance)
    assert sampling_flops(model, 4, budget, guidance) == counter.get_total_flops()
