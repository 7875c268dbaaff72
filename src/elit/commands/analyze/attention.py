"""`elit analyze attention`: where the latents look, beside the loss of every token."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor

from elit.analysis import AttentionCorrelations, AttentionMaps, Interval, correlate, mean_maps
from elit.commands.analyze.output import AnalysisOptions, load_plots, print_table, write_results
from elit.commands.inputs import Inputs, load_inputs, random_indices
from elit.errors import ElitError
from elit.seeding import generator, normal

SERIES = ("attention and loss", "another image's attention and loss", "index of a latent and its entropy")


@dataclass(kw_only=True)
class AttentionOptions(AnalysisOptions):
    """The options of `elit analyze attention`.

    Attributes:
        times: noise levels to look at; noise is 1 and data is 0.
        budget: fraction of the latents; by default all.
        images: number of held-out images, drawn at random; the intervals are over these.
        draws: number of noises for each image, which are averaged.
        seed: seed of the noises.
    """

    data: str = field()
    times: tuple[float, ...] = (0.2, 0.5, 0.8)
    budget: float | None = None
    images: int = 90
    draws: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        if self.images < 2 or self.draws < 1 or not self.times or not all(0 < t < 1 for t in self.times):
            raise ElitError("attention needs at least 2 images, 1 draw, and times between 0 and 1")
        if self.compile:
            raise ElitError("elit analyze attention looks inside a model, where a compiled one is closed: no --compile")


def analyze_attention(options: AttentionOptions) -> dict[str, Any]:
    """Show where the latents look, beside the loss of every token, and correlate the two.

    Returns:
        What attention.json holds.

    Raises:
        ElitError: a wrong option, or a model or data that are not there or do not fit.
    """
    plots = load_plots()
    inputs = load_inputs(options, options.data, options.autoencoder, judged=False)
    x, maps = measure_maps(inputs, options)
    found = [correlate(each) for each in maps]
    print_correlations(found, options.times, len(x))
    draw_correlations(plots, options.out, found, options.times)
    if inputs.shows:
        pictures = (x if inputs.decode is None else inputs.decode(x)).float().cpu()
        draw_maps(plots, options.out, pictures, maps, options.times)
        draw_latents(plots, options.out, pictures, maps, options.times)
    result = {"correlations": [{"time": t, **asdict(each)} for t, each in zip(options.times, found, strict=True)]}
    following = (
        f"elit analyze budgets --model {options.model} --data {options.data}, for what fewer latents cost and give"
    )
    return write_results(options.out / "attention.json", options, result, following)


def measure_maps(inputs: Inputs, options: AttentionOptions) -> tuple[Tensor, list[AttentionMaps]]:
    """Returns held-out images, and for each time the attention and the loss of their tokens."""
    model, held_out = inputs.model, inputs.held_out
    assert held_out is not None
    x, y = held_out.batch(random_indices(held_out, options.images))
    condition = model.as_condition(y) if model.conditional else None
    noises = normal(generator(options.seed, "attention"), (options.draws, *x.shape))
    x, noises = x.to(model.device, model.dtype), noises.to(model.device, model.dtype)
    return x, [mean_maps(model, x, condition, t, noises, options.budget, options.path) for t in options.times]


def print_correlations(found: list[AttentionCorrelations], times: Sequence[float], count: int) -> None:
    """Prints the correlations at each time with their intervals."""
    print_table(
        f"rank correlations within an image, mean over {count} images and 95 % interval",
        ("noise level", "attention and loss", "control: another image's attention", "index and entropy of a latent"),
        [
            (f"{t:g}", *("-" if c is None else f"{c.mean:.2f} ± {c.half_width:.2f}" for c in intervals(each)))
            for t, each in zip(times, found, strict=True)
        ],
    )


def intervals(found: AttentionCorrelations) -> tuple[Interval | None, ...]:
    return found.same_image, found.another_image, found.entropy


def draw_correlations(plots: ModuleType, out: Path, found: list[AttentionCorrelations], times: Sequence[float]) -> None:
    """Draws the correlations against time; those that are not known are left out."""
    columns = zip(*map(intervals, found), strict=True)
    series = {
        name: [(interval.mean, interval.half_width) for interval in column if interval is not None]
        for name, column in zip(SERIES, columns, strict=True)
    }
    figure = plots.plot_correlations(times, {name: values for name, values in series.items() if values})
    plots.save(figure, out / "attention-correlations")


def draw_maps(plots: ModuleType, out: Path, images: Tensor, maps: list[AttentionMaps], times: Sequence[float]) -> None:
    """Draws the attention beside the loss, of a few images."""
    columns = ["image", *(f"{what}\nt = {t:g}" for t in times for what in ("attention", "loss"))]
    rows = [
        ("", images[i], [values for each in maps for values in (each.attention[i].cpu(), each.loss[i].cpu())])
        for i in evenly(len(images), 4)
    ]
    plots.save(plots.plot_maps(rows, columns), out / "attention-maps")


def draw_latents(
    plots: ModuleType, out: Path, images: Tensor, maps: list[AttentionMaps], times: Sequence[float]
) -> None:
    """Draws where the first and the last latents look, of two images."""
    level = maps[0].latents.shape[1]
    shown = sorted({*range(min(3, level)), *range(max(0, level - 3), level)})
    columns = ["image", *(f"latent {j + 1}" for j in shown)]
    rows = [
        (f"t = {t:g}", images[i], [each.latents[i, j].cpu() for j in shown])
        for i in evenly(len(images), 4)[:2]
        for t, each in zip(times, maps, strict=True)
    ]
    plots.save(plots.plot_maps(rows, columns), out / "attention-latents")


def evenly(total: int, count: int) -> list[int]:
    """Returns indices that are spread evenly over 0 to ``total`` - 1."""
    return [i * total // count for i in range(min(count, total))]
