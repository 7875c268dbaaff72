"""Do sampled clips move? How far the centre of ink goes, in samples, in held-out clips, and in those out of order.

elit train --config configs/train/moving-digits.yaml --out runs/moving-digits --steps 250
python experiments/moving_digits.py                                  # docs/results/backbones.md
"""

import torch
from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table
from torch import Tensor

import elit
from elit.data import moving_digits
from elit.seeding import generator, uniform

GUIDANCE = elit.Guidance("cfg", scale=2.0)


def centres(clips: Tensor) -> Tensor:
    """Clips (B, 1, T, H, W) in [-1, 1] -> row and column of the centre of ink of each frame (B, T, 2)."""
    ink = (clips.clamp(-1, 1) + 1)[:, 0]
    rows, columns = (torch.arange(float(side)) for side in ink.shape[2:])
    both = (ink.sum(3) * rows).sum(2), (ink.sum(2) * columns).sum(2)
    return torch.stack(both, dim=2) / ink.sum((2, 3))[..., None]


def measure(run: str = "runs/moving-digits", samples: int = 40) -> None:
    """Print mean distances in pixels.

    Args:
        run: of ``elit train``.
        samples: clips of each kind.
    """
    model = elit.load(run)
    labels = torch.arange(samples) % model.config.num_classes
    real = moving_digits(held_out=True).images[:samples]
    order = uniform(generator(0, "order of frames"), (samples, real.shape[2])).argsort(1)
    kinds = {
        "samples": elit.sample(model, labels, steps=16, guidance=GUIDANCE),
        "held out": real,
        "held out, frames shuffled": torch.stack([clip[:, frames] for clip, frames in zip(real, order, strict=True)]),
    }
    table = Table("clips", "frame to frame", "first to last")
    for name, clips in kinds.items():
        at = centres(clips)
        steps, whole = (at[:, 1:] - at[:, :-1]).norm(dim=2).mean(), (at[:, -1] - at[:, 0]).norm(dim=1).mean()
        table.add_row(name, f"{steps:.2f}", f"{whole:.2f}")
    Console().print(table)


if __name__ == "__main__":
    auto_cli(measure)
