"""The learning study and the claim at a size for one GPU: width 384, twelve blocks, 64 and 128 pixels, bf16, compiled.

    python experiments/at_scale.py                  # all of it
    python experiments/at_scale.py --minutes 9      # a piece; the same command goes on where it stopped

A training has 1.4 x 10^16 FLOPs, and there are fourteen: 16 minutes at 200 TFLOP/s, 33 at 100. The tables and figures
of a part are made when its last training is complete; those of the claim also score samples. No GPU has run it yet.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from jsonargparse import auto_cli

import claim
import learning
from curves import OutOfTimeError, Scale, Variant, train_all
from elit.commands.quickstart import RECIPE
from elit.training import OptimizerConfig

SEEDS = 2
LEARNING = ("plain", "learned/2", "anchored/2", "anchored/full")
CLAIM = ("plain", "anchored, to 1/2", "learned, to 1/4")


def run(
    minutes: float | None = None,
    width: int = 384,
    depth: int = 12,
    steps: int = 1500,
    batch_size: int = 256,
    precision: str = "auto",
    compile: bool = True,
    samples: int = 500,
    out: Path = Path("runs/at-scale"),
) -> None:
    """Train, print the tables, and write figures and numbers.

    Args:
        minutes: after which this call stops; the next one goes on. Default: it does not.
        width: of every model; heads are 64 wide.
        depth: number of blocks.
        steps: of the plain transformer at 64 pixels; at 128 there are 2/5 of them.
        batch_size: mosaics of a step at 64 pixels; at 128 there are half as many.
        precision: of training; auto is bf16 on a GPU.
        compile: whether layers are compiled.
        samples: of each training of the claim that are scored.
        out: where trainings, figures and numbers are kept.
    """
    fields = {"width": width, "depth": depth, "num_heads": max(1, width // 64), "positions": "rotary"}
    optimizer = OptimizerConfig(lr=3e-4, betas=(0.9, 0.99), warmup_steps=100, decay="linear", decay_from=0.5)
    recipe = replace(RECIPE, optimizer=optimizer, ema_decay=0.999, compile=compile, log_every=50)
    recipe = replace(recipe, precision=precision)  # type: ignore[arg-type]
    split = {"head_depth": max(1, depth // 6), "tail_depth": max(1, depth // 6)}
    small = Scale(claim.mosaics(2), claim.mosaics(2, True), fields, 4, steps, batch_size, out / "64px", recipe)
    large = Scale(
        claim.mosaics(4), claim.mosaics(4, True), fields, 4, 2 * steps // 5, batch_size // 2, out / "128px", recipe
    )
    report_claim = partial(claim.report, samples=samples, guidance=2.0)
    parts: tuple[tuple[Scale, dict[str, Variant], tuple[str, ...], Callable[..., None]], ...] = (
        (small, learning.VARIANTS, LEARNING, learning.report),
        (large, claim.VARIANTS, CLAIM, report_claim),
    )
    until = None if minutes is None else time.monotonic() + 60 * minutes
    try:
        for scale, variants, names, report in parts:
            own = {
                name: v if v.elit is None else replace(v, fields={**v.fields, **split}) for name, v in variants.items()
            }
            report(train_all(scale, own, names, SEEDS, until), scale)
    except OutOfTimeError:
        print("the minutes are over; the same command goes on")


if __name__ == "__main__":
    auto_cli(run)
