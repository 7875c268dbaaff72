"""The quickstart's page: pictures and tables with captions, in one HTML file that needs nothing beside it."""

import base64
from html import escape
from pathlib import Path
from typing import Any

from elit.analysis import plots
from elit.analysis.plots import budget_label
from elit.atomic import atomic_file

GUIDANCE_NAMES = {"none": "no guidance", "cfg": "CFG", "ccfg": "CCFG (weak term at 1/16)"}


def write_report(out: Path, results: dict[str, Any], pictures: dict[str, Any]) -> Path:
    """Draws all figures into ``out`` and writes ``report.html`` there."""
    draw_figures(out, results, pictures)
    path = out / "report.html"
    with atomic_file(path) as temporary:
        temporary.write_text(page(out, results), encoding="utf-8")
    return path


def draw_figures(out: Path, results: dict[str, Any], pictures: dict[str, Any]) -> None:
    """PNG and SVG of every figure."""
    costs, losses, quality = results["costs"], results["held_out_loss"], results["quality"]
    budgets = [row["budget"] for row in costs]
    headings = [budget_label(b) for b in budgets]
    for name, grid in pictures["grids"].items():
        table = [list(row) for row in zip(*grid, strict=True)]  # one row per image, one column per budget
        plots.save(plots.plot_image_table(table, headings, GUIDANCE_NAMES[name]), out / f"samples-{name}")
    shares = ["all latents" if b == 1 else f"{budget_label(b)} of the latents" for b in budgets]
    labels = [f"{share}\n{row['flops_ratio']:.0%} of the FLOPs" for share, row in zip(shares, costs, strict=True)]
    plots.save(plots.plot_overview(pictures["grids"]["cfg"], labels), out / "overview")
    relative = {
        "FLOPs": [row["flops_ratio"] for row in costs],
        "latency": [row["latency_ratio"] for row in costs],
    }
    plots.save(plots.plot_cost(budgets, relative), out / "budget-cost")
    errors = [row["excess_standard_error"] for row in losses]
    plots.save(plots.plot_loss(budgets, [row["excess"] for row in losses], errors), out / "budget-loss")
    for measure, label in (("frechet_distance", "Frechet distance (lower is better)"), ("accuracy", "class accuracy")):
        series = {
            GUIDANCE_NAMES[name]: [(row["flops_per_image"] / 1e9, row[measure]) for row in rows]
            for name, rows in quality.items()
        }
        references = {name: row[measure] for name, row in results["references"].items()}
        plots.save(plots.plot_quality(series, references, label), out / f"quality-{measure.replace('_', '-')}")
    images, attention, loss = pictures["attention"]
    bars = {name: (row["mean"], row["half_width"]) for name, row in results["attention"].items()}
    shown = slice(0, 90, 11)
    plots.save(plots.plot_attention(images[shown], attention[shown], loss[shown], bars), out / "attention")


# ------------------------------------------------------------------------------------------------ tables


def cost_table(results: dict[str, Any]) -> str:
    """Tabulates FLOPs, latency and held-out loss of each budget."""
    head = ["budget", "latents per window", "MFLOPs", "MMACs", "latency (ms)", "quartiles (ms)", "FLOPs", "latency"]
    head += ["elastic efficiency", "held-out loss", "above full"]
    rows = []
    for cost, loss in zip(results["costs"], results["held_out_loss"], strict=True):
        low, high = cost["latency_ms_quartiles"]
        rows.append(
            [
                budget_label(cost["budget"]),
                str(cost["num_latents"]),
                f"{cost['flops'] / 1e6:.1f}",
                f"{cost['macs'] / 1e6:.1f}",
                f"{cost['latency_ms']:.1f}",
                f"{low:.1f} to {high:.1f}",
                f"{cost['flops_ratio']:.0%}",
                f"{cost['latency_ratio']:.0%}",
                f"{cost['elastic_efficiency']:.2f}",
                f"{loss['loss']:.4f}",
                f"{loss['excess']:+.4f} ± {1.96 * loss['excess_standard_error']:.4f}",
            ]
        )
    return _table(head, rows)


def quality_table(results: dict[str, Any]) -> str:
    """Tabulates the quality of samples for each guidance and budget, and that of real images."""
    head = ["guidance", "budget", "GFLOPs per image", "class accuracy", "Frechet distance"]
    rows = [
        [
            GUIDANCE_NAMES[name],
            budget_label(row["budget"]),
            f"{row['flops_per_image'] / 1e9:.2f}",
            f"{row['accuracy']:.1%}",
            f"{row['frechet_distance']:.2f}",
        ]
        for name, of_budget in results["quality"].items()
        for row in of_budget
    ]
    rows += [
        [f"real {name}", "", "", f"{row['accuracy']:.1%}", f"{row['frechet_distance']:.2f}"]
        for name, row in results["references"].items()
    ]
    return _table(head, rows)


def copying_table(results: dict[str, Any]) -> str:
    """Tabulates how far samples and held-out images are from the nearest training image."""
    copying = results["copying"]
    head = ["", "distance to the nearest training image", "nearer than 99 % of held-out images"]
    near = copying["samples nearer than 99 % of held-out images"]
    rows = [["samples", f"{copying['samples']:.3f}", f"{near:.1%}"]]
    rows += [["held-out images", f"{copying['held-out images']:.3f}", "1.0%"]]
    return _table(head, rows)


def _table(head: list[str], rows: list[list[str]]) -> str:
    def line(cells: list[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return "<table>" + line(head, "th") + "".join(line(row, "td") for row in rows) + "</table>"


# ------------------------------------------------------------------------------------------------ the page

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: 0; } h2 { margin-top: 2.2rem; border-bottom: 1px solid #ddd; } .lead { font-size: 1.1rem; }
table { border-collapse: collapse; font-size: 0.85rem; margin: 1rem 0; } img { max-width: 100%; }
th, td { padding: 0.25rem 0.6rem; text-align: right; border-bottom: 1px solid #e5e5e5; }
th { font-weight: 600; vertical-align: bottom; } td:first-child, th:first-child { text-align: left; }
.row { display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start; } .row img { flex: 1 1 17rem; min-width: 0; }
.grids img { max-width: 19rem; } footer { color: #666; font-size: 0.85rem; margin-top: 2.5rem; }
"""


def conclusion(results: dict[str, Any]) -> str:
    """Says in a sentence what a quarter of the latents costs and gives."""
    index = next(i for i, row in enumerate(results["costs"]) if row["budget"] == 1 / 4)
    cost, losses = results["costs"][index], results["held_out_loss"]
    above = losses[index]["loss"] / losses[-1]["loss"] - 1
    return (
        f"With a quarter of the latents a forward takes {cost['flops_ratio']:.0%} of the FLOPs and "
        f"{cost['latency_ratio']:.0%} of the time of all of them, and the held-out loss is {abs(above):.0%} "
        f"{'higher' if above >= 0 else 'lower'}."
    )


def page(out: Path, results: dict[str, Any]) -> str:
    """The HTML of the report; figures are read from ``out``."""

    def figure(name: str, alt: str) -> str:
        data = base64.b64encode((out / f"{name}.png").read_bytes()).decode()
        return f'<img alt="{escape(alt)}" src="data:image/png;base64,{data}">'

    training, environment, protocol = results["training"], results["environment"], results["protocol"]
    config = training["config"]
    time = f" in {training['seconds'] / 60:.1f} minutes" if training["seconds"] else ""
    grids = "".join(figure(f"samples-{name}", f"samples, {long}") for name, long in GUIDANCE_NAMES.items())
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>ELIT quickstart</title>
<style>{STYLE}</style>
<h1>One set of weights, many budgets</h1>
<p class="lead">An elastic diffusion transformer with {training["parameters"] / 1e6:.2f} M parameters, trained on scenes
of real handwritten digits for {config["steps"]:,} steps{time}. Each column below is the
same model and the same noise; only the fraction of latents in use differs.</p>
<p class="lead">{conclusion(results)}</p>
<div class="row grids">{grids}</div>
<h2>What each budget costs</h2>
<div class="row">{figure("budget-cost", "FLOPs and latency against budget")}
{figure("budget-loss", "held-out loss against budget")}</div>
{cost_table(results)}
<p>One forward; FLOPs of one image, latency of a batch of {protocol["latency_batch"]} (median of 30, all budgets in
turns). Elastic efficiency is the share of the latency over the share of the FLOPs: 1 means that time falls exactly as
FLOPs do. The loss is on held-out scenes with the same noise for every budget. 1 MAC = 2 FLOPs. Intervals are 95 %.</p>
<h2>What each budget gives</h2>
<div class="row">{figure("quality-frechet-distance", "Frechet distance against cost")}
{figure("quality-accuracy", "class accuracy against cost")}</div>
{quality_table(results)}
<p><b>Class accuracy</b> is how often a classifier sees the digit that was asked for, <b>Frechet distance</b> how far
the features of samples are from those of real images, so that less is better. <b>CFG</b> (classifier-free guidance)
moves every step away from what the model would do without a class, and <b>CCFG</b> from what it would do without one at
its lowest budget, which costs less.</p>
<p>{protocol["samples_per_setting"]:,} samples per row, {protocol["sampling_steps"]} Euler steps, guidance scale
{protocol["guidance_scale"]:g}; features: {escape(protocol["features"])}.</p>
<h2>Samples and training images</h2>{copying_table(results)}
<p>Medians over {protocol["samples_per_setting"]:,} samples, root mean square of pixels in [-1, 1]. Samples that were
copies of whole training images would be far nearer to them than held-out images are. Single digits may still be copies
in another place, which this does not see.</p>
<h2>Where the latents look</h2>{figure("attention", "Read attention beside the loss of every token")}
<p>Attention that each token receives from the latents of its window, and its loss, both averaged over noises at
t = 0.5, on held-out scenes. Bars: rank correlation of the two within an image, and as a control with the attention of
another image; error bars are 95 % intervals over images.</p>
<footer>elit quickstart --seed {config["seed"]} &middot; elit {environment["elit"]}, torch {environment["torch"]},
{environment["cores"]} cores, {environment["threads"]} threads &middot; {environment["date"]} &middot; numbers in
results.json</footer></html>
"""
