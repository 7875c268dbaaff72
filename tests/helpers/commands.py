"""Verbs of the command line, called with plain arguments."""

from pathlib import Path
from typing import Any

from elit.commands.sample import SampleOptions, sample_images


def draw(model: str | Path, out: Path, num_images: int, **options: Any) -> Path:
    """`elit sample`."""
    return sample_images(SampleOptions(model=str(model), out=out, num_images=num_images, **options))
