"""`elit plan`: the steps and budgets that fit a cost, in a file that `elit sample --plan` follows."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from elit.analysis.calibration import REFERENCE_STEPS, Calibration, calibrate, calibration_stamp
from elit.analysis.environment import environment
from elit.analysis.plan import (
    MIN_STEPS,
    CostKind,
    Plan,
    alternatives,
    constant,
    cost_text,
    measure_error,
    measure_seconds,
    short,
    solve,
)
from elit.atomic import write_json
from elit.commands.subject import open_subject
from elit.data.remote import cache_folder
from elit.errors import ElitError
from elit.evaluation import Judge, Quality
from elit.flow import Guidance, sample
from elit.models import Model

ERROR_SAMPLES = 32  # on which a plan's error is measured; their noise is not that of the calibration
SLACK = 0.1  # a measured latency further than this above the target is told


@dataclass
class Row:
    """One way to sample: what it was predicted to cost and give, and what it does."""

    name: str
    plan: Plan
    seconds: float | None = None
    error: float | None = None
    quality: Quality | None = None


def plan(
    model: str,
    latency_ms: float | None = None,
    gflops: float | None = None,
    speedup: float | None = None,
    out: Path = Path("plan.json"),
    steps: int = 40,
    guidance: Literal["none", "cfg", "ccfg", "ag"] | None = None,
    guidance_scale: float | None = None,
    guidance_budget: float | None = None,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    batch_size: int = 1,
    solver: Literal["euler", "heun"] = "euler",
    path: Literal["linear", "cosine"] = "linear",
    weights: Literal["ema", "raw"] = "ema",
    min_steps: int = MIN_STEPS,
    measure: bool = True,
    data: str | None = None,
    num_samples: int = 1000,
    seed: int = 0,
    device: str = "auto",
    threads: int | None = None,
    recalibrate: bool = False,
) -> Plan:
    """Choose steps, a budget for each of them and the weak budget of guidance that fit a latency or a number of FLOPs.

    The model is measured once per device, batch size and guidance (kept in the cache), the plan is solved for,
    written, and measured beside what one would do without it. Give one of latency_ms, gflops and speedup.

    Args:
        model: a run directory, a saved model, a published .pt file or a Hub id, with a latent interface.
        latency_ms: milliseconds to sample one batch, without decoding.
        gflops: GFLOPs of one image, all steps and terms; 1 MAC is 2 FLOPs.
        speedup: how many times less latency than full budget with STEPS steps.
        out: the plan's file; a picture of it is put beside it.
        steps: of what the plan is compared with.
        guidance: what to come close to. The weak term of cfg is planned too, and may become that of ccfg. Default cfg
            if a scale is given, otherwise none.
        guidance_scale: its scale; default 4.
        guidance_budget: budget of the weak term of ccfg and ag; default the lowest.
        guidance_interval: times between which guidance is on; noise is 1, data is 0.
        batch_size: images at a time.
        solver: euler or heun.
        path: the path that the model was trained on.
        weights: of a run, the moving average or the raw weights.
        min_steps: of a plan.
        measure: whether to measure the plan, and what it is compared with, at the end.
        data: a labelled data set of elit train, such as digits: its classifier then judges samples too.
        num_samples: how many it judges of each.
        seed: of the noise.
        device: auto, cpu, cuda, ...
        threads: of a process on the CPU; default all cores.
        recalibrate: measure the model again.

    Raises:
        ElitError: a cost that nothing meets (the least is named), or a model that cannot be planned for.
    """
    if sum(target is not None for target in (latency_ms, gflops, speedup)) != 1:
        raise ElitError("give one target: latency_ms, gflops or speedup")
    for name, target in (("latency_ms", latency_ms), ("gflops", gflops), ("speedup", speedup)):
        if target is not None and target <= 0:
            raise ElitError(f"{name} is {target}; it must be above 0")
    if batch_size < 1 or num_samples < 2:
        raise ElitError(f"batch_size is {batch_size} and num_samples {num_samples}; they must be at least 1 and 2")
    asked = _guidance(guidance, guidance_scale, guidance_budget, guidance_interval)
    subject = open_subject(model, data, None, device, threads, weights=weights)
    net = subject.model
    if net.conditional and not net.config.num_classes:
        raise ElitError("elit plan samples classes; for a model of text call elit.analysis.calibrate with prompts")
    quality = partial(_quality, net, subject.judge, num_samples, seed) if subject.judge else None
    labels = list(range(net.config.num_classes)) if net.conditional else None

    console = Console(soft_wrap=True, highlight=False)
    known = _calibration(net, labels, batch_size, asked, solver, path, seed, recalibrate, console)
    reference = constant(known, known.options[0], known.levels[-1], steps)
    cost: CostKind = "flops" if gflops is not None else "seconds"
    limit = reference.seconds / (speedup or 1) if latency_ms is None else latency_ms / 1e3
    limit = limit if gflops is None else gflops * 1e9
    found = solve(known, limit, cost, min_steps)
    found.save(out)

    rows = [Row("full budget", reference), Row("plan", found)]
    rows += [Row(name, other) for name, other in alternatives(known, limit, steps, cost).items()]
    if measure:
        _measure(rows, net, labels, batch_size, seed, quality)
    _print(console, rows, cost_text(limit, cost), batch_size)
    _write_results(out.with_name(f"{out.stem}-results.json"), rows, {"cost": cost, "limit": limit})
    _draw(out, rows)
    measured = rows[1].seconds
    if measured is not None and cost == "seconds" and measured > (1 + SLACK) * limit:
        console.print(
            f"[bold]measured {cost_text(measured, cost)}, the target is {cost_text(limit, cost)}:[/bold] the machine "
            "was busier now than when it was calibrated, or is busy; try --recalibrate on an idle one"
        )
    console.print(f"next: elit sample --model {model} --plan {out} --num-images 16 --out planned.png")
    return found


def _guidance(
    kind: str | None, scale: float | None, budget: float | None, interval: tuple[float, float]
) -> Guidance | None:
    kind = kind or ("none" if scale is None else "cfg")
    if kind == "none":
        if scale is not None or budget is not None:
            raise ElitError("guidance is none, so leave its scale and budget out")
        return None
    return Guidance(kind, 4.0 if scale is None else scale, budget, tuple(interval))  # type: ignore[arg-type]


def _calibration(
    model: Model,
    labels: Sequence[int] | None,
    batch_size: int,
    guidance: Guidance | None,
    solver: str,
    path: str,
    seed: int,
    again: bool,
    console: Console,
) -> Calibration:
    """From the cache, or measured and put there."""
    stamp = calibration_stamp(model, batch_size, guidance, solver, path, seed)
    digest = hashlib.sha256(json.dumps(stamp, sort_keys=True).encode()).hexdigest()[:16]
    file = cache_folder() / "calibrations" / f"{digest}.json"
    if file.exists() and not again:
        known = Calibration.load(file)
        console.print(f"calibration of {known.stamp['date']} from {file}")
        return known
    with console.status("calibrating: cost and error of every level, and of few steps"):
        known = calibrate(model, labels, batch_size=batch_size, guidance=guidance, solver=solver, path=path, seed=seed)
    known.save(file)
    console.print(f"calibrated; kept in {file}")
    return known


def _quality(model: Model, judge: Judge, count: int, seed: int, plan: Plan) -> Quality:
    """What the judge says of so many samples, of all classes in turn."""
    labels = torch.arange(count) % model.config.num_classes
    images = sample(model, labels, seeds=range(seed * count, (seed + 1) * count), batch_size=250, **plan.arguments())
    return judge(images.cpu(), labels)


def _measure(
    rows: list[Row],
    model: Model,
    labels: Sequence[int] | None,
    batch_size: int,
    seed: int,
    quality: Callable[[Plan], Quality] | None,
) -> None:
    """Fills the rows in: latency in turns, error against many steps at full budget on noise of its own, quality."""
    classes = None if labels is None else [labels[i % len(labels)] for i in range(max(batch_size, ERROR_SAMPLES))]

    def draw(plan: Plan) -> Tensor:
        seeds = range((seed + 1) * 10**6, (seed + 1) * 10**6 + ERROR_SAMPLES)
        return sample(model, classes and classes[:ERROR_SAMPLES], seeds=seeds, **plan.arguments())

    plans = [row.plan for row in rows]
    latencies = measure_seconds(model, classes and classes[:batch_size], plans, batch_size)
    full = rows[0].plan
    target = draw(replace(full, budgets=full.budgets[:1] * REFERENCE_STEPS))
    for row, latency in zip(rows, latencies, strict=True):
        row.seconds = latency.median
        row.error = measure_error(draw(row.plan), target)
        row.quality = quality(row.plan) if quality else None


def _print(console: Console, rows: list[Row], target: str, batch_size: int) -> None:
    table = Table(title=f"target {target}", title_justify="left", box=box.SIMPLE, pad_edge=False)
    table.add_column("", no_wrap=True)
    for heading in ("steps", "budget", "weak", "GFLOPs", "ms", "error", *_scores(rows[0])):
        table.add_column(heading, justify="right")
    for row in rows:
        p = row.plan
        low, high = min(p.budgets), max(p.budgets)
        weak = "-" if p.guidance is None else "same" if p.guidance.kind == "cfg" else f"{p.guidance.budget or 0:.3g}"
        table.add_row(
            row.name,
            str(p.steps),
            f"{low:.2g}" if low == high else f"{low:.2g}..{high:.2g}",
            weak,
            short(p.flops / 1e9, 4),
            _beside(p.seconds * 1e3, row.seconds and row.seconds * 1e3, 3),
            _beside(p.error, row.error, 2),
            *(short(value) for value in _scores(row).values()),
        )
    console.print(table)
    images = "an image" if batch_size == 1 else f"a batch of {batch_size}"
    told = "predicted/measured" if rows[0].seconds else "predicted"
    console.print(
        f"ms and error: {told}; ms of {images}, all steps, without decoding; GFLOPs of one image (1 MAC = 2 FLOPs); "
        "weak: budget of the weak term of guidance; error: root mean square distance to "
        f"{REFERENCE_STEPS} steps at full budget"
    )


def _scores(row: Row) -> dict[str, float]:
    quality = row.quality
    return {} if quality is None else {"accuracy": quality.accuracy, "distance": quality.frechet_distance}


def _beside(predicted: float, measured: float | None, digits: int) -> str:
    return "/".join(short(value, digits) for value in (predicted, measured) if value is not None)


def _write_results(path: Path, rows: list[Row], target: dict[str, Any]) -> None:
    results = {"target": target, "rows": [asdict(row) for row in rows], "environment": environment()}
    write_json(path, results)


def _draw(out: Path, rows: list[Row]) -> None:
    from elit.analysis.plots import plot_plan, save

    save(plot_plan({row.name: row.plan.budgets for row in rows[1:]}), out.with_suffix(".png"))
