"""The trainer: an iterable of steps, on one process or many.

Everything random in a step (data order, noise, times, dropped labels, budget) is a function of (seed, step) and of the
place in the global batch. A run that is killed therefore goes on from its last checkpoint to the very bits that it
would have reached, and processes agree without talking: what they exchange are gradients, losses and whether to stop.

Accelerate finds the processes and their devices from any launcher, wraps for DDP, reduces and holds the trackers.
Precision, sharding and batching are ours, for they belong to a trainer, and accelerate's are settings of a process.
"""

import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from elit.conditions import Condition, map_condition, select_condition
from elit.data import Data, open_data
from elit.data.dataset import finish
from elit.errors import ElitError
from elit.models import Model, Transformer
from elit.training import state
from elit.training.accelerator import half_precision, make_accelerator
from elit.training.batch import TrainingDraws
from elit.training.build import Task, build_task
from elit.training.checks import check
from elit.training.config import RunConfig
from elit.training.deterministic import deterministic_algorithms, require_deterministic_matmul
from elit.training.loader import BatchLoader, StepBatch
from elit.training.optim import MovingAverage, lr_factor, make_optimizers, named_groups, set_lr
from elit.training.parallelize import (
    apply_activation_checkpointing,
    apply_fsdp,
    gather_full_tensors,
    named_parameters,
)
from elit.training.provenance import provenance
from elit.training.report import Numbers, StepReport
from elit.training.speed import Speed, Speedometer, peak_flops
from elit.training.validation import Validation

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Trainer:
    """Trains what a configuration says, continuing the run directory's last checkpoint.

    ``for report in trainer: ...`` does one step per turn. Leaving the loop early leaves a run that can be continued: by
    another trainer from its last checkpoint, or by iterating this one again from where it is.

    Under ``accelerate launch`` or ``torchrun`` every process does the same with its share of each batch, and the main
    one alone writes; they need to see the same run directory.

    Args:
        config: the run.
        data: instead of the data set that the configuration names.
        held_out: likewise, for the validation.
        build: makes what is trained of the configuration and the data; by default a new model. For the distillation
            of a pretrained one it is :func:`~elit.training.distillation.build_distillation`.

    Attributes:
        model: the raw weights, unwrapped.
        ema: their moving average (``ema.module`` is a model).
        step: number of steps done.
        levels: the numbers of latents that training uses.
        last_speed: images per second, FLOP utilisation and wait for data up to the last line of the log.
        stopped_by: the signal for which a stop was requested, in this process or another; None where training was not
            stopped.

    Raises:
        ElitError: a setting that does not fit, or a run directory that cannot be used.
    """

    def __init__(
        self,
        config: RunConfig,
        data: Data | None = None,
        held_out: Data | None = None,
        build: Callable[[Any, Data], Task] = build_task,
    ) -> None:
        check(config)
        self.config = config
        self.run = Path(config.out)
        state.check_resume(self.run, config)  # what cannot be continued is told before anything is built
        if config.deterministic:
            require_deterministic_matmul()
        if data is None:
            data = open_data(config.data, text_encoder=config.text_encoder, flips=config.flips)
        self.data = data
        self.task = build(config, self.data)
        self.model, self.levels, self.flow = self.task.model, self.task.levels, self.task.flow
        self.validation = Validation(config, self.model, self.flow, held_out)
        self.accelerator = make_accelerator(config)
        self.model.to(self.accelerator.device)
        self.ema = MovingAverage(self.model, config.ema_decay)
        self.objective = self.task.objective(self.accelerator.device)
        self.sharded = config.parallel == "fsdp" and self.accelerator.num_processes > 1
        self.half = half_precision(config)
        self.network = self._parallelize()
        self.trained = self._trained()
        self.loader = self._loader()
        self.scaler = torch.amp.GradScaler(self.accelerator.device.type, enabled=self.half == torch.float16)
        counted = self.half and isinstance(self.model, Transformer)  # FLOPs of other models are not known
        peak = peak_flops(self.accelerator.device) if counted else None
        peak = peak and peak * self.accelerator.num_processes
        self.speedometer = Speedometer(self.model, self.levels.levels, self.accelerator.device, peak)
        self.last_speed: Speed | None = None
        self.provenance = provenance()
        self.step = 0
        self.seen = 0  # samples, over all steps
        self.skipped = 0  # steps, as far as is known
        self._skipped_in_a_row = 0
        self._unsettled: StepReport | None = None  # the last step, while the host has not looked at its numbers
        self.stopped_by: signal.Signals | None = None
        self._stop_requests = dict.fromkeys(STOP_SIGNALS, False)

    def __iter__(self) -> Iterator[StepReport]:
        with state.locked(self.run) if self.is_main else nullcontext():
            if self.is_main:
                state.check_resume(self.run, self.config)
                state.write_config(self.run, self.config)
            self.accelerator.wait_for_everyone()
            self._resume()
            self._start_log()
            try:
                yield from self._steps()
            finally:
                for tracker in self.accelerator.trackers:
                    tracker.finish()

    def run_to_end(self) -> None:
        """Trains to the last step."""
        for _ in self:
            pass

    def request_stop(self, reason: signal.Signals = signal.SIGINT) -> None:
        """Ends training after the step that is under way, with a checkpoint. One process is enough to ask: all of them
        hear of it at the same step, which is the next one at the latest.

        Args:
            reason: SIGINT or SIGTERM; it becomes :attr:`stopped_by`.
        """
        self._stop_requests[reason] = True

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes."""
        return self.accelerator.is_main_process

    @property
    def interrupted(self) -> bool:
        """Whether a request to stop ended training before its last step."""
        return self.stopped_by is not None

    def save(self) -> None:
        """Writes a checkpoint of the current step; all processes call it.

        Raises:
            ElitError: the disk is full; earlier checkpoints stay.
        """
        self._settle()
        counts = {"seen": self.seen, "skipped": self.skipped, "seed": self.config.seed}
        record = counts | {"scaler": self.scaler.state_dict()} | self.provenance
        state.save_checkpoint(self.run, self.step, self.trained, record, self.config.keep_checkpoints, self.is_main)

    def averaged(self) -> Model:
        """Returns the moving average as one whole model; where it is in shards, all processes call this, for a copy."""
        average = self.ema.module
        if not self.sharded:
            return average
        copy = type(average)(average.config)
        copy.load_state_dict(gather_full_tensors(average.state_dict()))
        return copy.to(self.accelerator.device)

    # -------------------------------------------------------------------------------------------- one step

    def _steps(self) -> Iterator[StepReport]:
        """Takes steps, and writes what is due after each."""
        self._settle()  # of an earlier iteration
        self.stopped_by, self._skipped_in_a_row = None, 0
        with closing(self.loader.batches(self.step, self.seen)) as batches:  # type: ignore[type-var]
            while self.step < self.config.steps and not self.interrupted:
                pending = next(batches)
                with self.speedometer.waiting_for_data():
                    batch = pending.result().to(self.accelerator.device)
                with deterministic_algorithms(self.config.deterministic):
                    report = self._train_step(batch)
                if self.accelerator.num_processes == 1 and any(self._stop_requests.values()):
                    self._settle()  # no other process needs to hear of it first
                self._log(report)
                self._save_where_due()
                yield report
        if self.interrupted:
            self.save()
            self._stop_requests = dict.fromkeys(STOP_SIGNALS, False)
        self.accelerator.wait_for_everyone()  # what the main process writes is there when any of them returns

    def _train_step(self, batch: StepBatch) -> StepReport:
        """Launches one step. Meanwhile the device has come to the end of the one before, whose numbers are taken in."""
        config = self.config
        factor = lr_factor(config.optimizer, batch.step, config.steps)
        set_lr(self.trained.optimizers, config.optimizer, factor)
        losses, requests = self._all_reduce(self._backward(batch))
        norm, finite = self._update(losses[0], batch.step)
        numbers = Numbers(torch.cat((losses[:1], norm[None], ~finite[None], requests, losses[1:])))
        self.step, self.seen = batch.step + 1, self.seen + batch.size
        self._settle()
        for level in set(batch.levels):
            self.speedometer.add(level, batch.levels.count(level))
        mean_level = batch.levels[0] if len(set(batch.levels)) == 1 else sum(batch.levels) / batch.size
        lr = config.optimizer.lr * factor
        _, *names = self.objective.terms
        self._unsettled = StepReport(self.step, lr, mean_level, batch.size, numbers, self.skipped, tuple(names))
        return self._unsettled

    def _backward(self, batch: StepBatch) -> Tensor:
        """Accumulates gradients of micro-batches: this process's part of the means of the objective's R terms, (R,)."""
        factors = self.objective.terms.values()
        total = torch.zeros(len(factors), device=self.accelerator.device)
        x, y = self._samples(batch)
        for i, part in enumerate(batch.parts):
            with self._gradient_sync(last=i == len(batch.parts) - 1):
                of_part = None if y is None else select_condition(y, part.indices)
                pixels = None if batch.pixels is None else batch.pixels[part.indices]
                losses = self._losses(x[part.indices], of_part, pixels, batch.draws.take(part.indices), part.level)
                terms = losses.sum(1) * part.weight / batch.size
                loss = sum(factor * term for factor, term in zip(factors, terms, strict=True))
                # Gradients of processes are averaged, and their losses add up.
                self.scaler.scale(loss * self.accelerator.num_processes).backward()
            total += terms.detach()
        return total

    def _samples(self, batch: StepBatch) -> tuple[Tensor, Condition | None]:
        """Makes data (B, C, H, W) and conditions of what was read; no conditions for an unconditional model."""
        device = self.accelerator.device
        x, y = finish(self.data, batch.raw)
        if not self.model.conditional:
            return x.to(device), None
        y = map_condition(lambda value: value.to(device), y)
        return x.to(device), self.model.drop_condition(y, batch.draws.dropped)

    def _gradient_sync(self, last: bool) -> AbstractContextManager[None]:
        """Within it, gradients of processes are averaged after the last micro-batch only."""
        network: Any = self.network
        if self.sharded:
            network.set_requires_gradient_sync(last)
            return nullcontext()
        return nullcontext() if last else self.accelerator.no_sync(network)

    def _losses(
        self, x: Tensor, y: Condition | None, pixels: Tensor | None, draws: TrainingDraws, level: int
    ) -> Tensor:
        """Computes the objective's R terms of each sample of a micro-batch: (R, B)."""
        aligned = self.objective.features
        with torch.autocast(x.device.type, self.half, enabled=self.half is not None):
            return self.network(x, y, draws, level, None if aligned is None else aligned(pixels, x))

    def _all_reduce(self, losses: Tensor) -> tuple[Tensor, Tensor]:
        """Sums losses over processes, and for each signal the processes that were asked to stop by it."""
        requests = torch.tensor([float(self._stop_requests[reason]) for reason in STOP_SIGNALS])
        if losses.is_cuda:
            requests = requests.pin_memory().to(losses.device, non_blocking=True)
        totals = self.accelerator.reduce(torch.cat((losses, requests)), "sum")
        return totals[: len(losses)], totals[len(losses) :]

    def _update(self, loss: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Steps the optimizers and the average, and returns the gradient's norm and whether it and the loss are finite.

        If they are not, nothing changes. The device sees to that: the host does not know yet.
        """
        optimizers: Any = self.trained.optimizers.values()
        for optimizer in optimizers:
            self.scaler.unscale_(optimizer)
        total_norm: Any = nn.utils.clip_grad_norm_(self.objective.parameters(), self.config.optimizer.clip)
        norm: Tensor = total_norm.full_tensor() if self.sharded else total_norm
        finite = loss.isfinite() & norm.isfinite()
        for optimizer in optimizers:
            optimizer.found_inf = (~finite).float()
            optimizer.step()
        self.ema.update(self.model, step, finite)
        self.scaler.update()
        self.objective.zero_grad()
        return norm, finite

    def _settle(self) -> None:
        """Takes in the numbers of the step that was launched last, for which it waits: whether it was skipped, and
        whether a process was asked to stop.

        Raises:
            ElitError: too many steps in a row were skipped.
        """
        report, self._unsettled = self._unsettled, None
        if report is None:
            return
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if report.skipped > self.skipped else 0
        self.skipped = report.skipped
        asked = zip(STOP_SIGNALS, report.stop_requests, strict=True)
        self.stopped_by = next((reason for reason, processes in asked if processes), None)
        if self._skipped_in_a_row >= self.config.max_skipped:
            raise ElitError(self._diverged(self._skipped_in_a_row, report.step))

    # -------------------------------------------------------------------------------------------- what is trained

    def _parallelize(self) -> nn.Module:
        """Prepares blocks as the configuration says, and wraps the objective for several processes."""
        if self.config.checkpoint_activations:
            for stack in self.model.stacks:
                apply_activation_checkpointing(stack)
        if self.task.compile is not None:
            self.task.compile()
        if not self.sharded:
            return self.accelerator.prepare(self.objective)
        networks = ((self.objective, self.objective.shards, self.half), (self.ema, self.ema.module.shards, None))
        for network, blocks, half in networks:
            apply_fsdp(network, blocks, self.accelerator.num_processes, self.accelerator.device, half)
        return self.objective

    def _trained(self) -> state.Trained:
        """Makes the optimizers of the parameters as they are now, whole or in shards."""
        projector, names = self.objective.projector, named_groups(self.model, self.config.optimizer)
        parameters = dict(named_parameters(self.model))
        if projector is not None:
            more = {f"repa.{name}": parameter for name, parameter in projector.named_parameters()}
            parameters, names["adamw"] = parameters | more, names["adamw"] + list(more)
        optimizers = make_optimizers(parameters, names, self.config.optimizer)
        return state.Trained(self.model, self.ema, projector, optimizers, names)

    def _loader(self) -> BatchLoader:
        accelerator = self.accelerator
        place = (accelerator.device, accelerator.process_index, accelerator.num_processes)
        return BatchLoader(self.config, self.model, self.levels, self.flow, self.data, self.objective.features, *place)

    # -------------------------------------------------------------------------------------------- the run

    def _resume(self) -> None:
        """Restores the checkpoint to start from, unless this trainer is as far already: it was iterated before."""
        checkpoint = state.checkpoint_to_resume(self.run, self.config.resume)
        if checkpoint is None:
            return
        record = state.read_record(checkpoint)
        if record["step"] <= self.step:
            return
        state.restore_checkpoint(checkpoint, self.trained)
        self.step, self.seen, self.skipped = record["step"], record["seen"], record["skipped"]
        if self.scaler.is_enabled() and record["scaler"]:
            self.scaler.load_state_dict(record["scaler"])

    def _start_log(self) -> None:
        if self.is_main:
            for name in ("log.jsonl", "speed.jsonl"):
                state.truncate_log(self.run / name, self.step)
            state.drop_snapshots(self.run, self.step)
        # Events of steps after the checkpoint are hidden: training writes them again.
        self.accelerator.init_trackers("elit", init_kwargs={"tensorboard": {"purge_step": self.step + 1}})
        self.speedometer.restart()

    def _log(self, report: StepReport) -> None:
        """Writes lines of the log, before a checkpoint of the same step: a resumed run finds them or writes them
        again."""
        validated = self.validation.due(report.step)
        if report.step % self.config.log_every and report.step != self.config.steps and not validated:
            return
        self._settle()
        speed = self.last_speed = self.speedometer.read()
        held_out = self.validation.losses(self.averaged(), self.accelerator) if validated else {}
        if self.is_main:
            values = report.as_dict() | held_out
            state.append_json_line(self.run / "log.jsonl", values)
            # A file of its own: the log is the same for every run of a configuration, and the speed is not.
            state.append_json_line(self.run / "speed.jsonl", {"step": report.step, **speed._asdict()})
            shown = {k: v for k, v in {**values, **speed._asdict()}.items() if v is not None and k != "step"}
            self.accelerator.log(shown, step=report.step)
        self.speedometer.restart()

    def _save_where_due(self) -> None:
        every = self.config.snapshot_every
        if every and self.step % every == 0:
            state.save_snapshot(self.run, self.step, self.averaged(), self.task.save, self.is_main)
        if self.step % self.config.checkpoint_every == 0 or self.step == self.config.steps:
            self.save()

    def _diverged(self, steps: int, step: int) -> str:
        """Says what to do after so many steps without a finite loss, up to some step."""
        checkpoint = state.latest(self.run)
        way_on = f"--resume {checkpoint} " if checkpoint else ""
        return (
            f"the loss was not finite for {steps} steps in a row, up to step {step}; "
            f"train with a lower --optimizer.lr in another run directory: {way_on}--out ANOTHER"
        )
