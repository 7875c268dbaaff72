"""Measures exported files beside eager PyTorch and torch.compile: latency, elastic efficiency, memory, start, size.

    python benchmarks/export.py --models "[quickstart]" --out export.json

Each part (one model and one way to run it) is a process of its own, which begins with loading, so that start-up and
memory are its own. Of all turns the fastest counts: whatever else a machine does can only add to a time. A part that is
in the output file already is left out, so that an interrupted run goes on. The table is printed at the end of every
call.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli

import elit
from elit.analysis import count_flops
from elit.analysis.environment import environment
from elit.atomic import write_json
from elit.models import Model

LEVELS = (1, 2, 4, 8, 16)
BATCHES = (1, 8)
WAYS = ("eager", "compile", "aoti", "onnx", "onnx int8")
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "quickstart": (
        "ELIT-DiT-S/2",
        {"resolution": 16, "downsample": 1, "in_channels": 1, "num_classes": 10, "positions": "sincos"}
        | {"width": 64, "depth": 6, "num_heads": 4, "head_depth": 1, "tail_depth": 1, "group_size": 4},
    ),
    "S/2": ("ELIT-SiT-S/2", {"resolution": 256}),
    "B/2": ("ELIT-SiT-B/2", {"resolution": 256}),
}
"""Times do not depend on weights: those of the quickstart's model stand for it."""


def build(name: str) -> Model:
    """Builds a model whose every weight is random, so that no product is of zeros."""
    size, fields = MODELS[name]
    torch.manual_seed(0)
    model = elit.create(size, **fields).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(std=0.02)
    return model


def file_of(name: str, way: str, folder: Path) -> Path | None:
    """Exports a model for a way to run it; None where it needs no file."""
    if way in ("eager", "compile"):
        return None
    file = folder / f"{name.replace('/', '-')}-{way.replace(' ', '-')}{'.onnx' if 'onnx' in way else '.pt2'}"
    if not file.exists():
        precision: Any = "int8" if "int8" in way else "fp32"
        elit.export(build(name), file, format="aoti" if way == "aoti" else None, precision=precision)
    return file


def measure(name: str, way: str, file: Path | None, seconds: float) -> dict[str, Any]:
    """Loads a model and times its forward at every level and batch; this process does nothing else."""
    before = resident_memory()
    start = time.perf_counter()
    model = build(name) if file is None else elit.load_exported(file, trust_native_code=True)
    if way == "compile":
        model = elit.compile(model)
    inputs = {batch: example(name, batch) for batch in BATCHES}
    with torch.inference_mode():
        for batch in BATCHES:  # compiled on the first calls, which are part of the start
            for level in LEVELS:
                model(*inputs[batch], num_latents=level)
        started = time.perf_counter() - start
        rows = {}
        for batch in BATCHES:
            samples: dict[int, list[float]] = {level: [] for level in LEVELS}
            end = time.perf_counter() + seconds / len(BATCHES)
            while time.perf_counter() < end or len(samples[LEVELS[-1]]) < 3:
                for level in LEVELS:
                    begin = time.perf_counter()
                    model(*inputs[batch], num_latents=level)
                    samples[level].append(time.perf_counter() - begin)
            rows[str(batch)] = {str(level): min(of) * 1e3 for level, of in samples.items()}
    memory = resident_memory() - before
    size = None if file is None else file.stat().st_size
    return {"start_seconds": started, "memory_mib": memory / 2**20, "file_bytes": size, "milliseconds": rows}


def resident_memory() -> int:
    """Returns the bytes of memory that this process holds, on Linux."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def example(name: str, batch: int) -> tuple[Any, ...]:
    """Draws the inputs of a forward."""
    side, channels = (16, 1) if name == "quickstart" else (32, 4)
    return torch.randn(batch, channels, side, side), torch.rand(batch), torch.zeros(batch, dtype=torch.long)


def run_part(name: str, way: str, folder: Path, seconds: float, threads: int) -> dict[str, Any]:
    """Measures one part in a process of its own."""
    file = file_of(name, way, folder)
    arguments = [name, way, "" if file is None else str(file), str(seconds), str(threads)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    ran = subprocess.run(
        [sys.executable, __file__, "part", *arguments], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return dict(json.loads(ran.stdout.splitlines()[-1]))


def table(name: str, parts: dict[str, Any]) -> str:
    """Writes what was measured of a model as Markdown."""
    config = build(name).config
    flops = [count_flops(config, level).total for level in LEVELS]
    head = " | ".join(f"{level}/16" for level in LEVELS)
    lines = [
        f"| {name}, batch | way | {head} | of full | elastic efficiency | start (s) | memory (MiB) | file (MB) |",
        "| --- | --- |" + " --: |" * (len(LEVELS) + 5),
    ]
    for batch in BATCHES:
        eager = parts[f"{name}, eager"]["milliseconds"][str(batch)] if f"{name}, eager" in parts else None
        for way in WAYS:
            if (part := parts.get(f"{name}, {way}")) is None:
                continue
            times = [part["milliseconds"][str(batch)][str(level)] for level in LEVELS]
            cells = []
            for level, value in zip(LEVELS, times, strict=True):
                gain = f" ({eager[str(level)] / value:.2f}x)" if eager and way != "eager" else ""
                cells.append(f"{value:.2f}{gain}")
            ratio = times[0] / times[-1]
            size = "-" if part["file_bytes"] is None else f"{part['file_bytes'] / 1e6:.1f}"
            lines.append(
                f"| {batch} | {way} | {' | '.join(cells)} | {ratio:.0%} | {ratio / (flops[0] / flops[-1]):.2f} | "
                f"{part['start_seconds']:.1f} | {part['memory_mib']:.0f} | {size} |"
            )
    return "\n".join(lines)


def main(
    models: list[str] | None = None,
    ways: list[str] | None = None,
    out: Path = Path("export.json"),
    folder: Path | None = None,
    seconds: float = 10,
    threads: int = 1,
    only_export: bool = False,
) -> None:
    """Measures models and ways to run them, and prints a table for each model.

    Args:
        models: of quickstart, S/2 and B/2; by default all.
        ways: of eager, compile, aoti, onnx and onnx int8; by default all.
        out: the file of results, which is continued.
        folder: where exported files are kept; by default a temporary folder.
        seconds: how long each part is timed.
        threads: of the processor.
        only_export: make the files and measure nothing.
    """
    results: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"parts": {}}
    with tempfile.TemporaryDirectory() as temporary:
        files = folder or Path(temporary)
        files.mkdir(parents=True, exist_ok=True)
        for name in models or MODELS:
            for way in ways or WAYS:
                if only_export:
                    file_of(name, way, files)
                elif (key := f"{name}, {way}") not in results["parts"]:
                    results["parts"][key] = run_part(name, way, files, seconds, threads)
                    write_json(out, results | {"environment": environment() | {"threads": threads}})
                    print(key, flush=True)
    for name in models or MODELS:
        print(f"\n{table(name, results['parts'])}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["part"]:
        part_name, part_way, part_file, part_seconds, part_threads = sys.argv[2:]
        torch.set_num_threads(int(part_threads))
        print(json.dumps(measure(part_name, part_way, Path(part_file) if part_file else None, float(part_seconds))))
    else:
        auto_cli(main, as_positional=False)
