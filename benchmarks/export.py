"""Measures exported files beside eager PyTorch and torch.compile: latency, elastic efficiency, start, memory, size.

    python benchmarks/export.py --folder files --only_export true
    python benchmarks/export.py --folder files --turns "{quickstart: 12, S/2: 6, B/2: 3}" --out export.json

Each way to run a model is a process of its own, which begins with loading, so that start-up and memory are its own.
Then all of them take turns in one run: in each turn every way runs every batch and level once, or for a tenth of a
second where that is more often. Of all turns the fastest counts, for whatever else a machine does can only add to a
time. Turns that are in the output file already are not measured again, so an interrupted run goes on where it was. The
tables are printed at the end of every call.

Weights are random, since times do not depend on them. `off by` is the largest difference of an output to that of eager
PyTorch, relative to the largest value, over all levels at batch 1.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import auto_cli

import elit
from elit.analysis import count_flops
from elit.analysis.environment import environment
from elit.atomic import write_json
from elit.errors import ElitError
from elit.models import Model

LEVELS = (1, 2, 4, 8, 16)
BATCHES = (1, 8)
Name = Literal["quickstart", "S/2", "B/2"]
Way = Literal["eager", "compile", "aoti", "onnx", "onnx int8", "openvino"]
WAYS: tuple[Way, ...] = ("eager", "compile", "aoti", "onnx", "onnx int8")
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "quickstart": (
        "ELIT-DiT-S/2",
        {"resolution": 16, "downsample": 1, "in_channels": 1, "num_classes": 10, "positions": "sincos"}
        | {"width": 64, "depth": 6, "num_heads": 4, "head_depth": 1, "tail_depth": 1, "group_size": 4},
    ),
    "S/2": ("ELIT-SiT-S/2", {"resolution": 256}),
    "B/2": ("ELIT-SiT-B/2", {"resolution": 256}),
}
TURNS = {"quickstart": 12, "S/2": 6, "B/2": 3}
SHORTEST = 0.1  # seconds for which a cell of a turn is repeated
MIB = 2**20


def main(
    models: list[Name] | None = None,
    ways: list[Way] | None = None,
    turns: dict[str, int] = TURNS,
    out: Path = Path("export.json"),
    folder: Path | None = None,
    threads: int = 1,
    only_export: bool = False,
) -> None:
    """Measures models and ways to run them, and prints the tables.

    Args:
        models: of quickstart, S/2 and B/2; by default all.
        ways: of eager, compile, aoti, onnx and onnx int8, by default all of these; and openvino, where that package is
            installed, which runs the ONNX file.
        turns: how often each model is measured in each way.
        out: the file of results, which is continued.
        folder: where exported files are kept; by default a temporary folder.
        threads: of the processor.
        only_export: make the files and measure nothing.
    """
    results: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"models": {}}
    with tempfile.TemporaryDirectory() as temporary:
        files = folder or Path(temporary)
        files.mkdir(parents=True, exist_ok=True)
        for name in models or MODELS:
            paths: dict[str, Path | None] = {way: file_of(name, way, files) for way in ways or WAYS}
            if only_export:
                continue
            result = results["models"].setdefault(name, {"parts": {}, "turns": []})
            if result["parts"] and set(result["parts"]) != set(paths):
                raise ElitError(f"{out} has other ways of {name}: {', '.join(result['parts'])}; name another file")
            for _ in measure(name, paths, result, turns.get(name, TURNS[name]), threads):
                write_json(out, results | {"environment": environment() | {"threads": threads}})
                print(f"{name}: turn {len(result['turns'])}", flush=True)
    if only_export:
        return
    measured = {name: result for name, result in results["models"].items() if result["turns"]}
    for name, result in measured.items():
        print(f"\n{latency_table(name, result)}")
    print(f"\n{start_table(measured)}")


def measure(
    name: str, paths: dict[str, Path | None], result: dict[str, Any], turns: int, threads: int
) -> Iterator[None]:
    """Adds to the result of a model what its parts are and the turns that it lacks; yields after each of them."""
    if len(result["turns"]) >= turns:
        return
    with ExitStack() as stack:
        parts = {way: stack.enter_context(part(name, way, path, threads)) for way, path in paths.items()}
        outputs = {way: torch.tensor(process.about.pop("outputs")) for way, process in parts.items()}
        for way, process in parts.items():
            if "eager" in outputs:
                wanted = outputs["eager"]
                process.about["off_by"] = ((outputs[way] - wanted).abs().max() / wanted.abs().max()).item()
            result["parts"].setdefault(way, process.about)
        while len(result["turns"]) < turns:
            turn: dict[str, Any] = {way: {str(batch): {} for batch in BATCHES} for way in parts}
            for batch in BATCHES:
                for level in LEVELS:
                    for way, process in parts.items():
                        turn[way][str(batch)][str(level)] = process.milliseconds(batch, level)
            result["turns"].append(turn)
            yield


# ------------------------------------------------------------------------------------------- one way to run a model


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
    if way == "openvino":
        return file_of(name, "onnx", folder)
    file = folder / f"{name.replace('/', '-')}-{way.replace(' ', '-')}{'.pt2' if way == 'aoti' else '.onnx'}"
    if not file.exists():
        precision: Any = "int8" if "int8" in way else "fp32"
        elit.export(build(name), file, format="aoti" if way == "aoti" else "onnx", precision=precision)
    return file


class Part:
    """Talks to the process that runs a model in one way.

    Attributes:
        about: seconds until it was started, its memory, the size of its file, and its outputs at every level.
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.about: dict[str, Any] = self._answer()

    def milliseconds(self, batch: int, level: int) -> float:
        """Returns how long the fastest forward takes of those that fit in a short time."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{batch} {level}\n")
        self.process.stdin.flush()
        return float(self._answer())

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())


@contextmanager
def part(name: str, way: str, file: Path | None, threads: int) -> Iterator[Part]:
    """Starts a process that runs a model in one way, with nothing compiled before, and ends it afterwards."""
    arguments = [sys.executable, __file__, "part", name, way, str(file or ""), str(threads)]
    with tempfile.TemporaryDirectory() as cache:
        variables = os.environ | {"OMP_NUM_THREADS": str(threads), "TORCHINDUCTOR_CACHE_DIR": cache}
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with subprocess.Popen(arguments, env=variables, **pipes) as process:
            try:
                yield Part(process)
            finally:
                process.communicate()  # its input ends, and so does it


def run_part(name: str, way: str, file: Path | None) -> None:
    """Is that process: tells what it is as soon as it is started, and then times what it is asked for."""
    out, sys.stdout = sys.stdout, sys.stderr  # libraries may print too
    before, start = resident_memory(), time.perf_counter()
    model = load(name, way, file)
    inputs = {batch: example(name, batch) for batch in BATCHES}
    with torch.inference_mode():
        first = [model(*inputs[1], num_latents=level) for level in LEVELS]
        about = {
            "start_seconds": time.perf_counter() - start,
            "memory_mib": (resident_memory() - before) / MIB,
            "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before / MIB,
            "file_bytes": None if file is None else file.stat().st_size,
            "outputs": torch.stack(first).tolist(),
        }
        for level in LEVELS:
            model(*inputs[8], num_latents=level)  # may compile again
        print(json.dumps(about), file=out, flush=True)
        for line in sys.stdin:
            batch, level = map(int, line.split())
            print(fastest(lambda b=batch, j=level: model(*inputs[b], num_latents=j)) * 1e3, file=out, flush=True)


def load(name: str, way: str, file: Path | None) -> Any:
    """Makes what a way calls."""
    if way == "openvino":
        return with_openvino(file)
    if file is not None:
        return elit.load_exported(file, trust_native_code=True)
    return elit.compile(build(name)) if way == "compile" else build(name)


def with_openvino(file: Path | None) -> Any:
    """Loads an ONNX file into OpenVINO, in float32."""
    import openvino  # type: ignore[import-not-found, unused-ignore]

    settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    request = openvino.Core().compile_model(str(file), "CPU", settings).create_infer_request()

    def run(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor, num_latents: int) -> torch.Tensor:
        inputs = {"x": x, "t": t, "y": y, "latent_index": torch.arange(num_latents)}
        return torch.from_numpy(request.infer({key: value.numpy() for key, value in inputs.items()})[0].copy())

    return run


def fastest(call: Any) -> float:
    """Returns the seconds of the fastest of several calls."""
    samples: list[float] = []
    while sum(samples) < SHORTEST:
        begin = time.perf_counter()
        call()
        samples.append(time.perf_counter() - begin)
    return min(samples)


def resident_memory() -> int:
    """Returns the bytes of memory that this process holds, on Linux."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def example(name: str, batch: int) -> tuple[Any, ...]:
    """Draws the inputs of a forward, the same in every process."""
    side, channels = (16, 1) if name == "quickstart" else (32, 4)
    torch.manual_seed(batch)
    return torch.randn(batch, channels, side, side), torch.rand(batch), torch.zeros(batch, dtype=torch.long)


# ------------------------------------------------------------------------------------------- tables


def latency_table(name: str, result: dict[str, Any]) -> str:
    """Writes the times of a model as Markdown."""
    config = build(name).config
    flops = count_flops(config, LEVELS[0]).total / count_flops(config, LEVELS[-1]).total
    head = " | ".join(f"{level}/16" for level in LEVELS)
    lines = [f"| {name}, batch | way | {head} | of full | elastic efficiency |"]
    lines += ["| --- | --- |" + " --: |" * (len(LEVELS) + 2)]
    for batch in BATCHES:
        times = {
            way: [min(turn[way][str(batch)][str(level)] for turn in result["turns"]) for level in LEVELS]
            for way in result["parts"]
        }
        for way, row in times.items():
            cells = [f"{value:.2f}" if value < 100 else f"{value:.0f}" for value in row]
            if way != "eager" and "eager" in times:
                gains = [f" ({eager / value:.2f}x)" for eager, value in zip(times["eager"], row, strict=True)]
                cells = [cell + gain for cell, gain in zip(cells, gains, strict=True)]
            ratio = row[0] / row[-1]
            lines.append(f"| {batch} | {way} | {' | '.join(cells)} | {ratio:.0%} | {ratio / flops:.2f} |")
    return "\n".join(lines)


def start_table(results: dict[str, Any]) -> str:
    """Writes start, memory and size of all models as Markdown."""
    lines = ["| model | way | start (s) | memory (MiB) | peak (MiB) | file (MB) | off by |"]
    lines += ["| --- | --- | --: | --: | --: | --: | --: |"]
    for name, result in results.items():
        for way, about in result["parts"].items():
            size = "-" if about["file_bytes"] is None else f"{about['file_bytes'] / 1e6:.1f}"
            off = "-" if way == "eager" or "off_by" not in about else f"{about['off_by']:.1e}"
            memory = f"{about['memory_mib']:.0f} | {about['peak_memory_mib']:.0f}"
            lines.append(f"| {name} | {way} | {about['start_seconds']:.1f} | {memory} | {size} | {off} |")
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1:2] == ["part"]:
        torch.set_num_threads(int(sys.argv[5]))
        run_part(sys.argv[2], sys.argv[3], Path(sys.argv[4]) if sys.argv[4] else None)
    else:
        auto_cli(main, as_positional=False)
