"""How fast is training, and what does the interface cost or save? A plain transformer beside its ELIT, step by step.

    python benchmarks/train_throughput.py                          # DiT-S/2, 256px, batch 4, on this machine
    python benchmarks/train_throughput.py --model DiT-XL/2 --batch_size 256 --precision bf16 --compile true --steps 50

The trainer itself runs, on random latents: data loading is not part of it. A step is forward, backward, clipping,
AdamW and the moving average. Its FLOPs are 3 forwards, with two for a multiply-add. MFU is FLOP/s over the device's
bf16 peak (elit.training.speed.PEAK), shown where that is known. Each run has a process of its own, so that its peak of
memory is its own: that of the GPU, or on a processor by how much the resident memory of the process grew since its
libraries were loaded. Multi-budget is 1/16 of the latents to all, uniformly.
"""

import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Literal, NamedTuple

import torch
from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table

from elit.analysis import count_flops
from elit.analysis.environment import environment
from elit.data import ImageData
from elit.training import ElasticConfig, ModelChoice, TrainConfig, Trainer

WARMUP = 3


class Measured(NamedTuple):
    """Means over the timed steps: seconds, FLOPs, utilisation; and the peak of memory in GB."""

    seconds: float
    flops: float
    mfu: float | None
    peak_memory: float


def benchmark(
    model: str = "DiT-S/2",
    resolution: int = 256,
    batch_size: int = 4,
    steps: int = 8,
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto",
    compile: bool = False,
    checkpoint_activations: bool = False,
    micro_batch_size: int | None = None,
) -> None:
    """Print the table.

    Args:
        model: a named model without ELIT.
        resolution: pixels of a side.
        batch_size: images in a step.
        steps: timed steps of each run, after a warm-up.
        precision: as in training.
        compile: as in training.
        checkpoint_activations: as in training.
        micro_batch_size: as in training.
    """
    window = resolution // 64
    runs: dict[str, tuple[str, ElasticConfig]] = {
        model: (model, ElasticConfig()),
        f"ELIT-{model}, full budget": (f"ELIT-{model}", ElasticConfig(window, 0.0, 0.0)),
        f"ELIT-{model}, multi-budget": (f"ELIT-{model}", ElasticConfig(window, 0.0, 0.9375)),
        f"ELIT-{model}, 1/4 alone": (f"ELIT-{model}", ElasticConfig(window, 0.75, 0.75)),
    }
    table = Table("run", "TFLOPs/step", "steps/s", "images/s", "TFLOP/s", "MFU", "peak memory (GB)")
    for title, (name, elit) in runs.items():
        config = TrainConfig(
            model=ModelChoice(name),
            elit=elit,
            steps=WARMUP + steps,
            batch_size=batch_size,
            micro_batch_size=micro_batch_size,
            precision=precision,
            compile=compile,
            checkpoint_activations=checkpoint_activations,
            checkpoint_every=1_000_000,
        )
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as own_process:
            seen = own_process.submit(measure, config, resolution).result()
        table.add_row(
            *(title, f"{seen.flops / 1e12:.3f}", f"{1 / seen.seconds:.3f}", f"{batch_size / seen.seconds:.2f}"),
            *(f"{seen.flops / seen.seconds / 1e12:.3f}", "unknown" if seen.mfu is None else f"{seen.mfu:.1%}"),
            f"{seen.peak_memory:.2f}",
        )
    console = Console(width=120)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    options = f"{resolution}px, batch {batch_size}, {precision}, compile {compile}, {steps} steps"
    console.print(f"{options}, {device}, {environment()}", soft_wrap=True)
    console.print(table)


def measure(config: TrainConfig, resolution: int) -> Measured:
    """Runs a trainer on random latents for as many steps as it is configured for."""
    before = peak_resident()
    side = resolution // 8
    draws = torch.Generator().manual_seed(0)
    data = ImageData(
        torch.randn(512, 4, side, side, generator=draws), torch.randint(1000, (512,), generator=draws), 1000
    )
    seconds, flops = [], []
    with tempfile.TemporaryDirectory() as out:
        config.out = out
        trainer = Trainer(config, data)
        cuda = trainer.model.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        since = time.perf_counter()
        for report in trainer:
            if cuda:
                torch.cuda.synchronize()
            now = time.perf_counter()
            if WARMUP < report.step < config.steps:  # the last step also writes the checkpoint
                seconds.append(now - since)
                forward = count_flops(trainer.model.config, int(report.num_latents)).total
                flops.append(3 * forward * report.batch_size)
            since = time.perf_counter()
        # Means, for the levels of steps differ: medians of time and FLOPs would belong to different steps.
        mean_seconds, mean_flops = statistics.mean(seconds), statistics.mean(flops)
        peak = trainer.speedometer.peak
    mfu = None if peak is None else mean_flops / mean_seconds / peak
    memory = torch.cuda.max_memory_allocated() if cuda else peak_resident() - before
    return Measured(mean_seconds, mean_flops, mfu, memory / 1e9)


def peak_resident() -> int:
    """The most resident memory that this process had so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    auto_cli(benchmark)
