"""Does a planned schedule beat one budget for all steps, and fewer steps, at the same FLOPs? One chosen by quality?

    elit train --config configs/train/digits.yaml --out runs/digits
    python experiments/planning.py --model runs/digits
    python experiments/planning.py --model runs/quickstart/run --data scenes

With and without guidance. The plan of least predicted error (``plan``) and the plan that a judge chose among candidates
(``chosen``) stand beside constant budgets and fewer steps; every seed draws other noise, which is never that of the
choice. FLOPs rather than latency, so that the comparison does not depend on how busy the machine is.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import elit
from common import interval
from elit.analysis.calibration import REFERENCE_STEPS, Calibration, calibrate
from elit.analysis.choice import choose
from elit.analysis.environment import environment
from elit.analysis.plan import Plan, baseline_plans, candidate_plans, constant_plan, measure_error, solve
from elit.atomic import write_json
from elit.data import EMBEDDED, open_data
from elit.evaluation import FrechetJudge, Judge, open_extractor, train_classifier

ERROR_SAMPLES = 32  # on which the distance to many steps at full budget is measured
CLASSES = range(10)
METHODS = (
    "full",
    "plan",
    "chosen",
    "constant budget",
    "best constant",
    "best constant by score",
    "fewer steps",
    "cached",
)


def plans_at(
    model: Any, calibration: Calibration, judge: FrechetJudge, limit: float, steps: int, num_samples: int, noise: int
) -> dict[str, Plan]:
    """The plans that are compared at one cost, by method."""
    chosen = choose(
        model,
        CLASSES,
        candidate_plans(calibration, limit, steps, "flops"),
        judge,
        num_samples=num_samples,
        seed=noise,
        batch_size=250,
        progress=True,
    )
    return {
        "plan": solve(calibration, limit, "flops"),
        "chosen": chosen,
        **baseline_plans(calibration, limit, steps, "flops"),
        "best constant by score": best_constant(chosen),
    }


def best_constant(chosen: Plan) -> Plan:
    """The constant budget of the best score among the candidates of a choice, guided as asked and without a cache."""
    assert chosen.choice is not None
    rows = [
        row
        for row in chosen.choice["candidates"]
        if len(set(row["budgets"])) == 1
        and row["cache"] is None
        and (row["guidance"] is None or row["guidance"]["kind"] == "cfg")
    ]
    kept = {key: rows[0][key] for key in ("budgets", "seconds", "flops", "error")}
    guidance = chosen.guidance and replace(chosen.guidance, kind="cfg", budget=None)
    return replace(chosen, **kept, guidance=guidance, cache=None, choice=None)


def measure(
    model: Any, judge: Judge, target: torch.Tensor, plans: Sequence[Plan], seeds: range
) -> list[dict[str, float]]:
    """Quality of each plan's samples from one noise, and the distance of the first of them to the target.

    Plans that are the same are measured once.
    """
    labels = torch.arange(len(seeds)) % len(CLASSES)
    known: list[tuple[dict[str, Any], dict[str, float]]] = []
    for plan in plans:
        arguments = plan.arguments()
        if all(arguments != other for other, _ in known):
            samples = elit.sample(model, labels, seeds=seeds, batch_size=250, **arguments)
            quality = judge(samples, labels)
            error = measure_error(samples[: len(target)], target)
            found = {"error": error, "frechet": quality.frechet_distance, "accuracy": quality.accuracy}
            known.append((arguments, found))
    return [next(found for other, found in known if other == plan.arguments()) for plan in plans]


def run(
    model: Any,
    out: Path,
    steps: int,
    speedups: Sequence[float],
    seeds: int,
    num_samples: int,
    choice_samples: int = 1000,
    scales: Sequence[float] = (1, 2),
    methods: Sequence[str] = METHODS,
    noise: int = 0,
    data: str = "digits",
) -> None:
    """Prints a table for each guidance and cost as soon as it is known, and writes all numbers."""
    train = open_data(data)
    judge = Judge(train_classifier(train), train)
    chooser = FrechetJudge(data, open_extractor(data))
    console, results = Console(width=150), []
    first_seeds = [(1 + seeds * noise + seed) * 10**6 for seed in range(seeds)]
    of_seed = [range(first, first + num_samples) for first in first_seeds]
    for scale in scales:
        guidance = None if scale == 1 else elit.Guidance("cfg", scale)
        calibration = calibrate(model, list(CLASSES), guidance=guidance)
        full, reference = (
            constant_plan(calibration, calibration.tables[0], calibration.levels[-1], n)
            for n in (steps, REFERENCE_STEPS)
        )
        first = torch.arange(min(ERROR_SAMPLES, num_samples)) % len(CLASSES)
        targets = [elit.sample(model, first, seeds=each[: len(first)], **reference.arguments()) for each in of_seed]
        for speedup in speedups:
            plans = plans_at(model, calibration, chooser, full.flops / speedup, steps, choice_samples, noise)
            plans = {"full": full} | plans if speedup == speedups[0] else plans
            plans = {name: plan for name, plan in plans.items() if name in (*methods, "chosen")}
            by_seed = [
                measure(model, judge, target, list(plans.values()), each)
                for target, each in zip(targets, of_seed, strict=True)
            ]
            rows = [
                {
                    "guidance": guidance and guidance.scale,
                    "name": f"1/{speedup:g}: {name}" if name != "full" else f"1: {steps} steps",
                    "budgets": plan.budgets,
                    "weak": plan.guidance and (plan.guidance.kind, plan.guidance.budget),
                    "cache": plan.cache and plan.cache.threshold,
                    "flops": plan.flops,
                    "predicted_error": plan.error,
                    "by_seed": list(found),
                    "choice": plan.choice,
                }
                for (name, plan), found in zip(plans.items(), zip(*by_seed, strict=True), strict=True)
            ]
            console.print(as_table("no guidance" if guidance is None else f"CFG {guidance.scale:g}", rows))
            results += rows
            write_json(out, {"results": results, "environment": environment()})
    console.print(f"all numbers: {out}")


def as_table(title: str, rows: list[dict[str, Any]]) -> Table:
    """Means and 95 % intervals over seeds; distances also above that of the chosen plan, seed by seed."""
    table = Table(title=title, title_justify="left")
    table.add_column("cost: method")
    headings = ("steps", "budget", "weak", "cache", "GFLOPs", "error predicted", "error", "Frechet")
    for heading in (*headings, "above the chosen", "accuracy"):
        table.add_column(heading, justify="right")
    chosen = next(row for row in rows if row["name"].endswith(": chosen"))
    for row in rows:
        low, high = min(row["budgets"]), max(row["budgets"])
        values = {key: [found[key] for found in row["by_seed"]] for key in row["by_seed"][0]}
        above = [a - b["frechet"] for a, b in zip(values["frechet"], chosen["by_seed"], strict=True)]
        table.add_row(
            row["name"],
            str(len(row["budgets"])),
            f"{low:.3g}" if low == high else f"{low:.3g}..{high:.3g}",
            "-" if row["weak"] is None else "same" if row["weak"][1] is None else f"{row['weak'][1]:.3g}",
            "-" if row["cache"] is None else f"{row['cache']:g}",
            f"{row['flops'] / 1e9:.3f}",
            f"{row['predicted_error']:.4f}",
            "{:.4f} ± {:.4f}".format(*interval(values["error"])),
            "{:.1f} ± {:.1f}".format(*interval(values["frechet"])),
            "" if row is chosen else "{:+.1f} ± {:.1f}".format(*interval(above)),
            "{:.1%} ± {:.1%}".format(*interval(values["accuracy"])),
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="runs/digits")
    parser.add_argument("--data", choices=list(EMBEDDED), default="digits", help="of the model, for its judges")
    parser.add_argument("--out", type=Path, default=Path("runs/experiments/planning.json"))
    parser.add_argument("--steps", type=int, default=16, help="of full and of constant budget")
    parser.add_argument("--speedups", type=float, nargs="+", default=[2, 4, 8])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--num-samples", type=int, default=1000, help="of each seed")
    parser.add_argument("--choice-samples", type=int, default=1000, help="of each candidate of a choice by quality")
    parser.add_argument("--guidance-scales", type=float, nargs="+", default=[1, 2], help="1 is no guidance")
    parser.add_argument("--noise", type=int, default=0, help="another one draws other noise, of choices and of seeds")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    options = parser.parse_args()
    run(
        elit.load(options.model),
        options.out,
        options.steps,
        options.speedups,
        options.seeds,
        options.num_samples,
        options.choice_samples,
        options.guidance_scales,
        options.methods,
        options.noise,
        options.data,
    )


if __name__ == "__main__":
    main()
