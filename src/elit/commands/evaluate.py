"""`elit evaluate`: scores of samples against a reference; statistics of a reference; results side by side."""

import json
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from elit.atomic import write_json
from elit.commands.processes import this_process
from elit.errors import ElitError
from elit.evaluation.extractors import Resize, open_extractor
from elit.evaluation.features import Features
from elit.evaluation.scores import differences, open_reference, save_reference, score
from elit.evaluation.sources import open_images

ExtractorName = Literal["inception", "dinov2", "digits", "digits8"]
DIGITS = 6  # of a number in a table


def evaluate_samples(
    samples: str,
    reference: str,
    extractor: ExtractorName = "inception",
    weights: str | None = None,
    fdd_resize: Resize = "float",
    out: Path = Path("scores.json"),
    device: str = "auto",
    threads: int = 1,
) -> dict[str, Any] | None:
    """Score samples against a reference: FID, sFID, IS, precision, recall and KID, or FDD.

    Start it with torchrun or accelerate launch to use several GPUs. Features are kept in $ELIT_CACHE (default
    ~/.cache/elit). See also: elit evaluate reference, elit evaluate compare.

    Args:
        samples: a folder or zip of images, a .npz, or an embedded data set (digits, digits:held-out).
        reference: the same, or statistics: a .npz of the ADM suite or of elit evaluate reference.
        extractor: inception for FID and its kin, dinov2 for FDD, or the classifier of a data set.
        weights: those of the extractor; default those in the cache.
        fdd_resize: how dinov2 gets its 224 pixels, float or pil.
        out: the .json file of scores and protocol.
        device: auto, cpu, cuda, ...
        threads: of a process on the CPU; they are part of what makes results repeat to the last bit.

    Returns:
        Scores, protocol and warnings; None where other processes have not finished their share (the last one scores).

    Raises:
        ElitError: images, a reference or weights that are missing or damaged, or do not belong together.
    """
    process = this_process(device, threads)
    network = open_extractor(extractor, weights, fdd_resize, process.device)
    against = open_reference(reference, network)
    ours = Features(open_images(samples), network)
    theirs = Features(against.images, network) if against.images else None
    both = [ours] if theirs is None else [ours, theirs]
    if not _compute(both, process.rank, process.total):
        return None
    result = score(ours, against, theirs)
    write_json(out, result)
    console = Console(soft_wrap=True, highlight=False)
    _print_table([result], [samples])
    for warning in result["warnings"]:
        console.print(f"[yellow]{warning}[/yellow]")
    console.print(f"scores and protocol in {out}")
    return result


def evaluate_reference(
    source: str,
    out: Path,
    extractor: ExtractorName = "inception",
    weights: str | None = None,
    fdd_resize: Resize = "float",
    device: str = "auto",
    threads: int = 1,
) -> Path | None:
    """Write the statistics of reference images, in the layout of the ADM suite.

    Args:
        source: a folder or zip of images, a .npz with arr_0, or an embedded data set.
        out: the .npz file to write.
        extractor: whose features.
        weights: those of the extractor; default those in the cache.
        fdd_resize: how dinov2 gets its 224 pixels, float or pil.
        device: auto, cpu, cuda, ...
        threads: of a process on the CPU.

    Raises:
        ElitError: images or weights that are missing or damaged, or a file that cannot be written.
    """
    out = Path(out)
    if out.suffix != ".npz":
        raise ElitError(f"out is {out}; it must be a .npz file")
    process = this_process(device, threads)
    features = Features(open_images(source), open_extractor(extractor, weights, fdd_resize, process.device))
    if not _compute([features], process.rank, process.total):
        return None
    save_reference(features, out)
    Console(soft_wrap=True, highlight=False).print(f"statistics of {features.images.count:,} images in {out}")
    return out


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
    found = [_read_result(Path(path)) for path in results]
    names = [str(path) for path in results]
    _print_table(found, names)
    reasons = differences(found, names)
    console = Console(soft_wrap=True, highlight=False)
    for reason in reasons or ["comparable: the same extractor, weights, resizing, reference, counts and definitions"]:
        console.print(reason)
    return reasons


def _compute(parts: list[Features], rank: int, total: int) -> bool:
    """Computes one's share of the features; whether all are there, and one is to go on with them."""
    began_complete = not any(part.missing() for part in parts)
    for part in parts:
        part.compute(lambda shard: shard % total == rank, progress=rank == 0)
    if began_complete:
        return rank == 0
    return not any(part.missing() for part in parts)


def _read_result(path: Path) -> dict[str, Any]:
    try:
        result = json.loads(path.read_text())
        result["scores"], result["protocol"]["extractor"]
    except OSError as error:
        raise ElitError(f"cannot read {path} ({error.strerror})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ElitError(f"{path} is no result of elit evaluate") from error
    return result


def _print_table(results: list[dict[str, Any]], names: list[str]) -> None:
    titles = list(dict.fromkeys(title for result in results for title in result["scores"]))
    table = Table("", *names)
    for title in titles:
        scores = [result["scores"].get(title) for result in results]
        table.add_row(title, *("-" if value is None else f"{value:.{DIGITS}g}" for value in scores))
    for column in table.columns:
        column.overflow = "fold"
    Console(soft_wrap=True, highlight=False).print(table)
