"""How fast are forwards, sampling and training on a GPU, and does time fall as FLOPs do?

    python benchmarks/gpu.py                               # all parts: under nine minutes on one GPU
    python benchmarks/gpu.py --parts forward,mixed         # some of them
    python benchmarks/gpu.py --device cpu --out runs/small # the same with small models on a CPU

Every measurement is written to a JSON file as soon as it is made, and what the file holds is not measured again: a run
that was stopped, or that came to its limit of minutes, is continued by the same command. The tables stand beside it as
Markdown, for docs/results/gpu.md.

One multiply-add is two FLOPs. MFU is FLOP/s over the device's bf16 peak (elit.training.speed.PEAK). Elastic efficiency
is (latency ratio to full budget) / (FLOPs ratio): 1 when time falls as FLOPs do, above 1 when it falls less. Times are
medians, all budgets of a row taking turns. Weights are random and bf16; on a CPU float32.

- forward: latency of one forward, eager, with compiled layers, and with these captured in CUDA graphs;
- sampling: `elit.sample` with 40 Euler steps, alone and with ccfg;
- mixed: a batch of several budgets over the sum of its parts;
- parts: the share of encode, Read, core, Write and tail in the time of a forward, and within them of the projections of
  the condition in all blocks, which sampling could do in one product for all steps;
- gaps: the share of sampling time in which the GPU has nothing to do (by PyTorch's profiler);
- training: steps of the trainer in bf16 with compiled layers (benchmarks/train_throughput.py).
"""

import gc
import json
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jsonargparse import auto_cli
from rich.console import Console
from train_throughput import measure as measure_training

import elit
from elit.analysis import count_flops, sampling_flops
from elit.analysis.environment import environment
from elit.analysis.flops import example_inputs
from elit.analysis.measure import measure_peak_memory, synchronize, time_interleaved
from elit.atomic import atomic_file, write_json
from elit.models import Model
from elit.training import ElasticConfig, ModelChoice, TrainConfig
from elit.training.speed import peak_flops

BUDGETS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
MIXES = {  # eighths of a batch
    "even": {1 / 16: 2, 1 / 4: 2, 1 / 2: 2, 1.0: 2},
    "uneven": {1 / 16: 5, 1 / 4: 2, 1.0: 1},
}
Row = dict[str, Any]


@dataclass(frozen=True)
class Scale:
    """What is measured on a kind of device."""

    models: tuple[str, ...]
    resolutions: tuple[int, ...]
    batches: tuple[int, ...]
    ways: tuple[str, ...]
    dtype: torch.dtype
    repeats: int
    steps: int
    trained: str
    train_batch: int


SCALES = {
    "cuda": Scale(
        models=("ELIT-SiT-XL/2", "ELIT-SiT-B/2"),
        resolutions=(256, 512),
        batches=(1, 8, 64),
        ways=("eager", "compiled", "captured"),
        dtype=torch.bfloat16,
        repeats=15,
        steps=40,
        trained="DiT-XL/2",
        train_batch=256,
    ),
    "cpu": Scale(
        models=("ELIT-SiT-S/2",),
        resolutions=(256,),
        batches=(1, 8),
        ways=("eager", "compiled"),
        dtype=torch.float32,
        repeats=5,
        steps=4,
        trained="DiT-S/2",
        train_batch=4,
    ),
}


class Case(NamedTuple):
    """One measurement: what it is called in the file, and what makes its rows."""

    name: str
    measure: Callable[[], list[Row]]


class Bench:
    """Builds models and times them on a device."""

    def __init__(self, device: torch.device, scale: Scale) -> None:
        self.device, self.scale, self.peak = device, scale, peak_flops(device)

    def model(self, name: str, resolution: int, way: str) -> Model:
        """A model with random weights, prepared in one of the ways."""
        with torch.device(self.device):
            model = elit.create(name, resolution).to(self.scale.dtype).eval().requires_grad_(False)
        return model if way == "eager" else elit.compile(model, graphs=way == "captured")

    def seconds(self, runs: Sequence[Callable[[], object]]) -> list[float]:
        """Times things in turns: medians."""
        with torch.inference_mode():
            return [each.median for each in time_interleaved(runs, self.device, self.scale.repeats, warmup=3)]

    def mfu(self, flops: float, seconds: float) -> float | None:
        return None if self.peak is None else flops / seconds / self.peak

    # ---------------------------------------------------------------------------------------------- the parts

    def forward(self) -> Iterator[Case]:
        for name in self.scale.models:
            for resolution in self.scale.resolutions:
                for way in self.scale.ways:
                    yield Case(f"{name} {resolution}px {way}", partial(self._forward, name, resolution, way))

    def _forward(self, name: str, resolution: int, way: str) -> list[Row]:
        model, rows = self.model(name, resolution, way), list[Row]()
        flops = [count_flops(model.config, model.level(budget)).total for budget in BUDGETS]
        for batch in self.scale.batches:
            x, t, y = example_inputs(model, batch)
            seconds = self.seconds([partial(model, x, t, y, budget) for budget in BUDGETS])
            for budget, count, each in zip(BUDGETS, flops, seconds, strict=True):
                memory = measure_peak_memory(model, model.level(budget), batch) if way == "eager" else None
                rows.append(
                    {
                        "model": name,
                        "resolution": resolution,
                        "way": way,
                        "batch": batch,
                        "budget": budget,
                        "ms": 1e3 * each,
                        "MFU": self.mfu(batch * count, each),
                        "elastic efficiency": (each / seconds[-1]) / (count / flops[-1]),
                        "memory (MB)": memory and memory / 1e6,
                    }
                )
        return rows

    def sampling(self) -> Iterator[Case]:
        for way in (self.scale.ways[0], self.scale.ways[-1]):
            yield Case(way, partial(self._sampling, way))

    def _sampling(self, way: str) -> list[Row]:
        name, rows = self.scale.models[0], list[Row]()
        model = self.model(name, 256, way)
        for batch in (self.scale.batches[0], self.scale.batches[-1]):
            for kind in (None, "ccfg"):
                guidance = None if kind is None else elit.Guidance(kind, 4.0)
                told: list[dict[str, Any]] = [
                    {"steps": self.scale.steps, "budget": b, "guidance": guidance} for b in (1 / 4, 1.0)
                ]
                calls = [partial(elit.sample, model, list(range(batch)), batch_size=batch, **each) for each in told]
                seconds = [each.median for each in time_interleaved(calls, self.device, 3, warmup=1)]
                for settings, each in zip(told, seconds, strict=True):
                    rows.append(
                        {
                            "model": name,
                            "way": way,
                            "batch": batch,
                            "guidance": kind or "none",
                            "budget": settings["budget"],
                            "ms a batch": 1e3 * each,
                            "images/s": batch / each,
                            "MFU": self.mfu(batch * sampling_flops(model, **settings), each),
                        }
                    )
        return rows

    def mixed(self) -> Iterator[Case]:
        for way in self.scale.ways:
            yield Case(way, partial(self._mixed, way))

    def _mixed(self, way: str) -> list[Row]:
        name, rows = self.scale.models[0], list[Row]()
        model = self.model(name, 256, way)
        for batch in [batch for batch in self.scale.batches if batch >= 8]:
            y: Any
            x, t, y = example_inputs(model, batch)
            for mix, eighths in MIXES.items():
                budgets = [budget for budget, count in eighths.items() for _ in range(batch // 8 * count)]
                rows_of = {budget: batch // 8 * count for budget, count in eighths.items()}
                runs = [
                    partial(model, x, t, y, budgets),
                    *(partial(model, x[:n], t[:n], y[:n], budget) for budget, n in rows_of.items()),
                ]
                whole, *parts = self.seconds(runs)
                found = {"ms": 1e3 * whole, "mixed / parts": whole / sum(parts)}
                rows.append({"model": name, "way": way, "batch": batch, "mix": mix, **found})
        return rows

    def parts(self) -> Iterator[Case]:
        for way in [way for way in self.scale.ways if way != "captured"]:  # a graph is one piece
            yield Case(way, partial(self._parts, way))

    def _parts(self, way: str) -> list[Row]:
        name, rows = self.scale.models[0], list[Row]()
        model: Any = self.model(name, 256, way)
        for batch in self.scale.batches:
            x, t, y = example_inputs(model, batch)
            for budget in (BUDGETS[0], 1.0):
                level = model.level(budget)
                with torch.inference_mode():
                    encoded = model.encode(x, t, y)
                    latents = model.read(encoded, level)
                    core = model.core(encoded, level, latents=latents)
                encode, read, blocks, write, decode, conditioning = self.seconds(
                    [
                        partial(model.encode, x, t, y),
                        partial(model.read, encoded, level),
                        partial(model.core, encoded, level, latents=latents),
                        partial(model.interface.write, encoded.stream.tokens, core.latents),
                        partial(model.decode, encoded, core),
                        partial(modulate_all, model, encoded.condition),
                    ]
                )
                whole = encode + read + blocks + decode
                shares = {"encode": encode, "Read": read, "core": blocks, "Write": write, "tail": decode - write}
                shares["conditioning"] = conditioning  # of the blocks, which is part of the above
                rows.append(
                    {
                        "model": name,
                        "way": way,
                        "batch": batch,
                        "budget": budget,
                        "ms": 1e3 * whole,
                        **{part: each / whole for part, each in shares.items()},
                    }
                )
        return rows

    def gaps(self) -> Iterator[Case]:
        if self.device.type == "cuda":
            for way in self.scale.ways:
                yield Case(way, partial(self._gaps, way))

    def _gaps(self, way: str) -> list[Row]:
        from torch.profiler import ProfilerActivity, profile

        name, rows = self.scale.models[0], list[Row]()
        model = self.model(name, 256, way)
        for batch in self.scale.batches:
            run = partial(elit.sample, model, list(range(batch)), steps=10, batch_size=batch, budget=1 / 4)
            run()
            synchronize(self.device)
            start = time.perf_counter()
            run()
            synchronize(self.device)
            seconds = time.perf_counter() - start
            with profile(activities=[ProfilerActivity.CUDA]) as seen:
                run()
                synchronize(self.device)
            busy = sum(event.self_device_time_total for event in seen.key_averages()) / 1e6
            rows.append({"model": name, "way": way, "batch": batch, "ms": 1e3 * seconds, "idle": 1 - busy / seconds})
        return rows

    def training(self) -> Iterator[Case]:
        plain, window = self.scale.trained, 4
        runs = {
            plain: (plain, ElasticConfig()),
            f"ELIT-{plain}, full budget": (f"ELIT-{plain}", ElasticConfig(window, 0.0, 0.0)),
            f"ELIT-{plain}, multi-budget": (f"ELIT-{plain}", ElasticConfig(window, 0.0, 0.9375)),
        }
        for title, (name, elastic) in runs.items():
            yield Case(title, partial(self._training, title, name, elastic))

    def _training(self, title: str, name: str, elastic: ElasticConfig) -> list[Row]:
        config = TrainConfig(
            model=ModelChoice(name),
            elit=elastic,
            steps=15,
            batch_size=self.scale.train_batch,
            micro_batch_size=min(64, self.scale.train_batch),
            precision="bf16",
            compile=True,
            checkpoint_every=1_000_000,
        )
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as own_process:
            seen = own_process.submit(measure_training, config, 256).result()
        speed = config.batch_size / seen.seconds
        return [{"run": title, "batch": config.batch_size, "images/s": speed, "MFU": seen.mfu, "GB": seen.peak_memory}]


def modulate_all(model: Any, c: torch.Tensor) -> None:
    """Projects the condition in all blocks."""
    for block in model.blocks:
        block.modulation(c, 3)


PARTS: dict[str, Callable[[Bench], Iterator[Case]]] = {
    "forward": Bench.forward,
    "sampling": Bench.sampling,
    "mixed": Bench.mixed,
    "parts": Bench.parts,
    "gaps": Bench.gaps,
    "training": Bench.training,
}


def cell(key: str, value: Any) -> str:
    """Writes one value of a table."""
    if value is None:
        return "-"
    if key == "budget":
        return str(Fraction(value))
    if not isinstance(value, float):
        return str(value)
    if key in ("MFU", "idle", "encode", "Read", "core", "Write", "tail", "conditioning"):
        return f"{value:.1%}"
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"


def markdown(results: dict[str, Any]) -> str:
    """Writes a table for each part that was measured."""
    lines = [", ".join(f"{key} {value}" for key, value in results["environment"].items()), ""]
    for part in PARTS:
        cases = [rows for name, rows in results["cases"].items() if name.startswith(f"{part}: ")]
        if rows := [row for case in cases for row in case]:
            lines += [f"## {part.capitalize()}", "", f"| {' | '.join(rows[0])} |", "| --- " * len(rows[0]) + "|"]
            lines += [f"| {' | '.join(cell(key, value) for key, value in row.items())} |" for row in rows] + [""]
    return "\n".join(lines)


def benchmark(
    parts: str = "forward,sampling,mixed,parts,gaps,training",
    device: str = "cuda",
    out: Path = Path("runs/gpu"),
    minutes: float = 8.5,
) -> None:
    """Measure what is missing, and write the numbers and the tables.

    Args:
        parts: what to measure, written with commas.
        device: cuda or cpu.
        out: a folder for results.json and results.md.
        minutes: no measurement begins after so many; the same command goes on.
    """
    if unknown := set(parts.split(",")) - PARTS.keys():
        raise SystemExit(f"unknown parts {sorted(unknown)}; there are {', '.join(PARTS)}")
    if device not in SCALES:
        raise SystemExit(f"device is {device!r}; give cuda or cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no GPU here; --device cpu measures small models on the CPU")
    bench, file = Bench(torch.device(device), SCALES[device]), out / "results.json"
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    machine = {"device": name, **environment()}
    results = json.loads(file.read_text()) if file.exists() else {"environment": machine, "cases": {}}
    for key in ("device", "torch", "elit"):
        if (before := results["environment"][key]) != machine[key]:
            raise SystemExit(f"{file} was measured with {key} {before}, and this is {machine[key]}; take another --out")
    console, begun = Console(soft_wrap=True), time.monotonic()
    cases = [Case(f"{part}: {case.name}", case.measure) for part in parts.split(",") for case in PARTS[part](bench)]
    for i, case in enumerate(cases, start=1):
        if case.name in results["cases"]:
            continue
        if time.monotonic() - begun > 60 * minutes:
            console.print(f"{minutes} minutes are over: the same command goes on with {case.name}")
            break
        since = time.monotonic()
        results["cases"][case.name] = case.measure()
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, results)
        console.print(f"{i} of {len(cases)}: {case.name}, {time.monotonic() - since:.0f} s")
        torch.compiler.reset()
        gc.collect()
    with atomic_file(out / "results.md") as tables:
        tables.write_text(markdown(results))
    console.print(f"numbers in {file}, tables in {out / 'results.md'}")


if __name__ == "__main__":
    auto_cli(benchmark)
