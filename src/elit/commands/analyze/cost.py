"""`elit analyze cost`: the FLOPs of a forward and of its parts."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from elit.analysis import Flops, count_flops
from elit.commands.analyze.output import FOLDER, load_plots, print_table, short, write_results
from elit.commands.budgets import halved_budgets, resolve_budgets
from elit.commands.info import read_shapes


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
    """Count the FLOPs of a forward and of its parts at every budget; no weights are needed.

    Returns:
        What cost.json holds.

    Raises:
        ElitError: it is neither a name nor a model, or wrong options.
    """
    plots = load_plots()
    model = read_shapes(options.model, options.resolution, options.fields)
    budgets = resolve_budgets(model, options.budgets or halved_budgets(model))
    levels = [model.level(budget) for budget in budgets]
    counted = [count_flops(model.config, level) for level in levels]
    print_costs(levels, counted, [plots.budget_label(budget) for budget in budgets])
    stacks = {part: [getattr(cost, part) / 1e9 for cost in counted] for part in Flops._fields}
    plots.save(plots.plot_parts(budgets, stacks, "GFLOPs"), options.out / "cost-parts")
    result = {
        "config": asdict(model.config),
        "budgets": [
            {"budget": budget, "num_latents": level, "flops": cost.total, "macs": cost.macs, "parts": cost._asdict()}
            for budget, level, cost in zip(budgets, levels, counted, strict=True)
        ],
    }
    following = "elit analyze budgets --model RUN, for how long a trained model takes"
    return write_results(options.out / "cost.json", options, result, following)


def print_costs(levels: list[int], counted: list[Flops], labels: list[str]) -> None:
    """Prints what a forward and each of its parts cost at each budget."""
    rows = [
        (label, str(level or "-"), *(short(each / 1e9) for each in (cost.total, *cost, cost.macs)))
        for label, level, cost in zip(labels, levels, counted, strict=True)
    ]
    head = ("budget", "latents", "GFLOPs", *Flops._fields, "GMACs")
    print_table("one forward of one sample, 1 MAC = 2 FLOPs", head, rows)
