"""`elit analyze guidance`: the kinds of guidance over their scales."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from elit.analysis import SamplePoint, guidance_settings
from elit.commands.analyze.output import (
    QUALITY,
    AnalysisOptions,
    cost_and_distance,
    draw_samples,
    load_plots,
    print_samples,
    reference_rows,
    row_of,
    run_sweep,
    sample_options,
    write_results,
)
from elit.commands.inputs import SampleCountOptions, choose_samples, load_inputs
from elit.errors import ElitError

KINDS = {"cfg": "CFG", "ag": "AG", "ccfg": "CCFG"}


@dataclass(kw_only=True)
class GuidanceSweepOptions(SampleCountOptions, AnalysisOptions):
    """The options of `elit analyze guidance`.

    Attributes:
        scales: guidance scales to compare, all above 1.
        budget: budget of the strong term; by default all latents.
        guidance_budget: budget of the weak term of ccfg and ag; by default the lowest.
        steps: number of Euler steps of the samples.
    """

    scales: tuple[float, ...] = (1.5, 2.0, 3.0, 4.0)
    budget: float | None = None
    guidance_budget: float | None = None
    steps: int = 20


def analyze_guidance(options: GuidanceSweepOptions) -> dict[str, Any]:
    """Compare no guidance, CFG, AG and CCFG over scales: cost of a step, quality, saturation and pictures.

    Returns:
        What guidance.json holds.

    Raises:
        ElitError: a wrong option, or a model or data that are not there or do not fit.
    """
    plots = load_plots()
    inputs = load_inputs(options, options.data, options.autoencoder)
    if not (inputs.judge or inputs.shows):
        raise ElitError(
            f"nothing can be said of samples of {options.model}: give --data for quality, or --autoencoder to see them"
        )
    settings = guidance_settings(inputs.model, options.scales, options.steps, options.budget, options.guidance_budget)
    draws = choose_samples(inputs, options, options.path, all_of_them=inputs.is_rgb)
    points = run_sweep(inputs, settings, draws)
    labels = ["no guidance" if (g := p.setting.guidance) is None else f"{KINDS[g.kind]} {g.scale:g}" for p in points]
    print_samples("guidance", list(zip(labels, points, strict=True)), inputs.references)
    draw_scales(plots, options.out, points, QUALITY if inputs.judge else {})
    draw_samples(plots, options.out, "guidance", points, labels)
    following = f"elit sample --model {options.model} {sample_options(points[-1].setting)} --out guided.png"
    if inputs.judge:
        best = min(points, key=lambda point: cost_and_distance(point)[1])
        following = f"elit sample --model {options.model} {sample_options(best.setting)} --out guided.png, "
        following += "which has the lowest distance here"
    result = {"samples": [row_of(point) for point in points]} | reference_rows(inputs)
    return write_results(options.out / "guidance.json", options, result, following)


def draw_scales(plots: ModuleType, out: Path, points: Sequence[SamplePoint], quality: dict[str, str]) -> None:
    """Draws each measure against the scale, one line for each kind of guidance.

    Args:
        points: the first one is without guidance.
        quality: names and titles of the measures of the judge.
    """
    unguided, *guided = points
    measures = quality | ({} if unguided.saturation is None else {"saturation": "mean HSL saturation"})
    for name, title in measures.items():
        series: dict[str, list[tuple[float, float]]] = {}
        for point in guided:
            assert point.setting.guidance is not None
            line = series.setdefault(KINDS[point.setting.guidance.kind], [])
            line.append((point.setting.guidance.scale, row_of(point)[name]))
        figure = plots.plot_scales(series, row_of(unguided)[name], title)
        plots.save(figure, out / f"guidance-{name.replace('_', '-')}")
