"""`elit train`: the trainer with a progress bar."""

import sys

from rich.console import Console
from tqdm import tqdm

from elit.analysis import count_parameters
from elit.training import TrainConfig, Trainer


def train(config: TrainConfig) -> Trainer:
    """Train a model; a run that was stopped or killed continues from its last checkpoint.

    Raises:
        ElitError: see :class:`Trainer`.
    """
    console = Console(soft_wrap=True, highlight=False)
    trainer = Trainer(config)
    console.print(
        f"{config.model.name}, {count_parameters(trainer.model) / 1e6:.2f} M parameters, on "
        f"{len(trainer.data):,} images of {config.data}, {trainer.accelerator.device}"
    )
    show_progress(trainer)
    if trainer.interrupted:
        console.print(f"stopped after step {trainer.step}; run the same command to continue")
        sys.exit(130)
    console.print(f"done: elit sample --model {config.out} --out samples.png")
    return trainer


def show_progress(trainer: Trainer) -> None:
    """Runs a trainer to its end behind a bar with the loss and the time left."""
    smooth = 0.0
    with tqdm(total=trainer.config.steps, desc="training", unit="step", dynamic_ncols=True) as bar:
        for report in trainer:
            if not smooth:
                bar.initial = bar.n = report.step - 1  # a continued run: time left counts from here
                smooth = report.loss
            smooth = 0.98 * smooth + 0.02 * report.loss
            bar.update()
            skipped = {"skipped": report.skipped} if report.skipped else {}
            bar.set_postfix({"loss": f"{smooth:.4f}", **skipped}, refresh=False)
