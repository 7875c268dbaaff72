"""`elit analyze budgets`: cost, held-out loss and samples at every budget."""

from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from elit.analysis import BudgetCost, SamplePoint, SamplerSettings, measure_costs
from elit.commands.analyze.output import (
    AnalysisGuidanceOptions,
    AnalysisOptions,
    draw_quality,
    draw_samples,
    load_plots,
    print_samples,
    print_table,
    reference_rows,
    row_of,
    run_sweep,
    short,
    write_results,
)
from elit.commands.budgets import resolve_budgets
from elit.commands.inputs import Inputs, SampleCountOptions, choose_samples, load_inputs
from elit.errors import ElitError
from elit.evaluation import BudgetLoss, losses_by_budget
from elit.flow import TimeDensity


@dataclass(kw_only=True)
class BudgetsOptions(SampleCountOptions, AnalysisGuidanceOptions, AnalysisOptions):
    """The options of `elit analyze budgets`.

    Attributes:
        budgets: fractions of the latents to compare, such as [0.25,0.5]; by default every level of the model. Full
            budget is always added.
        batch_sizes: the batch sizes at which a forward is timed.
        repeats: how often each budget is timed, all budgets in turns.
        steps: number of Euler steps of the samples.
    """

    budgets: list[float] | None = None
    batch_sizes: tuple[int, ...] = (1, 16)
    repeats: int = 20
    steps: int = 20

    def __post_init__(self) -> None:
        if min(self.batch_sizes, default=0) < 1 or self.repeats < 2:  # quartiles need two
            raise ElitError(
                f"batch_sizes must be at least 1 and repeats at least 2, "
                f"not {list(self.batch_sizes)} and {self.repeats}"
            )


def analyze_budgets(options: BudgetsOptions) -> dict[str, Any]:
    """Measure what every budget costs (FLOPs, latency, memory) and, with data, the held-out loss and the samples.

    Returns:
        What budgets.json holds.

    Raises:
        ElitError: a wrong option, or a model or data that are not there or do not fit.
    """
    plots = load_plots()
    inputs = load_inputs(options, options.data, options.autoencoder)
    model, budgets = inputs.model, resolve_budgets(inputs.model, options.budgets)
    guidance, draws = options.make_guidance(), choose_samples(inputs, options, options.path)
    levels = [model.level(budget) for budget in budgets]
    costs = [measure_costs(model, levels, size, options.repeats) for size in options.batch_sizes]
    losses: list[BudgetLoss] = []
    if inputs.held_out is not None and model.stage_shapes is None:  # its loss has no one time
        losses = losses_by_budget(model, inputs.held_out, budgets, TimeDensity(), options.path)
    points = run_sweep(inputs, [SamplerSettings(options.steps, budget, guidance) for budget in budgets], draws)

    labels = [plots.budget_label(budget) for budget in budgets]
    print_costs(costs, labels, str(model.device))
    print_losses(losses, labels)
    print_samples("budget", list(zip(labels, points, strict=False)), inputs.references)
    draw_figures(plots, options.out, costs, losses, points, inputs)
    result = {
        "costs": [asdict(cost) for rows in costs for cost in rows],
        "held_out_loss": [asdict(loss) for loss in losses],
        "samples": [row_of(point) for point in points],
    }
    following = f"elit sample --model {options.model} --budget {budgets[0]:g} --out low.png, for the lowest budget"
    if inputs.judge:
        following = f"elit analyze steps --model {options.model} --data {options.data}, for the best use of a cost"
    return write_results(options.out / "budgets.json", options, result | reference_rows(inputs), following)


def print_costs(costs: list[list[BudgetCost]], labels: list[str], device: str) -> None:
    """Prints the FLOPs of each budget, and for each batch size latency and memory."""
    print_table(
        "one forward of one sample, 1 MAC = 2 FLOPs",
        ("budget", "latents", "GFLOPs", "GMACs", "of full"),
        [
            (label, str(c.num_latents), short(c.flops / 1e9), short(c.macs / 1e9), f"{c.flops_ratio:.0%}")
            for label, c in zip(labels, costs[0], strict=True)
        ],
    )
    for rows in costs:
        print_table(
            f"one forward of a batch of {rows[0].batch_size}, on {device}",
            ("budget", "latency (ms)", "quartiles", "of full", "elastic efficiency", "peak memory (MiB)"),
            [
                (
                    *(label, f"{c.latency_ms:.1f}", "{:.1f} to {:.1f}".format(*c.latency_ms_quartiles)),
                    *(f"{c.latency_ratio:.0%}", f"{c.elastic_efficiency:.2f}", f"{c.peak_memory / 2**20:.1f}"),
                )
                for label, c in zip(labels, rows, strict=True)
            ],
        )


def print_losses(losses: list[BudgetLoss], labels: list[str]) -> None:
    """Prints the held-out loss of each budget, if it was measured."""
    if losses:
        print_table(
            "held-out loss, and how far it is above that of full budget on the same noise (95 %)",
            ("budget", "loss", "above full"),
            [
                (label, f"{x.loss:.4f}", f"{x.excess:+.4f} ± {1.96 * x.excess_standard_error:.4f}")
                for label, x in zip(labels, losses, strict=True)
            ],
        )


def draw_figures(
    plots: ModuleType,
    out: Path,
    costs: list[list[BudgetCost]],
    losses: list[BudgetLoss],
    points: list[SamplePoint],
    inputs: Inputs,
) -> None:
    """Draws cost, and as far as they are known loss, quality and samples, against the budget."""
    budgets = [cost.budget for cost in costs[0]]
    relative = {"FLOPs": [c.flops_ratio for c in costs[0]]}
    relative |= {f"latency, batch {rows[0].batch_size}": [c.latency_ratio for c in rows] for rows in costs}
    plots.save(plots.plot_cost(budgets, relative), out / "budgets-cost")
    if losses:
        errors = [each.excess_standard_error for each in losses]
        plots.save(plots.plot_loss(budgets, [each.excess for each in losses], errors), out / "budgets-loss")
    draw_quality(plots, out, "budgets", {"budgets, low to full": points}, inputs.references)
    draw_samples(plots, out, "budgets", points, [plots.budget_label(budget) for budget in budgets])
