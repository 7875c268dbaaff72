"""`elit plan`: the steps and budgets that fit a cost, in a file that `elit sample --plan` follows."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from elit.analysis.calibration import REFERENCE_STEPS, Calibration, calibrate, calibration_stamp
from elit.analysis.choice import MIN_SAMPLES, choose
from elit.analysis.environment import environment
from elit.analysis.plan import (
    MIN_STEPS,
    CostKind,
    Plan,
    baseline_plans,
    candidate_plans,
    constant_plan,
    format_cost,
    format_number,
    measure_error,
    measure_seconds,
    solve,
)
from elit.atomic import write_json
from elit.commands.evaluate import ExtractorName
from elit.commands.inputs import Inputs, load_inputs
from elit.commands.options import GuidanceOptions, ModelOptions
from elit.commands.sample import PIXELS
from elit.data.autoencoder import decode, load_autoencoder
from elit.data.remote import cache_folder
from elit.errors import ElitError
from elit.evaluation import FrechetJudge, Quality, open_extractor
from elit.evaluation.extractors import Resize
from elit.flow import sample
from elit.models import Model

ERROR_SAMPLES = 32  # on which a plan's error is measured; their noise is not that of the calibration
OF_THE_JUDGE = ("extractor", "extractor_weights", "fdd_resize", "autoencoder")  # options for a reference alone
SLACK = 0.1  # a measured latency further than this above the target is mentioned


@dataclass
class Row:
    """One way to sample: its plan with the predicted cost and error, and what was measured.

    Attributes:
        seconds: measured seconds to sample one batch.
        error: measured root mean square distance to many steps at full budget.
        quality: what a classifier says of its samples.
    """

    name: str
    plan: Plan
    seconds: float | None = None
    error: float | None = None
    quality: Quality | None = None


@dataclass(kw_only=True)
class PlanOptions(GuidanceOptions, ModelOptions):
    """The options of `elit plan`, which approaches guided samples at a lower cost.

    Attributes:
        latency_ms: the target, as milliseconds to sample one batch, without decoding.
        gflops: the target, as GFLOPs of one image, all steps and terms together; 1 MAC is 2 FLOPs.
        speedup: the target, as how many times less latency than full budget with STEPS steps.
        out: the file of the plan; a picture of it is put beside it.
        steps: number of steps at full budget that the plan is compared with.
        batch_size: images at a time.
        solver: the solver that is planned for.
        min_steps: fewest steps of a plan.
        measure: whether to measure the plan, and what it is compared with, at the end.
        data: a labelled data set of elit train, such as digits, whose classifier then judges samples too.
        num_samples: number of samples that it judges for each row, and that are scored for each candidate of a choice
            by quality.
        seed: seed of the noise.
        recalibrate: measure the model again, even if that was done before.
        reference: choose the plan by quality: of several plans at the target's cost, the one whose samples are nearest
            to these images. They are what elit evaluate takes: a folder or zip of images, an embedded data set, or a
            .npz. By default the plan is the one of least predicted error.
        extractor: which network computes the features of samples and reference: inception for FID, dinov2 for FDD, or
            the classifier of a data set.
        extractor_weights: file or folder of the weights of the extractor; by default those in the cache.
        fdd_resize: how images are brought to the 224 pixels of dinov2: pil in bytes, as dgm-eval does, or float.
        autoencoder: a diffusers autoencoder that decodes the samples of a model on latents, to be scored: a folder or a
            Hub id.

    Raises:
        ElitError: not exactly one target, a number that is too small, or an option of a choice by quality without a
            reference.
    """

    latency_ms: float | None = None
    gflops: float | None = None
    speedup: float | None = None
    out: Path = Path("plan.json")
    steps: int = 40
    batch_size: int = 1
    solver: Literal["euler", "heun"] = "euler"
    min_steps: int = MIN_STEPS
    measure: bool = True
    data: str | None = None
    num_samples: int = 1000
    seed: int = 0
    recalibrate: bool = False
    reference: str | None = None
    extractor: ExtractorName = "inception"
    extractor_weights: str | None = None
    fdd_resize: Resize = "pil"
    autoencoder: str = "stabilityai/sd-vae-ft-ema"

    def __post_init__(self) -> None:
        targets = {"latency_ms": self.latency_ms, "gflops": self.gflops, "speedup": self.speedup}
        given = {name: target for name, target in targets.items() if target is not None}
        if len(given) != 1:
            raise ElitError("give one target: latency_ms, gflops or speedup")
        for name, target in given.items():
            if not 0 < target < float("inf"):
                raise ElitError(f"{name} is {target}; it must be a number above 0")
        if self.batch_size < 1 or self.num_samples < 2:
            raise ElitError(
                f"batch_size is {self.batch_size} and num_samples {self.num_samples}; they must be at least 1 and 2"
            )
        if self.reference is not None and self.num_samples < MIN_SAMPLES:
            raise ElitError(f"num_samples is {self.num_samples}; a choice by quality needs at least {MIN_SAMPLES}")
        for field in fields(self):
            if self.reference is None and field.name in OF_THE_JUDGE and getattr(self, field.name) != field.default:
                option = field.name.replace("_", "-")
                raise ElitError(f"{field.name} is given without a reference; add --reference, or leave --{option} out")


def make_plan(options: PlanOptions) -> Plan:
    """Choose steps, a budget for each of them, the weak budget of guidance and a cache that fit a latency or a number
    of FLOPs.

    The model is measured once per device, batch size and guidance (kept in the cache), the plan is solved for,
    written, and measured beside what one would do without it. Give one of latency_ms, gflops and speedup. With cfg,
    the weak term is planned too, and may become that of ccfg.

    With a reference the plan is chosen by quality: samples of several plans are scored, and the best one wins. The
    plan's file has all scores.

    Raises:
        ElitError: a cost that nothing meets (the least is named), a model that cannot be planned for, or a reference
            that cannot be read.
    """
    console = Console(soft_wrap=True, highlight=False)
    inputs = load_inputs(options, options.data)
    model = inputs.model
    if model.conditional and not model.config.num_classes:
        raise ElitError("elit plan samples classes; for a model of text call elit.analysis.calibrate with prompts")
    judge = None if options.reference is None else open_judge(options, inputs)
    known = load_calibration(options, inputs, console)
    full = constant_plan(known, known.tables[0], known.levels[-1], options.steps)
    cost, limit = target_of(options, full)
    nearest = plan = solve(known, limit, cost, options.min_steps)
    if judge is not None:
        candidates = candidate_plans(known, limit, options.steps, cost, options.min_steps)
        plan = choose_by_quality(candidates, cost, judge, inputs, options, console)
    plan.save(options.out)

    rows = [Row("full budget", full), Row("plan", plan)]
    rows += [] if plan.arguments() == nearest.arguments() else [Row("least error", nearest)]
    rows += [Row(name, other) for name, other in baseline_plans(known, limit, options.steps, cost).items()]
    if options.measure:
        measure_rows(rows, inputs, options)
    print_rows(console, rows, format_cost(limit, cost), options.batch_size)
    write_results(options.out.with_name(f"{options.out.stem}-results.json"), rows, {"cost": cost, "limit": limit})
    draw_plans(options.out, rows)
    measured = rows[1].seconds
    if measured is not None and cost == "seconds" and measured > (1 + SLACK) * limit:
        console.print(
            f"[bold]measured {format_cost(measured, cost)}, the target is {format_cost(limit, cost)}:[/bold] the "
            "machine was busier now than when it was calibrated, or is busy; try --recalibrate on an idle one"
        )
    console.print(f"plan in {options.out}, with a picture and the table beside it")
    console.print(f"next: elit sample --model {options.model} --plan {options.out} --num-images 16 --out planned.png")
    return plan


def target_of(options: PlanOptions, full: Plan) -> tuple[CostKind, float]:
    """Returns the kind of cost that is limited, and its limit in seconds or FLOPs.

    Args:
        full: sampling at full budget, which a speedup is relative to.
    """
    if options.gflops is not None:
        return "flops", options.gflops * 1e9
    if options.latency_ms is not None:
        return "seconds", options.latency_ms / 1e3
    return "seconds", full.seconds / (options.speedup or 1)


def classes_of(inputs: Inputs) -> list[int] | None:
    """Returns all classes of a model, or None where it has none."""
    return list(range(inputs.model.config.num_classes)) if inputs.model.conditional else None


def load_calibration(options: PlanOptions, inputs: Inputs, console: Console) -> Calibration:
    """Loads the calibration of a model from the cache, or measures it and puts it there."""
    how: dict[str, Any] = {
        "batch_size": options.batch_size,
        "guidance": options.make_guidance(),
        "solver": options.solver,
        "path": options.path,
        "seed": options.seed,
    }
    stamp = calibration_stamp(inputs.model, **how)
    digest = hashlib.sha256(json.dumps(stamp, sort_keys=True).encode()).hexdigest()[:16]
    file = cache_folder() / "calibrations" / f"{digest}.json"
    if file.exists() and not options.recalibrate:
        known = Calibration.load(file)
        console.print(f"calibration of {known.stamp['date']} from {file}")
        return known
    with console.status("calibrating: cost and error of every level, and of few steps"):
        known = calibrate(inputs.model, classes_of(inputs), **how)
    known.save(file)
    console.print(f"calibrated; kept in {file}")
    return known


def open_judge(options: PlanOptions, inputs: Inputs) -> FrechetJudge:
    """Opens what a choice by quality scores samples by; features of the reference come from the cache of elit evaluate.

    Raises:
        ElitError: a reference, weights or an autoencoder that are missing or damaged, or samples that are no images.
    """
    assert options.reference is not None
    model = inputs.model
    if len(model.input_shape()) != 3:
        raise ElitError(f"{options.model} makes clips, which no extractor scores; leave --reference out")
    try:
        extractor = open_extractor(options.extractor, options.extractor_weights, options.fdd_resize, model.device)
    except ElitError as error:  # it speaks of elit evaluate's option; ours of this name is another one
        raise ElitError(str(error).replace("--weights", "--extractor-weights")) from error
    return FrechetJudge(options.reference, extractor, decoder_of(model, options.autoencoder), progress=True)


def decoder_of(model: Model, autoencoder: str) -> Callable[[Tensor], Tensor] | None:
    """Returns what turns a model's samples into images; None for a model on pixels.

    Raises:
        ElitError: the autoencoder is missing or does not fit.
    """
    channels = model.config.in_channels
    return None if channels in PIXELS else partial(decode, autoencoder=load_autoencoder(autoencoder, channels))


def choose_by_quality(
    candidates: dict[str, Plan],
    cost: CostKind,
    judge: FrechetJudge,
    inputs: Inputs,
    options: PlanOptions,
    console: Console,
) -> Plan:
    """Scores the candidates, prints them, and returns the plan that is chosen."""
    console.print(
        f"choosing among {len(candidates)} plans by {judge.name}, by up to {options.num_samples:,} samples of each"
    )
    plan = choose(
        inputs.model,
        classes_of(inputs),
        candidates,
        judge,
        num_samples=options.num_samples,
        seed=options.seed,
        progress=True,
    )
    assert plan.choice is not None
    print_choice(console, plan.choice, cost)
    features = len(judge.wanted.mean)
    if options.num_samples <= features:
        console.print(
            f"[yellow]{judge.name} is biased: {options.num_samples} samples are too few for {features} features; take "
            f"--num-samples {2 * features} or more[/yellow]"
        )
    return plan


def print_choice(console: Console, choice: dict[str, Any], cost: CostKind) -> None:
    """Prints the scores that a plan was chosen by, best first, and below the table how it was chosen."""
    table = Table(title=f"chosen by {choice['score']}", title_justify="left", box=box.SIMPLE, pad_edge=False)
    table.add_column("", no_wrap=True)
    for heading in ("steps", "budget", "cost", "score", "above the best"):
        table.add_column(heading, justify="right")
    for row in choice["candidates"]:
        finished = row["samples"] == choice["num_samples"]
        table.add_row(
            row["name"],
            str(len(row["budgets"])),
            format_range(row["budgets"]),
            format_cost(row[cost], cost),
            format_number(row["score"]) if finished else f"dropped at {row['samples']:,}",
            f"{format_number(row['above'])} ± {format_number(row['standard_error'], 2)}" if row["above"] else "",
            style="bold" if row["name"] == choice["chosen"] else None,
        )
    console.print(table)
    console.print(
        f"chosen: {choice['chosen']}; score: {choice['score']} of {choice['num_samples']:,} samples, less is better; "
        "above the best: ± standard error of the difference, of the same noise. Candidates within 1 standard error of "
        "the best are equally good: one budget for all steps comes first, then the least predicted error. Those beyond "
        "3 are dropped early"
    )


def measure_rows(rows: list[Row], inputs: Inputs, options: PlanOptions) -> None:
    """Fills the rows in: latency in turns, error against many steps at full budget on noise of its own, quality."""
    model, classes, seed = inputs.model, classes_of(inputs), options.seed
    labels = None if classes is None else [i % len(classes) for i in range(max(options.batch_size, ERROR_SAMPLES))]

    def draw(plan: Plan) -> Tensor:
        seeds = range((seed + 1) * 10**6, (seed + 1) * 10**6 + ERROR_SAMPLES)
        return sample(model, labels and labels[:ERROR_SAMPLES], seeds=seeds, **plan.arguments())

    plans = [row.plan for row in rows]
    latencies = measure_seconds(model, labels and labels[: options.batch_size], plans, options.batch_size)
    full = rows[0].plan
    target = draw(replace(full, budgets=full.budgets[:1] * REFERENCE_STEPS))
    for row, latency in zip(rows, latencies, strict=True):
        row.seconds = latency.median
        row.error = measure_error(draw(row.plan), target)
        row.quality = judge_samples(row.plan, inputs, options)


def judge_samples(plan: Plan, inputs: Inputs, options: PlanOptions) -> Quality | None:
    """Returns what the judge says of samples of all classes in turn; None without a judge."""
    if inputs.judge is None:
        return None
    count, seed = options.num_samples, options.seed
    labels = torch.arange(count) % inputs.model.config.num_classes
    seeds = range(seed * count, (seed + 1) * count)
    images = sample(inputs.model, labels, seeds=seeds, batch_size=250, **plan.arguments())
    return inputs.judge(images.cpu(), labels)


def print_rows(console: Console, rows: list[Row], target: str, batch_size: int) -> None:
    """Prints one row per plan, and below the table what its columns mean."""
    table = Table(title=f"target {target}", title_justify="left", box=box.SIMPLE, pad_edge=False)
    table.add_column("", no_wrap=True)
    for heading in ("steps", "budget", "weak", "cache", "GFLOPs", "ms", "error", *scores(rows[0])):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(row.name, *cells(row), *(format_number(value) for value in scores(row).values()))
    console.print(table)
    images = "an image" if batch_size == 1 else f"a batch of {batch_size}"
    what = "predicted/measured" if rows[0].seconds else "predicted"
    console.print(
        f"ms and error: {what}; ms of {images}, all steps, without decoding; GFLOPs of one image (1 MAC = 2 FLOPs); "
        "weak: budget of the weak term of guidance; cache: threshold of elit.Cache, which skips the core where little "
        f"changes; error: root mean square distance to {REFERENCE_STEPS} steps at full budget"
    )


def cells(row: Row) -> list[str]:
    """Writes steps, budget, weak budget, cache, GFLOPs, milliseconds and error of a row."""
    plan = row.plan
    weak = (
        "-" if plan.guidance is None else "same" if plan.guidance.kind == "cfg" else f"{plan.guidance.budget or 0:.3g}"
    )
    return [
        str(plan.steps),
        format_range(plan.budgets),
        weak,
        "-" if plan.cache is None else f"{plan.cache.threshold:g}",
        format_number(plan.flops / 1e9, 4),
        predicted_and_measured(plan.seconds * 1e3, row.seconds and row.seconds * 1e3, 3),
        predicted_and_measured(plan.error, row.error, 2),
    ]


def format_range(budgets: Sequence[float]) -> str:
    """Writes the lowest and the highest budget, or the one that all are."""
    low, high = min(budgets), max(budgets)
    return f"{low:.2g}" if low == high else f"{low:.2g}..{high:.2g}"


def scores(row: Row) -> dict[str, float]:
    """Returns the quality of a row by heading; nothing without a judge."""
    quality = row.quality
    return {} if quality is None else {"accuracy": quality.accuracy, "distance": quality.frechet_distance}


def predicted_and_measured(predicted: float, measured: float | None, digits: int) -> str:
    """Writes two numbers side by side, or the predicted one alone."""
    return "/".join(format_number(value, digits) for value in (predicted, measured) if value is not None)


def write_results(path: Path, rows: list[Row], target: dict[str, Any]) -> None:
    """Writes the rows with the target and the environment as JSON."""
    results = {"target": target, "rows": [asdict(row) for row in rows], "environment": environment()}
    write_json(path, results)


def draw_plans(out: Path, rows: list[Row]) -> None:
    """Draws the budgets of every plan but that of full budget."""
    from elit.analysis.plots import plot_plan, save

    save(plot_plan({row.name: row.plan.budgets for row in rows[1:]}), out.with_suffix(".png"))
