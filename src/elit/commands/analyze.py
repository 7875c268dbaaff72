"""`elit analyze`: what budgets cost and what they buy, as tables, JSON and figures."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

from elit.analysis import (
    AttentionCorrelations,
    AttentionMaps,
    Draws,
    Interval,
    SamplePoint,
    Setting,
    closed_form,
    correlate,
    count_flops,
    equal_cost_settings,
    guidance_settings,
    mean_maps,
    measure_costs,
    pareto_front,
    sweep,
)
from elit.analysis.environment import environment
from elit.atomic import write_json
from elit.commands.info import read_shapes
from elit.commands.sample import PIXELS
from elit.commands.subject import Subject, budgets_of, draws_for, halves_of, open_subject, some_of
from elit.errors import ElitError
from elit.evaluation import Quality, losses_by_budget
from elit.flow import Guidance, TimeDensity
from elit.seeding import generator, normal

OUT = Path("runs/analysis")
CLOSE = 1.1  # a setting whose distance is at most this times the best one is recommended for its cost
KINDS = {"cfg": "CFG", "ag": "AG", "ccfg": "CCFG"}
QUALITY = {"frechet_distance": "Frechet distance (lower is better)", "accuracy": "class accuracy"}

PathName = Literal["linear", "cosine"]


# ------------------------------------------------------------------------------------------------ the verbs


def analyze_budgets(
    model: str,
    data: str | None = None,
    out: Path = OUT,
    budgets: list[float] | None = None,
    batch_sizes: tuple[int, ...] = (1, 16),
    repeats: int = 20,
    num_samples: int = 500,
    steps: int = 20,
    guidance: Literal["none", "cfg", "ccfg", "ag"] = "none",
    guidance_scale: float = 2.0,
    guidance_budget: float | None = None,
    path: PathName = "linear",
    autoencoder: str | None = None,
    seed: int = 0,
    batch_size: int = 64,
    device: str = "auto",
    threads: int | None = None,
) -> dict[str, Any]:
    """Measure what every budget costs (FLOPs, MACs, latency, memory) and, with data, what it gives.

    Args:
        model: a run directory, a saved model, a published .pt file or a Hub id.
        data: a data set with a held-out part, such as digits: for the held-out loss, and where it has classes, for the
            quality of samples as a classifier sees it that is trained on the spot. For small data.
        out: folder of budgets.json and figures.
        budgets: fractions of the latents, such as [0.25,0.5]; default every level of the model. Full budget is added.
        batch_sizes: of the forwards that are timed.
        repeats: timed forwards of each budget, all budgets in turns.
        num_samples: per budget, for quality.
        steps: sampling steps, euler.
        guidance: kind of guidance of the samples.
        guidance_scale: its scale.
        guidance_budget: budget of the weak term of ccfg and ag; default the lowest.
        path: the path that the model was trained on.
        autoencoder: a diffusers autoencoder that decodes the pictures of a model on latents.
        seed: sample i has the seed SEED + i, at every budget.
        batch_size: samples at a time.
        device: auto, cpu, cuda, ...
        threads: of the CPU; default PyTorch's choice.

    Returns:
        What budgets.json holds.

    Raises:
        ElitError: a wrong option, or a model or data that are not there or do not fit.
    """
    settings, plots = dict(locals()), _plots()
    if min(batch_sizes, default=0) < 1 or repeats < 1:
        raise ElitError(f"batch_sizes and repeats must be at least 1, not {list(batch_sizes)} and {repeats}")
    subject = open_subject(model, data, autoencoder, device, threads)
    net, held_out, chosen = subject.model, subject.held_out, budgets_of(subject.model, budgets)
    guided = None if guidance == "none" else Guidance(guidance, guidance_scale, guidance_budget)
    draws = draws_for(subject, num_samples, seed, batch_size, path)
    costs = [measure_costs(net, chosen, size, repeats) for size in batch_sizes]
    losses = []
    if held_out is not None and net.stage_shapes is None:  # its loss has no one time
        losses = losses_by_budget(net, held_out, chosen, TimeDensity(), path)
    points = _sweep(subject, [Setting(steps, budget, guided) for budget in chosen], draws)

    labels = [plots.budget_label(budget) for budget in chosen]
    _print(
        "one forward of one sample, 1 MAC = 2 FLOPs",
        ("budget", "latents", "GFLOPs", "GMACs", "of full"),
        [
            (label, str(c.num_latents), _short(c.flops / 1e9), _short(c.macs / 1e9), f"{c.flops_ratio:.0%}")
            for label, c in zip(labels, costs[0], strict=True)
        ],
    )
    for rows in costs:
        _print(
            f"one forward of a batch of {rows[0].batch_size}, on {net.device}",
            ("budget", "latency (ms)", "quartiles", "of full", "elastic efficiency", "peak memory (MiB)"),
            [
                (
                    *(label, f"{c.latency_ms:.1f}", "{:.1f} to {:.1f}".format(*c.latency_ms_quartiles)),
                    *(f"{c.latency_ratio:.0%}", f"{c.elastic_efficiency:.2f}", f"{c.peak_memory / 2**20:.1f}"),
                )
                for label, c in zip(labels, rows, strict=True)
            ],
        )
    if losses:
        _print(
            "held-out loss, and how far it is above that of full budget on the same noise (95 %)",
            ("budget", "loss", "above full"),
            [
                (
                    plots.budget_label(x.budget),
                    f"{x.loss:.4f}",
                    f"{x.excess:+.4f} ± {1.96 * x.excess_standard_error:.4f}",
                )
                for x in losses
            ],
        )
    _print_points("budget", list(zip(labels, points, strict=False)), subject.references)

    relative = {"FLOPs": [c.flops_ratio for c in costs[0]]}
    relative |= {f"latency, batch {rows[0].batch_size}": [c.latency_ratio for c in rows] for rows in costs}
    plots.save(plots.plot_cost(chosen, relative), out / "budgets-cost")
    if losses:
        errors = [each.excess_standard_error for each in losses]
        plots.save(plots.plot_loss(chosen, [each.excess for each in losses], errors), out / "budgets-loss")
    _save_quality(plots, out, "budgets", {"budgets, low to full": points}, subject.references)
    _save_grid(plots, out, "budgets", points, labels)
    result = {
        "costs": [asdict(cost) for rows in costs for cost in rows],
        "held_out_loss": [asdict(loss) for loss in losses],
        "samples": [_row(point) for point in points],
    }
    if subject.judge:
        following = f"elit analyze steps --model {model} --data {data}, for fewer steps or fewer latents at equal cost"
    else:
        following = f"elit sample --model {model} --budget {chosen[0]:g} --out low.png, to look at the lowest budget"
    return _finish(out / "budgets.json", settings, result | _real(subject), following)


def analyze_guidance(
    model: str,
    data: str | None = None,
    out: Path = OUT,
    scales: tuple[float, ...] = (1.5, 2.0, 3.0, 4.0),
    budget: float | None = None,
    guidance_budget: float | None = None,
    num_samples: int = 500,
    steps: int = 20,
    path: PathName = "linear",
    autoencoder: str | None = None,
    seed: int = 0,
    batch_size: int = 64,
    device: str = "auto",
    threads: int | None = None,
) -> dict[str, Any]:
    """Compare no guidance, CFG, AG and CCFG over scales: cost of a step, quality, saturation and pictures.

    Args:
        model: a run directory, a saved model, a published .pt file or a Hub id.
        data: a data set with classes and a held-out part, such as digits, for quality; see elit analyze budgets.
        out: folder of guidance.json and figures.
        scales: guidance scales above 1.
        budget: of the strong term; default all.
        guidance_budget: of the weak term of ccfg and ag; default the lowest.
        num_samples: per setting, for quality and saturation.
        steps: sampling steps, euler.
        path: the path that the model was trained on.
        autoencoder: a diffusers autoencoder that decodes the pictures of a model on latents.
        seed: sample i has the seed SEED + i, at every setting.
        batch_size: samples at a time.
        device: auto, cpu, cuda, ...
        threads: of the CPU; default PyTorch's choice.

    Returns:
        What guidance.json holds.

    Raises:
        ElitError: a wrong option, or a model or data that are not there or do not fit.
    """
    settings, plots = dict(locals()), _plots()
    subject = open_subject(model, data, autoencoder, device, threads)
    if not (subject.judge or subject.shows):
        raise ElitError(
            f"nothing can be said of samples of {model}: give --data for quality, or --autoencoder to see them"
        )
    sweep_settings = guidance_settings(subject.model, scales, steps, budget, guidance_budget)
    draws = draws_for(subject, num_samples, seed, batch_size, path, all_of_them=subject.is_rgb)
    points = _sweep(subject, sweep_settings, draws)
    unguided, *guided = points
    labels = ["no guidance", *(f"{KINDS[g.kind]} {g.scale:g}" for p in guided if (g := p.setting.guidance))]
    _print_points("guidance", list(zip(labels, points, strict=True)), subject.references)

    measures = [(name, title) for name, title in QUALITY.items() if subject.judge]
    measures += [("saturation", "mean HSL saturation")] if unguided.saturation is not None else []
    for name, title in measures:
        series: dict[str, list[tuple[float, float]]] = {}
        for point, row in zip(guided, map(_row, guided), strict=True):
            assert point.setting.guidance is not None
            series.setdefault(KINDS[point.setting.guidance.kind], []).append((point.setting.guidance.scale, row[name]))
        plots.save(plots.plot_scales(series, _row(unguided)[name], title), out / f"guidance-{name.replace('_', '-')}")
    _save_grid(plots, out, "guidance", points, labels)
    best = min(points, key=lambda p: _distance_at_cost(p)[1]) if subject.judge else guided[-1]
    return _finish(
        out / "guidance.json",
        settings,
        {"samples": [_row(point) for point in points]} | _real(subject),
        f"elit sample --model {model} {_options(best.setting)} --out guided.png"
        + (", the lowest distance here" if subject.judge else ""),
    )


def analyze_steps(
    model: str,
    data: str,
    out: Path = OUT,
    steps: tuple[int, ...] = (3, 6, 12, 24),
    budgets: list[float] | None = None,
    guidance: Literal["none", "cfg", "ccfg", "ag"] = "none",
    guidance_scale: float = 2.0,
    guidance_budget: float | None = None,
    num_samples: int = 500,
    path: PathName = "linear",
    autoencoder: str | None = None,
    seed: int = 0,
    batch_size: int = 64,
    device: str = "auto",
    threads: int | None = None,
) -> dict[str, Any]:
    """Compare few steps with many latents and many steps with few latents, at equal cost: the Pareto front.

    Args:
        model: a run directory, a saved model, a published .pt file or a Hub id.
        data: a data set with classes and a held-out part, such as digits; see elit analyze budgets.
        out: folder of steps.json and figures.
        steps: sampling steps at full budget; every other budget takes as many as cost about the same FLOPs.
        budgets: fractions of the latents; default 1/16, 1/8, 1/4, 1/2 and 1, as far as the model has them.
        guidance: kind of guidance.
        guidance_scale: its scale.
        guidance_budget: budget of the weak term of ccfg and ag; default the lowest.
        num_samples: per setting.
        path: the path that the model was trained on.
        autoencoder: a diffusers autoencoder that decodes the pictures of a model on latents.
        seed: sample i has the seed SEED + i, at every setting.
        batch_size: samples at a time.
        device: auto, cpu, cuda, ...
        threads: of the CPU; default PyTorch's choice.

    Returns:
        What steps.json holds.

    Raises:
        ElitError: a wrong option, or a model or data that are not there or do not fit.
    """
    settings, plots = dict(locals()), _plots()
    subject = open_subject(model, data, autoencoder, device, threads)
    if subject.judge is None:
        raise ElitError(f"{data} has no classes, and without a classifier there is no quality to compare steps by")
    guided = None if guidance == "none" else Guidance(guidance, guidance_scale, guidance_budget)
    chosen = budgets_of(subject.model, budgets or halves_of(subject.model))
    groups = equal_cost_settings(subject.model, steps, chosen, guided)
    draws = draws_for(subject, num_samples, seed, batch_size, path)
    points = _sweep(subject, [setting for group in groups for setting in group], draws)

    labels = [f"{plots.budget_label(p.setting.budget)}, {p.setting.steps} steps" for p in points]
    _print_points("budget and steps", list(zip(labels, points, strict=True)), subject.references)
    front = [points[i] for i in pareto_front([_distance_at_cost(point) for point in points])]
    by_budget = {
        f"budget {plots.budget_label(budget)}": [p for p in points if p.setting.budget == budget] for budget in chosen
    }
    _save_quality(plots, out, "steps", by_budget, subject.references, front)
    _save_grid(plots, out, "steps", points, labels)
    good = next(p for p in front if _distance_at_cost(p)[1] <= CLOSE * _distance_at_cost(front[-1])[1])
    result = {"samples": [_row(point) for point in points], "pareto_front": [_row(point) for point in front]}
    return _finish(
        out / "steps.json",
        settings,
        result | _real(subject),
        f"elit sample --model {model} {_options(good.setting)} --out good.png, the cheapest here within "
        f"{CLOSE - 1:.0%} of the lowest distance",
    )


def analyze_attention(
    model: str,
    data: str,
    out: Path = OUT,
    times: tuple[float, ...] = (0.2, 0.5, 0.8),
    budget: float | None = None,
    images: int = 90,
    draws: int = 4,
    path: PathName = "linear",
    autoencoder: str | None = None,
    seed: int = 0,
    device: str = "auto",
    threads: int | None = None,
) -> dict[str, Any]:
    """Show where the latents look, beside the loss of every token, and correlate the two.

    Args:
        model: a run directory, a saved model, a published .pt file or a Hub id; of images, with a latent interface.
        data: a data set with a held-out part, such as digits.
        out: folder of attention.json and figures.
        times: noise levels; noise is 1, data is 0.
        budget: fraction of the latents; default all.
        images: held-out images, drawn from all of them; intervals are over these.
        draws: of noise for each image, averaged.
        path: the path that the model was trained on.
        autoencoder: a diffusers autoencoder that decodes the pictures of a model on latents.
        seed: of the noise.
        device: auto, cpu, cuda, ...
        threads: of the CPU; default PyTorch's choice.

    Returns:
        What attention.json holds.

    Raises:
        ElitError: a wrong option, or a model or data that are not there or do not fit.
    """
    settings, plots = dict(locals()), _plots()
    if images < 2 or draws < 1 or not times or not all(0 < t < 1 for t in times):
        raise ElitError("attention needs at least 2 images, 1 draw, and times between 0 and 1")
    subject = open_subject(model, data, autoencoder, device, threads, judged=False)
    net, held_out = subject.model, subject.held_out
    assert held_out is not None
    x, y = held_out.batch(some_of(held_out, images))
    condition = net.as_condition(y) if net.conditional else None
    noises = normal(generator(seed, "attention"), (draws, *x.shape))
    x, noises = x.to(net.device, net.dtype), noises.to(net.device, net.dtype)
    maps = [mean_maps(net, x, condition, t, noises, budget, path) for t in times]
    found = [correlate(each) for each in maps]

    _print(
        f"rank correlations within an image, mean over {len(x)} images and 95 % interval",
        ("noise level", "attention and loss", "control: another image's attention", "index and entropy of a latent"),
        [(f"{t:g}", *("-" if c is None else f"{c.mean:.2f} ± {c.half_width:.2f}" for c in _intervals(each)))
         for t, each in zip(times, found, strict=True)],
    )  # fmt: skip
    names = ("attention and loss", "another image's attention and loss", "index of a latent and its entropy")
    series = {
        name: [(interval.mean, interval.half_width) for interval in column if interval is not None]
        for name, column in zip(names, zip(*map(_intervals, found), strict=True), strict=True)
    }
    plots.save(plots.plot_correlations(times, {k: v for k, v in series.items() if v}), out / "attention-correlations")
    if subject.shows:
        pictures = (x if subject.decode is None else subject.decode(x)).float().cpu()
        _save_maps(plots, out, pictures, maps, times)
    result = {"correlations": [{"time": t, **asdict(each)} for t, each in zip(times, found, strict=True)]}
    return _finish(
        out / "attention.json",
        settings,
        result,
        f"elit analyze budgets --model {model} --data {data}, for what fewer latents cost and give",
    )


def analyze_cost(
    model: str,
    out: Path = OUT,
    resolution: int | None = None,
    fields: dict[str, Any] | None = None,
    budgets: list[float] | None = None,
) -> dict[str, Any]:
    """Put the closed formula for the FLOPs of a forward beside what PyTorch counts; no weights are needed.

    Args:
        model: a name like ELIT-SiT-XL/2, a run directory, a saved model, a published .pt file or a Hub id.
        out: folder of cost.json and the figure.
        resolution: pixels of a side, for named models; default 256.
        fields: of the configuration of a named model to change, such as {depth: 12, group_size: 8}.
        budgets: fractions of the latents; default 1/16, 1/8, 1/4, 1/2 and 1, as far as the model has them.

    Returns:
        What cost.json holds.

    Raises:
        ElitError: it is neither a name nor a model, or wrong options.
    """
    settings, plots = dict(locals()), _plots()
    shapes = read_shapes(model, resolution, fields)
    chosen = budgets_of(shapes, budgets or halves_of(shapes))
    counted = [count_flops(shapes, budget) for budget in chosen]
    parts = [closed_form(shapes.config, cost.num_latents) for cost in counted]
    totals = [2 * sum(part.macs for part in each) for each in parts]
    _print(
        "one forward of one sample, 1 MAC = 2 FLOPs",
        ("budget", "latents", "GFLOPs, formula", "GFLOPs, counted", "difference", "GMACs, counted"),
        [
            (
                *(plots.budget_label(budget), str(cost.num_latents or "-"), _short(total / 1e9)),
                *(_short(cost.flops / 1e9), f"{total / cost.flops - 1:.3%}", _short(cost.macs / 1e9)),
            )
            for budget, cost, total in zip(chosen, counted, totals, strict=True)
        ],
    )
    _print(
        "parts at full budget",
        ("part", "tokens", "GFLOPs", "share"),
        [(p.name, f"{p.tokens:,}", _short(2 * p.macs / 1e9), f"{2 * p.macs / totals[-1]:.1%}") for p in parts[-1]],
    )
    stacks = {p.name: [2 * each[i].macs / 1e9 for each in parts] for i, p in enumerate(parts[-1])}
    plots.save(plots.plot_parts(chosen, stacks, "GFLOPs"), out / "cost-parts")
    rows = zip(chosen, counted, totals, parts, strict=True)
    result = {
        "config": asdict(shapes.config),
        "budgets": [
            {
                "budget": budget,
                "num_latents": cost.num_latents,
                "formula_flops": total,
                "counted_flops": cost.flops,
                "counted_macs": cost.macs,
                "parts": [asdict(part) for part in each],
            }
            for budget, cost, total, each in rows
        ],
    }
    return _finish(
        out / "cost.json", settings, result, "elit analyze budgets --model RUN, for how long a trained model takes"
    )


# ------------------------------------------------------------------------------------------------ what is shown


def _sweep(subject: Subject, settings: list[Setting], draws: Draws | None) -> list[SamplePoint]:
    if draws is None:
        return []
    points = sweep(subject.model, settings, draws, subject.judge, subject.decode)
    return list(tqdm(points, "sampling", len(settings), unit="setting", dynamic_ncols=True))


def _plots() -> ModuleType:
    try:
        from elit.analysis import plots
    except ImportError as error:
        raise ElitError(f"figures need {error.name}: pip install 'elit-diffusion[quickstart]'") from error
    return plots


def _print(title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    table = Table(*head, title=title, title_justify="left", title_style="bold")
    for column in table.columns:
        column.justify = "right"
    table.columns[0].no_wrap = True
    for row in rows:
        table.add_row(*row)
    Console(soft_wrap=True, highlight=False).print(table)


def _print_points(what: str, rows: list[tuple[str, SamplePoint]], references: dict[str, Quality]) -> None:
    """Cost and quality of samples; columns that nothing is known for are left out."""
    if not rows:
        return
    coloured, judged = rows[0][1].saturation is not None, rows[0][1].quality is not None
    head = [what, "GFLOPs/step", "GFLOPs/image", "s/image"]
    head += ["accuracy", "distance"] if judged else []
    head += ["saturation"] if coloured else []
    lines = []
    for label, point in rows:
        line = [label, _short(point.flops_per_step / 1e9), _short(point.flops / 1e9), f"{point.seconds:.3g}"]
        line += _quality_cells(point.quality) + ([f"{point.saturation:.3f}"] if coloured else [])
        lines.append(line)
    lines += [[f"real, {name}", "", "", "", *_quality_cells(quality)] for name, quality in references.items()]
    _print("samples from the same noise" + ", quality as a classifier of the real images sees it" * judged, head, lines)


def _quality_cells(quality: Quality | None) -> list[str]:
    return [] if quality is None else [f"{quality.accuracy:.1%}", f"{quality.frechet_distance:.2f}"]


def _short(value: float) -> str:
    return f"{value:,.4g}"


def _options(setting: Setting) -> str:
    """A setting as options of `elit sample`."""
    options = [f"--steps {setting.steps}"]
    if setting.budget is not None:
        options.append(f"--budget {setting.budget:g}")
    if setting.guidance is not None:
        options.append(f"--guidance {setting.guidance.kind} --guidance-scale {setting.guidance.scale:g}")
        if setting.guidance.budget is not None:
            options.append(f"--guidance-budget {setting.guidance.budget:g}")
    return " ".join(options)


def _distance_at_cost(point: SamplePoint) -> tuple[float, float]:
    assert point.quality is not None
    return point.flops, point.quality.frechet_distance


def _save_quality(
    plots: ModuleType,
    out: Path,
    name: str,
    series: dict[str, list[SamplePoint]],
    references: dict[str, Quality],
    front: Sequence[SamplePoint] = (),
) -> None:
    """Quality against cost, where there is a judge."""
    if not references:
        return
    for measure, title in QUALITY.items():

        def at(points: Iterable[SamplePoint], measure: str = measure) -> list[tuple[float, float]]:
            return [(point.flops / 1e9, getattr(point.quality, measure)) for point in points]

        real = {key: getattr(quality, measure) for key, quality in references.items()}
        lines = {key: at(points) for key, points in series.items()}
        figure = plots.plot_quality(lines, real, title, at(front) if measure == "frechet_distance" else ())
        plots.save(figure, out / f"{name}-{measure.replace('_', '-')}")


def _save_grid(plots: ModuleType, out: Path, name: str, points: list[SamplePoint], labels: list[str]) -> None:
    """The same samples, one row per setting."""
    if points and points[0].images.dim() == 4 and points[0].images.shape[1] in PIXELS:
        plots.save(plots.plot_overview([list(point.images) for point in points], labels), out / f"{name}-samples")


def _save_maps(
    plots: ModuleType, out: Path, images: Tensor, maps: list[AttentionMaps], times: Sequence[float], count: int = 4
) -> None:
    """Attention beside loss, and the first and last latents, of a few images evenly from all."""
    few = [i * len(images) // count for i in range(min(count, len(images)))]
    columns = ["image", *(f"{what}\nt = {t:g}" for t in times for what in ("attention", "loss"))]
    rows = [("", images[i], [m for each in maps for m in (each.attention[i].cpu(), each.loss[i].cpu())]) for i in few]
    plots.save(plots.plot_maps(rows, columns), out / "attention-maps")
    level = maps[0].latents.shape[1]
    shown = sorted({*range(min(3, level)), *range(max(0, level - 3), level)})
    columns = ["image", *(f"latent {j + 1}" for j in shown)]
    rows = [
        (f"t = {t:g}", images[i], [each.latents[i, j].cpu() for j in shown])
        for i in few[:2]
        for t, each in zip(times, maps, strict=True)
    ]
    plots.save(plots.plot_maps(rows, columns), out / "attention-latents")


def _intervals(found: AttentionCorrelations) -> tuple[Interval | None, ...]:
    return found.same_image, found.another_image, found.entropy


def _row(point: SamplePoint) -> dict[str, Any]:
    """A point without its images, its quality beside the rest."""
    row = asdict(point)
    del row["images"]
    return row | (row.pop("quality") or {})


def _real(subject: Subject) -> dict[str, Any]:
    return {"references": {name: asdict(quality) for name, quality in subject.references.items()}}


def _finish(file: Path, settings: dict[str, Any], result: dict[str, Any], following: str) -> dict[str, Any]:
    """Writes the result with its settings and environment, and says what to do next."""
    result = {"settings": settings, **result, "environment": environment()}
    write_json(file, result, default=str)
    console = Console(soft_wrap=True, highlight=False)
    console.print(f"{file} and figures beside it")
    console.print(f"next: {following}")
    return result
