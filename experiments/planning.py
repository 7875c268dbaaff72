"""Does a planned schedule beat one budget for all steps, and fewer steps, at the same FLOPs?

    elit quickstart
    python experiments/planning.py

On the quickstart's model, with and without guidance; every seed draws other noise. FLOPs rather than latency, so that
the comparison does not depend on how busy the machine is.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import elit
from common import interval
from elit.analysis.calibration import REFERENCE_STEPS, calibrate
from elit.analysis.environment import environment
from elit.analysis.plan import Plan, baseline_plans, constant_plan, measure_error, solve
from elit.atomic import write_json
from elit.data import digits
from elit.evaluation import Judge, train_classifier

ERROR_SAMPLES = 64  # on which the distance to many steps at full budget is measured


def measure(
    model: Any, judge: Judge, reference: Plan, plans: dict[str, Plan], seed: int, count: int
) -> dict[str, dict[str, float]]:
    """Quality of each plan's samples from one noise, and the distance of the first of them to the reference's."""
    labels = torch.arange(count) % 10
    seeds = range((seed + 1) * 10**6, (seed + 1) * 10**6 + count)
    target = elit.sample(model, labels[:ERROR_SAMPLES], seeds=seeds[:ERROR_SAMPLES], **reference.arguments())
    found = {}
    for name, plan in plans.items():
        samples = elit.sample(model, labels, seeds=seeds, batch_size=250, **plan.arguments())
        quality = judge(samples, labels)
        error = measure_error(samples[:ERROR_SAMPLES], target)
        found[name] = {"error": error, "frechet": quality.frechet_distance, "accuracy": quality.accuracy}
    return found


def run(model: Any, out: Path, steps: int, speedups: Sequence[float], seeds: int, num_samples: int) -> None:
    """Prints a table with and without guidance, and writes all numbers."""
    train = digits()
    judge = Judge(train_classifier(train), train)
    console, results = Console(width=150), []
    for guidance in (None, elit.Guidance("cfg", 2.0)):
        calibration = calibrate(model, list(range(10)), guidance=guidance)
        full = partial(constant_plan, calibration, calibration.tables[0], calibration.levels[-1])
        plans = {f"1: {steps} steps": full(steps)}
        for speedup in speedups:
            limit = full(steps).flops / speedup
            plans[f"1/{speedup:g}: plan"] = solve(calibration, limit, "flops")
            others = baseline_plans(calibration, limit, steps, "flops")
            plans |= {f"1/{speedup:g}: {name}": plan for name, plan in others.items()}
        by_seed = [measure(model, judge, full(REFERENCE_STEPS), plans, seed, num_samples) for seed in range(seeds)]
        rows = [
            {
                "guidance": guidance and guidance.scale,
                "name": name,
                "budgets": plan.budgets,
                "weak": plan.guidance and (plan.guidance.kind, plan.guidance.budget),
                "flops": plan.flops,
                "predicted_error": plan.error,
                "by_seed": [found[name] for found in by_seed],
            }
            for name, plan in plans.items()
        ]
        console.print(as_table("no guidance" if guidance is None else f"CFG {guidance.scale:g}", rows))
        results += rows
        write_json(out, {"results": results, "environment": environment()})
    console.print(f"all numbers: {out}")


def as_table(title: str, rows: list[dict[str, Any]]) -> Table:
    """Means and 95 % intervals over seeds; distances also above that of the plan of the same cost, seed by seed."""
    table = Table(title=title, title_justify="left")
    table.add_column("cost: method")
    for heading in ("steps", "budget", "GFLOPs", "error predicted", "error", "Frechet", "above the plan's", "accuracy"):
        table.add_column(heading, justify="right")
    of = {row["name"]: row for row in rows}
    for row in rows:
        low, high = min(row["budgets"]), max(row["budgets"])
        values = {key: [found[key] for found in row["by_seed"]] for key in row["by_seed"][0]}
        plan = of.get(row["name"].partition(":")[0] + ": plan", row)
        above = [a - b["frechet"] for a, b in zip(values["frechet"], plan["by_seed"], strict=True)]
        table.add_row(
            row["name"],
            str(len(row["budgets"])),
            f"{low:.3g}" if low == high else f"{low:.3g}..{high:.3g}",
            f"{row['flops'] / 1e9:.3f}",
            f"{row['predicted_error']:.4f}",
            "{:.4f} ± {:.4f}".format(*interval(values["error"])),
            "{:.1f} ± {:.1f}".format(*interval(values["frechet"])),
            "" if plan is row else "{:+.1f} ± {:.1f}".format(*interval(above)),
            "{:.1%} ± {:.1%}".format(*interval(values["accuracy"])),
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="runs/quickstart/run")
    parser.add_argument("--out", type=Path, default=Path("runs/experiments/planning.json"))
    parser.add_argument("--steps", type=int, default=16, help="of full and of constant budget")
    parser.add_argument("--speedups", type=float, nargs="+", default=[2, 4, 8])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--num-samples", type=int, default=1000)
    options = parser.parse_args()
    run(elit.load(options.model), options.out, options.steps, options.speedups, options.seeds, options.num_samples)


if __name__ == "__main__":
    main()
