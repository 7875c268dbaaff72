"""`elit train`: the trainer with a progress bar and pictures on the way."""

import math
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import torch
from rich.console import Console
from tqdm import tqdm

from elit.analysis import count_parameters
from elit.atomic import atomic_file
from elit.commands.images import to_frames
from elit.data.autoencoder import decode, load_autoencoder
from elit.data.clips import write_video
from elit.flow import sample
from elit.interface import listed
from elit.models import Model
from elit.training import RunConfig, TrainConfig, Trainer
from elit.training.speed import Speed
from elit.training.trainer import STOP_SIGNALS


def train(config: TrainConfig) -> Trainer:
    """Train a model; a run that was stopped or killed continues from its last checkpoint.

    Raises:
        ElitError: see :class:`Trainer`.
    """
    trainer = Trainer(config)
    console = Console(soft_wrap=True, highlight=False, quiet=not trainer.is_main)
    console.print(describe(trainer, config.model.name))
    run(trainer, console)
    trainer.accelerator.end_training()
    console.print(f"done: elit sample --model {config.out} --out samples.png")
    return trainer


def run(trainer: Trainer, console: Console) -> None:
    """Runs a trainer to its end behind a progress bar; where it was asked to stop, ends the program."""
    show_progress(trainer)
    if trainer.interrupted:
        trainer.accelerator.end_training()
        console.print(f"stopped after step {trainer.step}; run the same command to continue")
        sys.exit(0 if trainer.stopped_by is signal.SIGTERM else 130)  # a scheduler's way to end a job, or Ctrl-C


def describe(trainer: Trainer, name: str) -> str:
    """Says in one line what is about to be trained, of which the name is given."""
    config, levels, accelerator = trainer.config, trainer.levels.levels, trainer.accelerator
    budgets = ""
    if levels:
        budgets = f", {listed(levels)} of {trainer.model.num_latents} latents a window"
    processes = f", {accelerator.num_processes} processes" if accelerator.num_processes > 1 else ""
    return (
        f"{name}, {count_parameters(trainer.model) / 1e6:.2f} M parameters{budgets}, on "
        f"{len(trainer.data):,} images of {config.data}, {accelerator.device}{processes}"
    )


def show_progress(trainer: Trainer) -> None:
    """Runs a trainer to its end, or until Ctrl-C or SIGTERM, behind a bar with loss, speed and the time left, drawing
    samples where it asks.

    The loss that it shows is that of the step before, for which nothing needs to wait.
    """
    loss, before = None, None
    total = trainer.config.steps
    with (
        stop_on_signals(trainer),
        tqdm(total=total, desc="training", unit="step", dynamic_ncols=True, disable=not trainer.is_main) as bar,
    ):
        for report in trainer:
            if not bar.n:
                bar.initial = bar.n = report.step - 1  # a continued run: time left counts from here
            bar.update()
            if before is not None:
                loss = smoothed(loss, before.loss)
                bar.set_postfix(postfix(loss, before.skipped, trainer.last_speed), refresh=False)
            before = report
            if trainer.validation.due(report.step) and draws_samples(trainer.config):
                model = trainer.averaged()  # all processes put it together
                if trainer.is_main:
                    draw_samples(trainer, model)
        if before is not None:
            bar.set_postfix(postfix(smoothed(loss, before.loss), before.skipped, trainer.last_speed), refresh=False)


def draws_samples(config: RunConfig) -> TypeGuard[TrainConfig]:
    """Whether samples are drawn at each validation: of a new model, and where that is wanted."""
    return isinstance(config, TrainConfig) and config.validation.images > 0


def postfix(loss: float | None, skipped: int, speed: Speed | None) -> dict[str, str]:
    """Returns what the bar shows beside the number of steps."""
    shown = {"loss": "not finite" if loss is None else f"{loss:.4f}"}
    if skipped:
        shown["skipped"] = f"{skipped}"
    if speed is not None:
        shown["images/s"] = f"{speed.images_per_second:.0f}"
        if speed.mfu is not None:
            shown["MFU"] = f"{speed.mfu:.0%}"
        shown["waiting for data"] = f"{speed.data_wait:.0%}"
    return shown


def smoothed(average: float | None, loss: float) -> float | None:
    """Takes a loss into a running average, which losses that are not finite leave as it is."""
    if not math.isfinite(loss):
        return average
    return loss if average is None else 0.98 * average + 0.02 * loss


@contextmanager
def stop_on_signals(trainer: Trainer) -> Iterator[None]:
    """Lets SIGINT (Ctrl-C) and SIGTERM end training after the step that is under way, with a checkpoint."""

    def stop(number: int, _: object) -> None:
        trainer.request_stop(signal.Signals(number))

    if threading.current_thread() is not threading.main_thread():  # the only one that may handle signals
        yield
        return
    before = {kind: signal.signal(kind, stop) for kind in STOP_SIGNALS}
    try:
        yield
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


def draw_samples(trainer: Trainer, model: Model) -> Path:
    """Writes ``samples/step-….png``, or ``.gif`` for clips, of the averaged weights: a row for each budget, the same
    seeds in all of them. Captions are those of the held-out data.

    Raises:
        ElitError: the picture cannot be written, or the autoencoder is missing.
    """
    config = trainer.config
    assert draws_samples(config)
    wanted, classes = config.validation, model.config.num_classes
    condition: Any = [i % classes for i in range(wanted.images)] if classes else None
    if model.takes_text:
        assert trainer.validation.data is not None
        held_out = trainer.validation.data
        condition = held_out.batch(torch.arange(wanted.images) % len(held_out))[1]
    rows = [
        sample(
            model,
            condition,
            seeds=list(range(wanted.images)),
            steps=wanted.sampling_steps,
            budget=budget,
            path=config.path,
        )
        for budget in trainer.validation.budgets
    ]
    images = torch.cat(rows)
    if wanted.autoencoder is not None:
        images = decode(images, load_autoencoder(wanted.autoencoder, images.shape[1]))
    images = images[:, :3] if images.shape[1] > 3 else images
    clips = images if images.dim() == 5 else images[:, :, None]
    frames = to_frames(clips, columns=wanted.images)
    out = trainer.run / "samples" / f"step-{trainer.step:08d}{'.gif' if len(frames) > 1 else '.png'}"
    with atomic_file(out) as temporary:
        if len(frames) > 1:
            write_video(frames, temporary)
        else:
            frames[0].save(temporary)
    for tracker in trainer.accelerator.trackers:
        layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        pictures = np.stack([np.asarray(frame.convert("RGB")) for frame in frames])
        tracker.log_images({"samples": pictures}, step=trainer.step, **layout)
    return out
