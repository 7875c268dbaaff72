"""What the analyses share: their options, their tables, their figures and their JSON."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from elit.analysis import SamplePoint, SamplerSettings, SweepConfig, sweep
from elit.analysis.environment import environment
from elit.atomic import write_json
from elit.commands.inputs import Inputs
from elit.commands.options import GuidanceOptions, ModelOptions
from elit.commands.sample import PIXELS
from elit.errors import ElitError
from elit.evaluation import Quality

FOLDER = Path("runs/analysis")
QUALITY = {"frechet_distance": "Frechet distance (lower is better)", "accuracy": "class accuracy"}


@dataclass(kw_only=True)
class AnalysisOptions(ModelOptions):
    """What every analysis of a trained model takes.

    Attributes:
        data: a data set with a held-out part, such as digits. Where it has classes, a classifier is trained on the spot
            and judges the samples, so it should be small.
        out: folder for the results: NAME.json and figures.
        autoencoder: a diffusers autoencoder (a folder or a Hub id) that decodes the samples of a model on latents.
    """

    data: str | None = None
    out: Path = FOLDER
    autoencoder: str | None = None


class AnalysisGuidanceOptions(GuidanceOptions):
    """Guidance as in `elit sample`, with a default scale that suits small data."""

    default_scale = 2.0


def load_plots() -> ModuleType:
    """Imports the module that draws figures.

    Raises:
        ElitError: a package that it needs is missing.
    """
    try:
        from elit.analysis import plots
    except ImportError as error:
        raise ElitError(f"figures need {error.name}: pip install 'elit-diffusion[quickstart]'") from error
    return plots


def run_sweep(inputs: Inputs, settings: list[SamplerSettings], config: SweepConfig | None) -> list[SamplePoint]:
    """Draws the samples of every setting behind a progress bar; none without a configuration."""
    if config is None:
        return []
    points = sweep(inputs.model, settings, config, inputs.judge, inputs.decode)
    return list(tqdm(points, "sampling", len(settings), unit="setting", dynamic_ncols=True))


# ------------------------------------------------------------------------------------------------ tables


def print_table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Prints a table whose columns are aligned to the right."""
    table = Table(*head, title=title, title_justify="left", title_style="bold")
    for column in table.columns:
        column.justify = "right"
    table.columns[0].no_wrap = True
    for row in rows:
        table.add_row(*row)
    Console(soft_wrap=True, highlight=False).print(table)


def print_samples(what: str, rows: list[tuple[str, SamplePoint]], references: dict[str, Quality]) -> None:
    """Prints cost and quality of samples; columns that nothing is known for are left out.

    Args:
        what: heading of the labels that rows begin with.
        references: quality of real images, in rows of their own.
    """
    if not rows:
        return
    coloured, judged = rows[0][1].saturation is not None, rows[0][1].quality is not None
    head = [what, "GFLOPs/step", "GFLOPs/image", "s/image"]
    head += ["accuracy", "distance"] if judged else []
    head += ["saturation"] if coloured else []
    lines = []
    for label, point in rows:
        line = [label, short(point.flops_per_step / 1e9), short(point.flops / 1e9), f"{point.seconds:.3g}"]
        line += quality_cells(point.quality) + ([f"{point.saturation:.3f}"] if coloured else [])
        lines.append(line)
    lines += [[f"real, {name}", "", "", "", *quality_cells(quality)] for name, quality in references.items()]
    judge = ", quality as a classifier of the real images sees it" if judged else ""
    print_table(f"samples from the same noise{judge}", head, lines)


def quality_cells(quality: Quality | None) -> list[str]:
    return [] if quality is None else [f"{quality.accuracy:.1%}", f"{quality.frechet_distance:.2f}"]


def short(value: float) -> str:
    """Writes a number with four digits."""
    return f"{value:,.4g}"


def sample_options(setting: SamplerSettings) -> str:
    """Writes a setting as options of `elit sample`."""
    options = [f"--steps {setting.steps}"]
    if setting.budget is not None:
        options.append(f"--budget {setting.budget:g}")
    if setting.guidance is not None:
        options.append(f"--guidance {setting.guidance.kind} --guidance-scale {setting.guidance.scale:g}")
        if setting.guidance.budget is not None:
            options.append(f"--guidance-budget {setting.guidance.budget:g}")
    return " ".join(options)


# ------------------------------------------------------------------------------------------------ figures


def cost_and_distance(point: SamplePoint) -> tuple[float, float]:
    assert point.quality is not None
    return point.flops, point.quality.frechet_distance


def draw_quality(
    plots: ModuleType,
    out: Path,
    name: str,
    series: dict[str, list[SamplePoint]],
    references: dict[str, Quality],
    front: Sequence[SamplePoint] = (),
) -> None:
    """Draws quality against cost, if there was a judge.

    Args:
        front: the Pareto front, which is marked in the figure of distances.
    """
    if not references:
        return
    for measure, title in QUALITY.items():

        def at(points: Iterable[SamplePoint], measure: str = measure) -> list[tuple[float, float]]:
            return [(point.flops / 1e9, getattr(point.quality, measure)) for point in points]

        real = {key: getattr(quality, measure) for key, quality in references.items()}
        lines = {key: at(points) for key, points in series.items()}
        figure = plots.plot_quality(lines, real, title, at(front) if measure == "frechet_distance" else ())
        plots.save(figure, out / f"{name}-{measure.replace('_', '-')}")


def draw_samples(plots: ModuleType, out: Path, name: str, points: list[SamplePoint], labels: list[str]) -> None:
    """Draws the same samples in one row per setting, if they are pictures."""
    if points and points[0].images.dim() == 4 and points[0].images.shape[1] in PIXELS:
        plots.save(plots.plot_overview([list(point.images) for point in points], labels), out / f"{name}-samples")


# ------------------------------------------------------------------------------------------------ JSON


def row_of(point: SamplePoint) -> dict[str, Any]:
    """Returns a point without its images, its quality beside the rest."""
    row = asdict(point)
    del row["images"]
    return row | (row.pop("quality") or {})


def reference_rows(inputs: Inputs) -> dict[str, Any]:
    return {"references": {name: asdict(quality) for name, quality in inputs.references.items()}}


def write_results(file: Path, options: Any, result: dict[str, Any], following: str) -> dict[str, Any]:
    """Writes results with their settings and environment, and prints what to do next.

    Args:
        options: the dataclass of the verb's options.
        following: the command that a user may want next.

    Returns:
        What the file holds.
    """
    result = {"settings": asdict(options), **result, "environment": environment()}
    write_json(file, result, default=str)
    console = Console(soft_wrap=True, highlight=False)
    console.print(f"{file} and figures beside it")
    console.print(f"next: {following}")
    return result
