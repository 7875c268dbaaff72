"""Does time fall with FLOPs? Latency of a forward at every budget over that at full budget, beside the FLOPs ratio.

    python benchmarks/elastic_efficiency.py                      # ELIT-SiT-S/2, 256px, batch 8, on this machine
    python benchmarks/elastic_efficiency.py --model ELIT-DiT-XL/2 --device cuda --dtype bfloat16

Elastic efficiency is (latency ratio) / (FLOPs ratio): 1 when time falls as FLOPs do, above 1 when it falls less.
All budgets are timed in turns in one run, after a warm-up; medians and quartiles are shown.
"""

from typing import Literal

import torch
from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table

import elit
from elit.analysis import measure_costs
from elit.analysis.environment import environment
from elit.analysis.plots import budget_label

BUDGETS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)


def benchmark(
    model: str = "ELIT-SiT-S/2",
    resolution: int = 256,
    batch_size: int = 8,
    repeats: int = 15,
    device: str = "cpu",
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> None:
    """Print the table.

    Args:
        model: a named model, with fresh weights.
        resolution: pixels of a side.
        batch_size: images in a forward.
        repeats: timed forwards of each budget.
        device: cpu or cuda.
        dtype: of weights and inputs.
    """
    torch.manual_seed(0)
    net = elit.create(model, resolution).to(device, getattr(torch, dtype)).eval()
    table = Table(
        "budget", "GFLOPs/image", "FLOPs ratio", "median (ms)", "quartiles (ms)", "latency ratio", "elastic efficiency"
    )
    for cost in measure_costs(net, [net.level(budget) for budget in BUDGETS], batch_size, repeats):
        table.add_row(
            *(budget_label(cost.budget), f"{cost.flops / 1e9:.2f}", f"{cost.flops_ratio:.3f}"),
            *(f"{cost.latency_ms:.1f}", "{:.1f} to {:.1f}".format(*cost.latency_ms_quartiles)),
            *(f"{cost.latency_ratio:.3f}", f"{cost.elastic_efficiency:.3f}"),
        )
    console = Console(width=120)
    name = torch.cuda.get_device_name() if device.startswith("cuda") else "CPU"
    console.print(f"{model}, {resolution}px, batch {batch_size}, {dtype}, {name}, {environment()}", soft_wrap=True)
    console.print(table)


if __name__ == "__main__":
    auto_cli(benchmark)
