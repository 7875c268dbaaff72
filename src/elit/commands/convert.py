"""`elit convert`: between the published checkpoints and our format."""

from pathlib import Path

from rich.console import Console

from elit.models.published import convert


def convert_model(
    source: Path,
    target: Path,
    num_heads: int | None = None,
    head_depth: int | None = None,
    tail_depth: int | None = None,
) -> None:
    """Convert a published FILE.pt to a folder of our format, or a model of ours to a published FILE.pt.

    Args:
        source: a published .pt file; or a run directory, a saved model or a Hub id.
        target: a new folder; or a new .pt file.
        num_heads: of a published file of no published size, which leaves it open.
        head_depth: the same.
        tail_depth: the same.

    Raises:
        ElitError: a source that cannot be read or held by the other format, or a target that exists.
    """
    done = convert(source, target, num_heads=num_heads, head_depth=head_depth, tail_depth=tail_depth)
    Console(soft_wrap=True, highlight=False).print(done)
