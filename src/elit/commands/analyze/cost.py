"""`elit analyze cost`: the closed formula for FLOPs beside what PyTorch counts."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from elit.analysis import Cost, Part, closed_form, count_flops
from elit.commands.analyze.output import FOLDER, load_plots, print_table, short, write_results
from elit.commands.info import read_shapes
from elit.commands.inputs import halved_budgets, resolve_budgets


@dataclass(kw_only=True)
class CostOptions:
    """The options of `elit analyze cost`.

    Attributes:
        model: a name like ELIT-SiT-XL/2, a run directory, a saved model, a published .pt file or a Hub id.
        out: folder for the results: cost.json and the figure.
        resolution: pixels of a side, for named models; by default 256.
        fields: fields of the configuration of a named model to change, such as {depth: 12, group_size: 8}.
        budgets: fractions of the latents; by default 1/16, 1/8, 1/4, 1/2 and 1, as far as the model has them.
    """

    model: str
    out: Path = FOLDER
    resolution: int | None = None
    fields: dict[str, Any] | None = None
    budgets: list[float] | None = None


def analyze_cost(options: CostOptions) -> dict[str, Any]:
    """Put the closed formula for the FLOPs of a forward beside what PyTorch counts; no weights are needed.

    Returns:
        What cost.json holds.

    Raises:
        ElitError: it is neither a name nor a model, or wrong options.
    """
    plots = load_plots()
    model = read_shapes(options.model, options.resolution, options.fields)
    budgets = resolve_budgets(model, options.budgets or halved_budgets(model))
    counted = [count_flops(model, budget) for budget in budgets]
    parts = [closed_form(model.config, cost.num_latents) for cost in counted]
    print_costs(counted, parts, [plots.budget_label(budget) for budget in budgets])
    print_parts(parts[-1])
    stacks = {part.name: [2 * each[i].macs / 1e9 for each in parts] for i, part in enumerate(parts[-1])}
    plots.save(plots.plot_parts(budgets, stacks, "GFLOPs"), options.out / "cost-parts")
    result = {
        "config": asdict(model.config),
        "budgets": [
            {
                "budget": budget,
                "num_latents": cost.num_latents,
                "formula_flops": total_flops(each),
                "counted_flops": cost.flops,
                "counted_macs": cost.macs,
                "parts": [asdict(part) for part in each],
            }
            for budget, cost, each in zip(budgets, counted, parts, strict=True)
        ],
    }
    following = "elit analyze budgets --model RUN, for how long a trained model takes"
    return write_results(options.out / "cost.json", options, result, following)


def total_flops(parts: list[Part]) -> int:
    return 2 * sum(part.macs for part in parts)


def print_costs(counted: list[Cost], parts: list[list[Part]], labels: list[str]) -> None:
    """Prints formula and count at each budget."""
    rows = []
    for label, cost, each in zip(labels, counted, parts, strict=True):
        total = total_flops(each)
        row = [label, str(cost.num_latents or "-"), short(total / 1e9), short(cost.flops / 1e9)]
        rows.append([*row, f"{total / cost.flops - 1:.3%}", short(cost.macs / 1e9)])
    head = ("budget", "latents", "GFLOPs, formula", "GFLOPs, counted", "difference", "GMACs, counted")
    print_table("one forward of one sample, 1 MAC = 2 FLOPs", head, rows)


def print_parts(parts: list[Part]) -> None:
    """Prints what each part of the model takes at full budget."""
    total = total_flops(parts)
    rows = [(p.name, f"{p.tokens:,}", short(2 * p.macs / 1e9), f"{2 * p.macs / total:.1%}") for p in parts]
    print_table("parts at full budget", ("part", "tokens", "GFLOPs", "share"), rows)
