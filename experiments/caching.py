"""Does skipping the core at some steps beat fewer steps, or fewer latents, at the same cost?

    elit train --config configs/train/digits.yaml --out runs/digits
    python experiments/caching.py

On a small model of digits, with and without guidance. All samples of a seed start from the same noise. The distance is
that to many steps at full budget; FLOPs do not depend on how busy the machine is, and milliseconds are the median of
several rounds in which the settings take turns.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table

import elit
from common import interval
from elit.analysis import sampling_flops
from elit.analysis.calibration import REFERENCE_STEPS
from elit.analysis.environment import environment
from elit.analysis.measure import time_interleaved
from elit.analysis.plan import measure_error
from elit.atomic import write_json
from elit.data import digits
from elit.evaluation import Judge, train_classifier

ERROR_SAMPLES = 64  # on which the distance to many steps at full budget is measured
TIMED_BATCH = 32
FORMATS = {"distance": "{:.4f} ± {:.4f}", "Frechet": "{:.1f} ± {:.1f}", "accuracy": "{:.1%} ± {:.1%}"}
GUIDANCE = {"none": None, "cfg": elit.Guidance("cfg", 2.0)}


@dataclass(frozen=True)
class Way:
    """One way to spend less than all steps at full budget."""

    name: str
    arguments: dict[str, Any]


def ways(steps: int) -> list[Way]:
    """Lists what is compared: caches at so many steps, fewer steps, and fewer latents."""
    caches = [
        Way(f"cache {threshold:g}, order {order}", {"steps": steps, "cache": elit.Cache(threshold, order)})
        for threshold in (0.1, 0.2, 0.4)
        for order in (0, 1)
    ]
    fewer_steps = [
        Way(f"{n} steps", {"steps": n}) for n in (steps * 3 // 4, steps * 5 // 8, steps // 2, steps * 3 // 8)
    ]
    fewer_latents = [Way(f"budget {b:.3g}", {"steps": steps, "budget": b}) for b in (3 / 4, 1 / 2, 1 / 4, 1 / 8)]
    return [Way(f"{steps} steps, all of it", {"steps": steps}), *caches, *fewer_steps, *fewer_latents]


def measure(model: Any, judge: Judge, settings: list[dict[str, Any]], seed: int, count: int) -> list[dict[str, float]]:
    """Measures samples of each setting from one noise: quality, and the distance of the first to the reference."""
    labels = torch.arange(count) % 10
    seeds = range((seed + 1) * 10**6, (seed + 1) * 10**6 + count)
    guidance = settings[0]["guidance"]
    first = slice(ERROR_SAMPLES)
    reference = elit.sample(model, labels[first], seeds=seeds[first], steps=REFERENCE_STEPS, guidance=guidance)
    found = []
    for arguments in settings:
        samples = elit.sample(model, labels, seeds=seeds, batch_size=250, **arguments)
        quality = judge(samples, labels)
        error = measure_error(samples[first], reference)
        found.append({"distance": error, "Frechet": quality.frechet_distance, "accuracy": quality.accuracy})
    return found


def run(
    model: str = "runs/digits",
    out: Path = Path("runs/experiments/caching.json"),
    steps: int = 16,
    seeds: int = 3,
    num_samples: int = 1000,
    rounds: int = 9,
    quality: bool = True,
    guidance: Literal["none", "cfg", "none,cfg"] = "none,cfg",
) -> None:
    """Print a table with and without guidance, and write all numbers.

    Args:
        model: the model to sample from.
        out: the file of all numbers.
        steps: of everything that is not fewer steps.
        seeds: how many noises to average over.
        num_samples: samples of each way and seed.
        rounds: how often each way is timed.
        quality: false only measures times, for which the machine should be idle.
        guidance: without guidance, with cfg at scale 2, or both.
    """
    net, train = elit.load(model), digits()
    judge = Judge(train_classifier(train), train)
    console, results = Console(width=130), []
    for kind in guidance.split(","):
        compared = ways(steps)
        settings = [{**way.arguments, "guidance": GUIDANCE[kind]} for way in compared]
        by_seed = [measure(net, judge, settings, seed, num_samples) for seed in range(seeds if quality else 0)]
        labels = torch.arange(TIMED_BATCH) % 10
        calls = [partial(elit.sample, net, labels, batch_size=TIMED_BATCH, **arguments) for arguments in settings]
        seconds = time_interleaved(calls, net.device, rounds, warmup=1)
        rows: list[dict[str, Any]] = [
            {
                "guidance": kind,
                "name": way.name,
                "flops": sampling_flops(net, **arguments),
                "ms": timed.median * 1e3 / TIMED_BATCH,
                "by_seed": [found[i] for found in by_seed],
            }
            for i, (way, arguments, timed) in enumerate(zip(compared, settings, seconds, strict=True))
        ]
        rows.sort(key=lambda row: -row["flops"])
        console.print(as_table(f"guidance: {kind}", rows))
        results += rows
        write_json(out, {"results": results, "environment": environment()})
    console.print(f"all numbers: {out}")


def as_table(title: str, rows: list[dict[str, Any]]) -> Table:
    """Shows means and 95 % intervals over seeds, by falling cost."""
    table = Table(title=title, title_justify="left")
    table.add_column("way")
    for heading in ("GFLOPs", "ms an image", *FORMATS):
        table.add_column(heading, justify="right")
    for row in rows:
        values = {key: [found[key] for found in row["by_seed"]] for key in FORMATS if row["by_seed"]}
        scores = [FORMATS[key].format(*interval(of_key)) for key, of_key in values.items()]
        table.add_row(row["name"], f"{row['flops'] / 1e9:.3f}", f"{row['ms']:.2f}", *scores)
    return table


if __name__ == "__main__":
    auto_cli(run)
