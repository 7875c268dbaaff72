"""Figures. Colours are those of Okabe & Ito, for colour-blind readers; markers differ, for grey prints."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

mpl.use("Agg")

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from elit.atomic import atomic_file

BLUE, ORANGE, GREEN, VERMILION, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#777777"
SKY, PURPLE, BLACK = "#56B4E9", "#CC79A7", "#000000"
STYLES = [(BLUE, "o"), (ORANGE, "s"), (GREEN, "^"), (VERMILION, "D"), (SKY, "v"), (PURPLE, "P"), (BLACK, "X")]
STYLE: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "savefig.dpi": 150,
}


def budget_label(budget: float) -> str:
    """Writes a budget as ``1/16`` for 0.0625, ``1`` for 1.0, otherwise up to three digits."""
    inverse = 1 / budget
    if abs(inverse - round(inverse)) < 1e-9:
        return "1" if round(inverse) == 1 else f"1/{round(inverse)}"
    return f"{budget:.3g}"


def save(figure: Figure, path: Path) -> None:
    """Writes a figure as PNG and, beside it, as SVG."""
    for target in (path.with_suffix(".png"), path.with_suffix(".svg")):
        with atomic_file(target) as temporary:
            figure.savefig(temporary, bbox_inches="tight")
    plt.close(figure)


HALVES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)


def _budget_axis(axes: Axes, budgets: Sequence[float]) -> None:
    """Puts ticks at all of a few budgets, and of many at the halves of full budget."""
    shown = budgets if len(budgets) <= 6 else [b for b in budgets if b in HALVES]
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(shown), [budget_label(b) for b in shown])
    axes.minorticks_off()
    axes.set_xlabel("budget (fraction of latents)")


@mpl.rc_context(STYLE)
def plot_cost(budgets: Sequence[float], series: Mapping[str, Sequence[float]]) -> Figure:
    """Draws cost relative to full budget, one line per measure."""
    figure, axes = plt.subplots(figsize=(5, 3.4))
    for (name, values), (colour, marker) in zip(series.items(), cycle(STYLES), strict=False):
        axes.plot(budgets, values, color=colour, marker=marker, label=name)
    _budget_axis(axes, budgets)
    axes.set_ylabel("cost of a forward, relative to full")
    axes.set_ylim(0, 1.1 * max(1, *(max(values) for values in series.values())))
    axes.legend(loc="lower right")
    return figure


@mpl.rc_context(STYLE)
def plot_loss(budgets: Sequence[float], excess: Sequence[float], errors: Sequence[float]) -> Figure:
    """Draws the held-out loss above that of full budget, with 95 % intervals."""
    figure, axes = plt.subplots(figsize=(5, 3.4))
    axes.errorbar(budgets, excess, yerr=[1.96 * e for e in errors], color=BLUE, marker="o", capsize=3)
    axes.axhline(0, color=GREY, linewidth=0.8)
    _budget_axis(axes, budgets)
    axes.set_ylabel("held-out loss minus that of full budget")
    return figure


@mpl.rc_context(STYLE)
def plot_quality(
    series: Mapping[str, Sequence[tuple[float, float]]],
    references: Mapping[str, float],
    ylabel: str,
    front: Sequence[tuple[float, float]] = (),
) -> Figure:
    """Draws quality against cost: (GFLOPs per image, value) points per series, with horizontal references.

    Args:
        front: points of the Pareto front, joined by a broad line.
    """
    figure, axes = plt.subplots(figsize=(5, 3.4))
    if front:
        axes.plot(*zip(*front, strict=True), color=GREY, alpha=0.35, linewidth=7, label="Pareto front")
    for (name, points), (colour, marker) in zip(series.items(), cycle(STYLES), strict=False):
        cost, value = zip(*points, strict=True)
        axes.plot(cost, value, color=colour, marker=marker, label=name)
    for (name, level), dash in zip(references.items(), ("--", ":"), strict=False):
        axes.axhline(level, color=GREY, linestyle=dash, linewidth=1, label=f"real: {name}")
    axes.set_xlim(left=0)
    axes.set_xlabel("cost of an image (GFLOPs, all sampling steps)")
    axes.set_ylabel(ylabel)
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2)
    return figure


@mpl.rc_context(STYLE)
def plot_scales(series: Mapping[str, Sequence[tuple[float, float]]], unguided: float, ylabel: str) -> Figure:
    """Draws a measure against the guidance scale: (scale, value) points per kind, and a line for no guidance."""
    figure, axes = plt.subplots(figsize=(5, 3.4))
    for (name, points), (colour, marker) in zip(series.items(), cycle(STYLES), strict=False):
        axes.plot(*zip(*points, strict=True), color=colour, marker=marker, label=name)
    axes.axhline(unguided, color=GREY, linestyle="--", linewidth=1, label="no guidance")
    axes.set_xticks(sorted({scale for points in series.values() for scale, _ in points}))
    axes.set_xlabel("guidance scale")
    axes.set_ylabel(ylabel)
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2)
    return figure


@mpl.rc_context(STYLE)
def plot_parts(budgets: Sequence[float], parts: Mapping[str, Sequence[float]], unit: str) -> Figure:
    """Draws stacked bars of what each part of a forward costs at each budget."""
    figure, axes = plt.subplots(figsize=(5, 3.4))
    shades = dict(zip(parts, mpl.colormaps["cividis"](np.linspace(0, 1, len(parts))), strict=True))
    bottom = np.zeros(len(budgets))
    for name, values in parts.items():
        axes.bar(range(len(budgets)), values, bottom=bottom, color=shades[name], label=name, edgecolor="white")
        bottom += values
    axes.set_xticks(range(len(budgets)), [budget_label(b) for b in budgets])
    axes.set_xlabel("budget (fraction of latents)")
    axes.set_ylabel(f"cost of a forward ({unit})")
    axes.grid(axis="x", visible=False)
    axes.set_axisbelow(True)
    handles, names = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], names[::-1], fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


@mpl.rc_context(STYLE | {"axes.grid": False})
def plot_image_table(images: Sequence[Sequence[Tensor]], columns: Sequence[str], title: str) -> Figure:
    """Shows grey or RGB images (C, H, W) in [-1, 1]: one column per heading."""
    rows = len(images)
    size = (0.9 * len(columns), 0.9 * rows + 0.55)
    figure, axes = plt.subplots(rows, len(columns), figsize=size, squeeze=False)
    for row, line in enumerate(images):
        for column, image in enumerate(line):
            _show(axes[row][column], image)
    for column, heading in enumerate(columns):
        axes[0][column].set_title(heading, fontsize=9)
    figure.suptitle(title, fontsize=10, y=0.995)
    figure.subplots_adjust(0, 0, 1, 1 - 0.55 / size[1], wspace=0.04, hspace=0.04)
    return figure


@mpl.rc_context(STYLE | {"axes.grid": False})
def plot_overview(rows: Sequence[Sequence[Tensor]], labels: Sequence[str]) -> Figure:
    """Shows images (C, H, W) in [-1, 1]: one labelled row per budget, or whatever else differs."""
    gap = max(1, rows[0][0].shape[-1] // 24)
    tiles = [torch.stack([F.pad(image, (gap, 0, gap, 0), value=1.0) for image in row]) for row in rows]
    picture = torch.cat([torch.cat(tuple(row), dim=2) for row in tiles], dim=1)  # one picture: axes are slow
    height = tiles[0].shape[2]
    figure, axes = plt.subplots(figsize=(0.75 * len(rows[0]), 0.75 * len(rows)))
    _show(axes, picture)
    axes.set_yticks([height * (row + 0.5) for row in range(len(rows))], labels, fontsize=9)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.subplots_adjust(0, 0, 1, 1)
    return figure


@mpl.rc_context(STYLE | {"axes.grid": False})
def plot_attention(
    images: Tensor, attention: Tensor, loss: Tensor, correlations: Mapping[str, tuple[float, float]]
) -> Figure:
    """Shows images with Read attention and loss per token, beside mean rank correlations with 95 % half-widths."""
    count = len(images)
    figure = plt.figure(figsize=(1.05 * count + 3.4, 3.4))
    halves = figure.add_gridspec(1, 2, width_ratios=[1.05 * count, 2.2], wspace=0.25)
    cells = halves[0].subgridspec(3, count, wspace=0.05, hspace=0.05)
    for row, (name, maps, colours) in enumerate(
        (("image", images[:, 0], "gray"), ("attention", attention, "cividis"), ("loss", loss, "cividis"))
    ):
        for column in range(count):
            axes = figure.add_subplot(cells[row, column])
            axes.imshow(maps[column].numpy(), cmap=colours)
            axes.set_xticks([])
            axes.set_yticks([])
            if column == 0:
                axes.set_ylabel(name)
    bars = figure.add_subplot(halves[1])
    names = list(correlations)
    means, widths = zip(*correlations.values(), strict=True)
    bars.bar(range(len(names)), means, yerr=widths, color=[BLUE, GREY][: len(names)], capsize=4, width=0.6)
    bars.set_xticks(range(len(names)), names, fontsize=8)
    bars.set_ylabel("rank correlation with the loss", fontsize=9)
    bars.axhline(0, color="black", linewidth=0.8)
    return figure


@mpl.rc_context(STYLE | {"axes.grid": False})
def plot_maps(rows: Sequence[tuple[str, Tensor, Sequence[Tensor]]], columns: Sequence[str]) -> Figure:
    """Shows an image (C, H, W) and maps (h, w) in each labelled row; each map has its own range, dark is low."""
    figure, cells = plt.subplots(len(rows), len(columns), figsize=(len(columns), 1.02 * len(rows)), squeeze=False)
    for (label, image, maps), line in zip(rows, cells, strict=True):
        _show(line[0], image)
        line[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)
        for axes, values in zip(line[1:], maps, strict=True):
            axes.imshow(values.numpy(), cmap="cividis")
            axes.set_xticks([])
            axes.set_yticks([])
    for axes, heading in zip(cells[0], columns, strict=True):
        axes.set_title(heading, fontsize=9)
    figure.subplots_adjust(0, 0, 1, 1, wspace=0.05, hspace=0.05)
    return figure


@mpl.rc_context(STYLE)
def plot_correlations(times: Sequence[float], series: Mapping[str, Sequence[tuple[float, float]]]) -> Figure:
    """Draws rank correlations (mean, half-width of the interval) against the noise level."""
    figure, axes = plt.subplots(figsize=(5, 3.4))
    for (name, points), (colour, marker) in zip(series.items(), cycle(STYLES), strict=False):
        means, widths = zip(*points, strict=True)
        axes.errorbar(times, means, yerr=widths, color=colour, marker=marker, capsize=3, label=name)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_ylim(-1.05, 1.05)
    axes.set_xlabel("noise level t (1 is noise)")
    axes.set_ylabel("rank correlation")
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.18))
    return figure


@mpl.rc_context(STYLE)
def plot_plan(schedules: Mapping[str, Sequence[float]]) -> Figure:
    """Draws budgets of equal steps from noise to data, one staircase per schedule."""
    figure, axes = plt.subplots(figsize=(5.5, 3.4))
    for (name, budgets), (colour, _), dash in zip(schedules.items(), STYLES, ("-", "--", ":", "-."), strict=False):
        times = [1 - step / len(budgets) for step in range(len(budgets) + 1)]
        label = f"{name}: {len(budgets)} steps"
        axes.stairs(
            list(budgets)[::-1], times[::-1], baseline=None, color=colour, linestyle=dash, linewidth=1.8, label=label
        )
    axes.set_xlim(1, 0)
    axes.set_ylim(0, 1.05)
    axes.set_xlabel("noise level t (1 is noise, 0 is data)")
    axes.set_ylabel("budget (fraction of latents)")
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2)
    return figure


def _show(axes: Axes, image: Tensor) -> None:
    pixels = (image.clamp(-1, 1) + 1) / 2
    axes.imshow(pixels.permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1)
    axes.set_xticks([])
    axes.set_yticks([])
