"""`elit analyze steps`: few steps with many latents against many steps with few latents."""

from dataclasses import dataclass, field
from typing import Any

from elit.analysis import SamplePoint, equal_cost_settings, pareto_front
from elit.commands.analyze.output import (
    AnalysisGuidanceOptions,
    AnalysisOptions,
    cost_and_distance,
    draw_quality,
    draw_samples,
    load_plots,
    print_samples,
    reference_rows,
    row_of,
    run_sweep,
    sample_options,
    write_results,
)
from elit.commands.budgets import halved_budgets, resolve_budgets
from elit.commands.inputs import SampleCountOptions, choose_samples, load_inputs
from elit.errors import ElitError

TOLERANCE = 1.1  # a setting whose distance is at most this times the best one is recommended for its cost


@dataclass(kw_only=True)
class StepsOptions(SampleCountOptions, AnalysisGuidanceOptions, AnalysisOptions):
    """The options of `elit analyze steps`.

    Attributes:
        steps: numbers of sampling steps at full budget; every other budget takes as many as cost about the same FLOPs.
        budgets: fractions of the latents to compare; by default 1/16, 1/8, 1/4, 1/2 and 1, as far as the model has
            them.
    """

    data: str = field()
    steps: tuple[int, ...] = (3, 6, 12, 24)
    budgets: list[float] | None = None


def analyze_steps(options: StepsOptions) -> dict[str, Any]:
    """Compare few steps with many latents and many steps with few latents, at equal cost: the Pareto front.

    Returns:
        What steps.json holds.

    Raises:
        ElitError: a wrong option, or a model or data that are not there or do not fit.
    """
    plots = load_plots()
    inputs = load_inputs(options, options.data, options.autoencoder)
    if inputs.judge is None:
        raise ElitError(
            f"{options.data} has no classes, and without a classifier there is no quality to compare steps by"
        )
    budgets = resolve_budgets(inputs.model, options.budgets or halved_budgets(inputs.model))
    groups = equal_cost_settings(inputs.model, options.steps, budgets, options.make_guidance())
    draws = choose_samples(inputs, options, options.path)
    points = run_sweep(inputs, [setting for group in groups for setting in group], draws)

    labels = [f"{plots.budget_label(p.setting.budget)}, {p.setting.steps} steps" for p in points]
    print_samples("budget and steps", list(zip(labels, points, strict=True)), inputs.references)
    front = [points[i] for i in pareto_front([cost_and_distance(point) for point in points])]
    series = {f"budget {plots.budget_label(b)}": [p for p in points if p.setting.budget == b] for b in budgets}
    draw_quality(plots, options.out, "steps", series, inputs.references, front)
    draw_samples(plots, options.out, "steps", points, labels)
    result = {"samples": [row_of(point) for point in points], "pareto_front": [row_of(point) for point in front]}
    following = (
        f"elit sample --model {options.model} {sample_options(cheapest_good(front).setting)} --out good.png, "
        f"the cheapest here within {TOLERANCE - 1:.0%} of the lowest distance"
    )
    return write_results(options.out / "steps.json", options, result | reference_rows(inputs), following)


def cheapest_good(front: list[SamplePoint]) -> SamplePoint:
    """Returns the cheapest point of a Pareto front whose distance is close to the lowest one."""
    lowest = cost_and_distance(front[-1])[1]
    return next(point for point in front if cost_and_distance(point)[1] <= TOLERANCE * lowest)
