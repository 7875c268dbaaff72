"""`elit evaluate`: scores of samples against a reference; statistics of a reference; results side by side."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table

from elit.atomic import write_json
from elit.commands.options import DeviceOptions
from elit.commands.processes import Process, this_process
from elit.errors import ElitError
from elit.evaluation.extractors import Extractor, Resize, open_extractor
from elit.evaluation.features import CachedFeatures
from elit.evaluation.image_set import open_image_set
from elit.evaluation.scores import differences, open_reference, save_reference, score

ExtractorName = Literal["inception", "dinov2", "scenes", "digits", "digits8"]
DIGITS = 6  # of a number in a table


@dataclass(kw_only=True)
class ExtractorOptions(DeviceOptions):
    """Which network computes the features that images are compared by.

    Attributes:
        extractor: inception for FID and its kin, dinov2 for FDD, or the classifier of a data set.
        weights: file or folder of the weights of the extractor; by default those in the cache.
        fdd_resize: how images are brought to the 224 pixels of dinov2: pil in bytes, as dgm-eval does, or float.
        threads: number of CPU threads of a process. Scores repeat to the last bit with the same number; with one,
            precision and recall of 50,000 images take minutes to a quarter of an hour, and more are faster.
    """

    extractor: ExtractorName = "inception"
    weights: str | None = None
    fdd_resize: Resize = "pil"
    threads: int = 1

    def open_extractor(self, device: torch.device) -> Extractor:
        """Loads the network.

        Raises:
            ElitError: its weights are missing or damaged.
        """
        return open_extractor(self.extractor, self.weights, self.fdd_resize, device)


@dataclass(kw_only=True)
class ScoreOptions(ExtractorOptions):
    """The options of `elit evaluate samples`.

    Attributes:
        samples: a folder or zip of images, a .npz, or an embedded data set (scenes, scenes:held-out).
        reference: the same, or statistics: a .npz of the ADM suite or of elit evaluate reference.
        out: the .json file for scores and protocol.
    """

    samples: str
    reference: str
    out: Path = Path("scores.json")


@dataclass
class ReferenceOptions(ExtractorOptions):
    """The options of `elit evaluate reference`.

    Attributes:
        source: a folder or zip of images, a .npz with arr_0, or an embedded data set.
        out: the .npz file to write.

    Raises:
        ElitError: ``out`` is no .npz file.
    """

    source: str
    out: Path

    def __post_init__(self) -> None:
        self.out = Path(self.out)
        if self.out.suffix != ".npz":
            raise ElitError(f"out is {self.out}; it must be a .npz file")


def evaluate_samples(options: ScoreOptions) -> dict[str, Any] | None:
    """Score samples against a reference: FID, sFID, IS, precision, recall and KID, or FDD.

    Start it with torchrun or accelerate launch to use several GPUs. Features are kept in $ELIT_CACHE (by default
    ~/.cache/elit).

    Returns:
        Scores, protocol and warnings; None where other processes have not finished their share (the last one scores).

    Raises:
        ElitError: images, a reference or weights that are missing or damaged, or do not belong together.
    """
    process = this_process(options.device, options.threads)
    extractor = options.open_extractor(process.device)
    against = open_reference(options.reference, extractor)
    ours = CachedFeatures(open_image_set(options.samples), extractor)
    theirs = CachedFeatures(against.images, extractor) if against.images else None
    both = [ours] if theirs is None else [ours, theirs]
    if not compute_features(both, process):
        return None
    result = score(ours, against, theirs)
    write_json(options.out, result)
    console = Console(soft_wrap=True, highlight=False)
    print_scores([result], [options.samples])
    for warning in result["warnings"]:
        console.print(f"[yellow]{warning}[/yellow]")
    console.print(f"scores and protocol in {options.out}")
    console.print(f"next: elit evaluate compare {options.out} OTHER.json")
    return result


def evaluate_reference(options: ReferenceOptions) -> Path | None:
    """Write the statistics of reference images, in the layout of the ADM suite.

    Returns:
        The file; None where other processes have not finished their share (the last one writes).

    Raises:
        ElitError: images or weights that are missing or damaged, or a file that cannot be written.
    """
    process = this_process(options.device, options.threads)
    features = CachedFeatures(open_image_set(options.source), options.open_extractor(process.device))
    if not compute_features([features], process):
        return None
    save_reference(features, options.out)
    console = Console(soft_wrap=True, highlight=False)
    console.print(f"statistics of {features.images.count:,} images in {options.out}")
    console.print(f"next: elit evaluate --samples SAMPLES --reference {options.out}")
    return options.out


def evaluate_compare(results: list[Path]) -> list[str]:
    """Print results side by side, and why any two of them are not comparable.

    Args:
        results: .json files of elit evaluate.

    Returns:
        The reasons, one sentence each.

    Raises:
        ElitError: fewer than two, or a file that is no result.
    """
    if len(results) < 2:
        raise ElitError("give at least two results to compare")
    found = [read_result(Path(path)) for path in results]
    names = [str(path) for path in results]
    print_scores(found, names)
    reasons = differences(found, names)
    console = Console(soft_wrap=True, highlight=False)
    for reason in reasons or ["comparable: the same extractor, weights, resizing, reference, counts and definitions"]:
        console.print(reason)
    return reasons


def compute_features(parts: list[CachedFeatures], process: Process) -> bool:
    """Computes this process's share of the features, and returns whether it is the one to go on with all of them."""
    began_complete = not any(part.missing() for part in parts)
    for part in parts:
        part.compute(process.owns, progress=process.rank == 0)
    if began_complete:
        return process.rank == 0
    return not any(part.missing() for part in parts)


def read_result(path: Path) -> dict[str, Any]:
    """Reads a file of `elit evaluate`.

    Raises:
        ElitError: it cannot be read, or is something else.
    """
    try:
        result = json.loads(path.read_text())
        result["scores"], result["protocol"]["extractor"]
    except OSError as error:
        raise ElitError(f"cannot read {path} ({error.strerror})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ElitError(f"{path} is no result of elit evaluate") from error
    return result


def print_scores(results: list[dict[str, Any]], names: list[str]) -> None:
    """Prints one column of scores for each result."""
    titles = list(dict.fromkeys(title for result in results for title in result["scores"]))
    table = Table("", *names)
    for title in titles:
        scores = [result["scores"].get(title) for result in results]
        table.add_row(title, *("-" if value is None else f"{value:.{DIGITS}g}" for value in scores))
    for column in table.columns:
        column.overflow = "fold"
    Console(soft_wrap=True, highlight=False).print(table)
