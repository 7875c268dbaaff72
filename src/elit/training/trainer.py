"""The trainer: an iterable of steps.

Everything random in a step (data order, noise, times, dropped labels, budget) is a function of (seed, step). A run that
is killed therefore goes on from its last checkpoint to the very bits that it would have reached.
"""

import json
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from elit.conditions import Condition, map_condition
from elit.data import Data, batch_indices, open_data
from elit.errors import ElitError
from elit.flow import flow_matching_loss, path_named
from elit.interface import draw_level
from elit.models import Model, create
from elit.seeding import derive_seed, generator
from elit.training import state
from elit.training.config import TrainConfig
from elit.training.optim import lr_factor, make_ema, make_optimizers, named_groups, set_lr


class StepReport(NamedTuple):
    """What one step did.

    Attributes:
        step: number of steps done.
        loss: mean flow-matching loss of the batch.
        grad_norm: before clipping.
        lr: learning rate of AdamW.
        num_latents: J~ of the step; 0 without an interface.
        skipped: steps so far whose loss or gradient was not finite, and which changed nothing.
    """

    step: int
    loss: float
    grad_norm: float
    lr: float
    num_latents: int
    skipped: int


def build_model(config: TrainConfig, data: Data) -> Model:
    """A new model that fits the data, with weights from the seed.

    Raises:
        ElitError: a name or field that does not exist, or sizes that do not fit.
    """
    channels, *size = data.shape
    fitted: dict[str, Any] = {"in_channels": channels, "num_classes": data.num_classes, "input_size": tuple(size)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(config.seed, "weights"))
        return create(config.model.name, **(fitted | config.model.fields))


class Trainer:
    """Trains a model as a configuration says, continuing the run directory's last checkpoint.

    ``for report in trainer: ...`` does one step per turn; leaving the loop early leaves a run that can be continued.

    Args:
        config: the run.
        data: instead of the data set that the configuration names.

    Attributes:
        model: the raw weights, unwrapped.
        ema: their moving average (``ema.module`` is a model).
        step: number of steps done.

    Raises:
        ElitError: a setting that does not fit, or a run directory that cannot be used.
    """

    def __init__(self, config: TrainConfig, data: Data | None = None) -> None:
        check(config)
        accelerate = _import_accelerate()
        self.config = config
        self.run = Path(config.out)
        self.data = open_data(config.data) if data is None else data
        self.path = path_named(config.path)
        self.accelerator = accelerate.Accelerator(
            mixed_precision=_precision(config), log_with="tensorboard", project_dir=str(self.run)
        )
        self.model = build_model(config, self.data)
        self.model.to(self.accelerator.device)
        self.ema = make_ema(self.model, config.ema_decay)
        self.groups = named_groups(self.model, config.optimizer)
        self.optimizers = make_optimizers(self.model, config.optimizer)
        self.step = 0
        self.skipped = 0
        self._stop = False

    def __iter__(self) -> Iterator[StepReport]:
        with state.locked(self.run), _stop_on_signals(self):
            state.write_or_compare_config(self.run, asdict(self.config))
            self._resume()
            network, *optimizers = self.accelerator.prepare(self.model, *self.optimizers.values())
            self._start_log()
            skipped_in_a_row = 0
            while self.step < self.config.steps and not self._stop:
                report = self._train_step(network, optimizers)
                skipped_in_a_row = skipped_in_a_row + 1 if report.skipped > self.skipped else 0
                self.skipped = report.skipped
                if skipped_in_a_row >= self.config.max_skipped:
                    raise ElitError(
                        f"the loss was not finite for {skipped_in_a_row} steps in a row, up to step {self.step}; "
                        f"lower the learning rate and continue from {state.latest(self.run)}"
                    )
                self._log(report)
                if self.step % self.config.checkpoint_every == 0 or self.step == self.config.steps:
                    self.save()
                yield report
            if self._stop:
                self.save()
            self.accelerator.end_training()

    def run_to_end(self) -> None:
        """All steps, without looking at them."""
        for _ in self:
            pass

    @property
    def interrupted(self) -> bool:
        """Whether a signal (Ctrl-C, SIGTERM) ended training before its last step."""
        return self._stop

    def save(self) -> Path:
        """Writes a checkpoint of the current step."""
        return state.save_checkpoint(
            self.run,
            self.step,
            self.model,
            self.ema,
            self.optimizers,
            self.groups,
            {"skipped": self.skipped, "seed": self.config.seed},
            self.config.keep_checkpoints,
        )

    # -------------------------------------------------------------------------------------------- one step

    def _train_step(self, network: torch.nn.Module, optimizers: list[torch.optim.Optimizer]) -> StepReport:
        config, step = self.config, self.step
        x, y = self._batch()
        rng = generator(config.seed, "step", step, device=x.device)
        t = config.times.draw(len(x), self.path, rng)
        noise = torch.randn(x.shape, generator=rng, device=x.device)
        if y is not None:
            dropped = torch.rand(len(x), generator=rng, device=x.device) < config.label_dropout
            y = self.model.drop_condition(y, dropped)
        level = self._draw_level()
        budget = level / self.model.num_latents if level else None

        factor = lr_factor(config.optimizer, step, config.steps)
        set_lr(self.optimizers, config.optimizer, factor)
        with self.accelerator.autocast():
            loss = flow_matching_loss(partial(network, y=y, budget=budget), x, t, noise, self.path).mean()
        self.accelerator.backward(loss)
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), config.optimizer.clip)
        finite = bool(torch.isfinite(norm) & torch.isfinite(loss))
        for optimizer in optimizers:
            if finite:
                optimizer.step()
            optimizer.zero_grad()
        if finite:
            self.ema.update_parameters(self.model)
        self.step += 1
        skipped = self.skipped + (not finite)
        return StepReport(self.step, loss.item(), float(norm), config.optimizer.lr * factor, level, skipped)

    def _batch(self) -> tuple[Tensor, Condition | None]:
        """Data (B, C, H, W) and labels (B,) of the current step; no labels for an unconditional model."""
        x, y = self.data.batch(batch_indices(self.config.seed, self.step, self.config.batch_size, len(self.data)))
        device = self.accelerator.device
        return x.to(device), map_condition(lambda v: v.to(device), y) if self.model.conditional else None

    def _draw_level(self) -> int:
        if not self.config.multi_budget:
            return self.model.num_latents
        return draw_level(self.model.levels, self.config.seed, self.step) if self.model.levels else 0

    # -------------------------------------------------------------------------------------------- the run

    def _resume(self) -> None:
        checkpoint = state.latest(self.run)
        if checkpoint is None:
            return
        record = state.restore_checkpoint(checkpoint, self.model, self.ema, self.optimizers, self.groups)
        self.step, self.skipped = record["step"], record["skipped"]

    def _start_log(self) -> None:
        state.truncate_log(self.run / "log.jsonl", self.step)
        # Events of steps after the checkpoint are hidden: training writes them again.
        self.accelerator.init_trackers("tensorboard", init_kwargs={"tensorboard": {"purge_step": self.step + 1}})

    def _log(self, report: StepReport) -> None:
        if report.step % self.config.log_every and report.step != self.config.steps:
            return
        values: dict[str, Any] = report._asdict()
        with (self.run / "log.jsonl").open("a") as log:
            log.write(json.dumps(values) + "\n")
        values.pop("step")
        self.accelerator.log(values, step=report.step)


def check(config: TrainConfig) -> None:
    """Raises:
    ElitError: a number of the configuration is out of its range.
    """
    for name in ("steps", "batch_size", "log_every", "checkpoint_every", "keep_checkpoints", "max_skipped"):
        if getattr(config, name) < 1:
            raise ElitError(f"{name} is {getattr(config, name)}; it must be at least 1")
    for name in ("label_dropout", "ema_decay"):
        if not 0 <= getattr(config, name) <= 1:
            raise ElitError(f"{name} is {getattr(config, name)}; it must be in [0, 1]")


def _precision(config: TrainConfig) -> str:
    if config.precision == "auto":
        return "bf16" if torch.cuda.is_available() else "no"
    return {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}[config.precision]


def _import_accelerate() -> Any:
    try:
        import accelerate
        import tensorboard  # noqa: F401
    except ImportError as error:
        raise ElitError(f"training needs {error.name}: pip install 'elit-diffusion[train]'") from error
    return accelerate


@contextmanager
def _stop_on_signals(trainer: Trainer) -> Iterator[None]:
    """SIGINT and SIGTERM end the loop after the step at hand, so that what is saved is consistent."""

    def stop(*_: object) -> None:
        trainer._stop = True

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {kind: signal.signal(kind, stop) for kind in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
