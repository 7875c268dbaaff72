"""The trainer: an iterable of steps, on one process or many.

Everything random in a step (data order, noise, times, dropped labels, budget) is a function of (seed, step) and of the
place in the global batch. A run that is killed therefore goes on from its last checkpoint to the very bits that it
would have reached, and processes agree without talking: what they exchange are gradients, losses and whether to stop.

Accelerate finds the processes and their devices from any launcher, wraps for DDP, reduces and holds the trackers.
Precision, sharding and batching are ours, for they belong to a trainer, and accelerate's are settings of a process.
"""

import importlib.util
import math
import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from elit.conditions import Condition, map_condition
from elit.data import Data, open_data, sample_indices
from elit.errors import ElitError
from elit.flow import flow_of
from elit.launch import default_device
from elit.models import Model, Transformer
from elit.seeding import derive_seed
from elit.training import state
from elit.training.batch import TrainingDraws, draw, micro_batches, pad_micro_batches, share
from elit.training.budgets import scaled_batch_size
from elit.training.build import build_model
from elit.training.config import TrainConfig
from elit.training.deterministic import deterministic_algorithms, require_deterministic_matmul
from elit.training.objective import Objective
from elit.training.optim import lr_factor, make_ema, make_optimizers, named_groups, set_lr
from elit.training.parallelize import (
    apply_activation_checkpointing,
    apply_compile,
    apply_fsdp,
    gather_full_tensors,
    named_parameters,
)
from elit.training.provenance import provenance
from elit.training.repa import AlignmentFeatures, check_alignment, make_projector
from elit.training.speed import Speed, Speedometer, peak_flops
from elit.training.validation import Validation

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StepReport(NamedTuple):
    """What one step did.

    Attributes:
        step: number of steps done.
        loss: mean flow-matching loss of the batch.
        grad_norm: before clipping.
        lr: learning rate of AdamW.
        num_latents: J~ of the step, the mean where samples differ; 0 without an interface.
        batch_size: samples of the step, over all processes.
        skipped: steps so far whose loss or gradient was not finite, and which changed nothing.
        alignment: mean cosine similarity with the features of an encoder, where there is one (``repa``).
    """

    step: int
    loss: float
    grad_norm: float
    lr: float
    num_latents: float
    batch_size: int
    skipped: int
    alignment: float | None = None


class Trainer:
    """Trains a model as a configuration says, continuing the run directory's last checkpoint.

    ``for report in trainer: ...`` does one step per turn. Leaving the loop early leaves a run that can be continued: by
    another trainer from its last checkpoint, or by iterating this one again from where it is.

    Under ``accelerate launch`` or ``torchrun`` every process does the same with its share of each batch, and the main
    one alone writes; they need to see the same run directory.

    Args:
        config: the run.
        data: instead of the data set that the configuration names.
        held_out: likewise, for the validation.

    Attributes:
        model: the raw weights, unwrapped.
        ema: their moving average (``ema.module`` is a model).
        step: number of steps done.
        levels: the numbers of latents that training uses.
        last_speed: images per second and FLOP utilisation up to the last line of the log.
        stopped_by: the signal for which a stop was requested, in this process or another; None where training was not
            stopped.

    Raises:
        ElitError: a setting that does not fit, or a run directory that cannot be used.
    """

    def __init__(self, config: TrainConfig, data: Data | None = None, held_out: Data | None = None) -> None:
        check(config)
        self.config = config
        self.run = Path(config.out)
        state.checkpoint_to_resume(self.run, config.resume)  # a wrong path is told before anything is built
        if config.deterministic:
            require_deterministic_matmul()
        if data is None:
            data = open_data(config.data, text_encoder=config.text_encoder, flips=config.flips)
        self.data = data
        self.model, self.levels = build_model(config, self.data)
        self.flow = flow_of(self.model, config.path, times=config.times, stages=config.stages)
        self.validation = Validation(config, self.model, held_out)
        self.accelerator = _accelerator(config)
        self.model.to(self.accelerator.device)
        self.ema = make_ema(self.model, config.ema_decay)
        self.features = self._features()
        self.objective = self._objective()
        self.sharded = config.parallel == "fsdp" and self.accelerator.num_processes > 1
        self.network = self._parallelize()
        self.trained = self._trained()
        self.half = half_precision(config)
        self.scaler = torch.amp.GradScaler(self.accelerator.device.type, enabled=self.half == torch.float16)
        peak = peak_flops(self.accelerator.device) if self.half else None
        self.speedometer = Speedometer(self.model, peak and peak * self.accelerator.num_processes)
        self.last_speed: Speed | None = None
        self.provenance = provenance()
        self._batch_sizes: dict[int, int] = {}  # by level, where they are scaled
        self.step = 0
        self.seen = 0  # samples, over all steps
        self.skipped = 0
        self.stopped_by: signal.Signals | None = None
        self._stop_requests = dict.fromkeys(STOP_SIGNALS, False)

    def __iter__(self) -> Iterator[StepReport]:
        with state.locked(self.run) if self.is_main else nullcontext():
            if self.is_main:
                state.write_or_compare_config(self.run, self.config)
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
        hear of it at the same step.

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
        counts = {"seen": self.seen, "skipped": self.skipped, "seed": self.config.seed}
        record = counts | {"scaler": self.scaler.state_dict()} | self.provenance
        state.save_checkpoint(self.run, self.step, self.trained, record, self.config.keep_checkpoints, self.is_main)

    def averaged(self) -> Model:
        """Returns the moving average as one whole model; where it is in shards, all processes call this, for a copy."""
        average = self.ema.module
        assert isinstance(average, Model)
        if not self.sharded:
            return average
        copy = type(average)(average.config)
        copy.load_state_dict(gather_full_tensors(average.state_dict()))
        return copy.to(self.accelerator.device)

    # -------------------------------------------------------------------------------------------- one step

    def _steps(self) -> Iterator[StepReport]:
        """Takes steps, and writes what is due after each."""
        self.stopped_by = None
        skipped_in_a_row = 0
        while self.step < self.config.steps and not self.interrupted:
            with deterministic_algorithms(self.config.deterministic):
                report = self._train_step()
            skipped_in_a_row = skipped_in_a_row + 1 if report.skipped > self.skipped else 0
            self.skipped = report.skipped
            if skipped_in_a_row >= self.config.max_skipped:
                raise ElitError(self._diverged(skipped_in_a_row))
            self._log(report)
            self._save_where_due()
            yield report
        if self.interrupted:
            self.save()
            self._stop_requests = dict.fromkeys(STOP_SIGNALS, False)
        self.accelerator.wait_for_everyone()  # what the main process writes is there when any of them returns

    def _train_step(self) -> StepReport:
        config, step, processes = self.config, self.step, self.accelerator.num_processes
        level = self.levels.draw(config.seed, step)
        count = self._batch_size(level)
        own = share(count, self.accelerator.process_index, processes)
        indices = sample_indices(config.seed, self.seen, count, len(self.data))[own]
        seed = derive_seed(config.seed, "step", step)
        draws, times = draw(self.flow, config.label_dropout, seed, count, own, self.accelerator.device)
        levels = self._levels(times, level)

        factor = lr_factor(config.optimizer, step, config.steps)
        set_lr(self.trained.optimizers, config.optimizer, factor)
        batches = micro_batches(levels[own], config.micro_batch_size)
        if self.sharded:
            batches = pad_micro_batches(batches, levels, config.micro_batch_size, processes)
        total = self._backward(batches, indices, draws, count)
        mean_loss, *alignment = self._all_reduce_losses_and_stop_requests(total)
        norm = self._update(math.isfinite(mean_loss))
        skipped = self.skipped + (not (math.isfinite(mean_loss) and math.isfinite(norm)))
        self.step, self.seen = step + 1, self.seen + count
        for of_sample in set(levels):
            self.speedometer.add(of_sample, levels.count(of_sample))
        mean_level = levels[0] if len(set(levels)) == 1 else sum(levels) / count
        lr = config.optimizer.lr * factor
        return StepReport(step + 1, mean_loss, norm, lr, mean_level, count, skipped, *(-v for v in alignment))

    def _backward(self, batches: list[Any], indices: Tensor, draws: TrainingDraws, count: int) -> Tensor:
        """Accumulates gradients of micro-batches: this process's part of the mean losses, (1,) or with alignment (2,).

        Args:
            indices, draws: of this process's share of the batch.
            count: samples of the whole batch.
        """
        total = torch.zeros(1 if self.features is None else 2, device=self.accelerator.device)
        for i, batch in enumerate(batches):
            with self._gradient_sync(last=i == len(batches) - 1):
                of_batch = draws.take(batch.indices.to(total.device))
                losses = self._losses(indices[batch.indices], of_batch, batch.level)
                terms = losses.sum(1) * batch.weight / count
                loss = terms[0] + self.config.repa.coefficient * terms[1:].sum()
                # Gradients of processes are averaged, and their losses add up.
                self.scaler.scale(loss * self.accelerator.num_processes).backward()
            total += terms.detach()
        return total

    def _batch_size(self, level: int) -> int:
        """Returns the number of samples of a step at a level, over all processes."""
        if self.config.elit.batching == "constant" or not level:
            return self.config.batch_size
        if level not in self._batch_sizes:
            self._batch_sizes[level] = scaled_batch_size(self.model, level, self.config.batch_size)
        return self._batch_sizes[level]

    def _levels(self, t: Tensor, level: int) -> list[int]:
        """Returns J~ of every sample: the step's, or by the sample's own noise level."""
        by_noise = self.config.elit.by_noise
        if by_noise is None:
            return [level] * len(t)
        return [self.model.level(by_noise(noise)) for noise in self.flow.noise_level(t).tolist()]

    def _gradient_sync(self, last: bool) -> AbstractContextManager[None]:
        """Within it, gradients of processes are averaged after the last micro-batch only."""
        network: Any = self.network
        if self.sharded:
            network.set_requires_gradient_sync(last)
            return nullcontext()
        return nullcontext() if last else self.accelerator.no_sync(network)

    def _losses(self, indices: Tensor, draws: TrainingDraws, level: int) -> Tensor:
        """Computes the losses of each sample of a micro-batch: (1, B), and with alignment (2, B)."""
        x, y = self._batch(indices)
        if y is not None:
            y = self.model.drop_condition(y, draws.dropped)
        with torch.autocast(x.device.type, self.half, enabled=self.half is not None):
            features = None if self.features is None else self.features(indices, x)
            return self.network(x, y, draws, level, features)

    def _batch(self, indices: Tensor) -> tuple[Tensor, Condition | None]:
        """Reads data (B, C, H, W) and labels (B,) at indices (B,); no labels for an unconditional model."""
        x, y = self.data.batch(indices, derive_seed(self.config.seed, "data", self.step))
        device = self.accelerator.device
        return x.to(device), map_condition(lambda v: v.to(device), y) if self.model.conditional else None

    def _all_reduce_losses_and_stop_requests(self, losses: Tensor) -> list[float]:
        """Sums the losses over processes, which also learn here whether one of them was asked to stop."""
        requests = losses.new_tensor([float(self._stop_requests[reason]) for reason in STOP_SIGNALS])
        totals = self.accelerator.reduce(torch.cat((losses, requests)), "sum").tolist()
        asked = totals[len(losses) :]
        self.stopped_by = next((reason for reason, n in zip(STOP_SIGNALS, asked, strict=True) if n), None)
        return totals[: len(losses)]

    def _update(self, finite: bool) -> float:
        """Steps the optimizers and the average, unless loss or gradient are not finite; returns the gradient's norm."""
        optimizers = self.trained.optimizers.values()
        for optimizer in optimizers:
            self.scaler.unscale_(optimizer)
        total_norm: Any = nn.utils.clip_grad_norm_(self.objective.parameters(), self.config.optimizer.clip)
        norm = float(total_norm.full_tensor() if self.sharded else total_norm)
        if finite and math.isfinite(norm):
            for optimizer in optimizers:
                self.scaler.step(optimizer)
            self.ema.update_parameters(self.model)
        self.scaler.update()
        self.objective.zero_grad()
        return norm

    # -------------------------------------------------------------------------------------------- what is trained

    def _features(self) -> AlignmentFeatures | None:
        """Loads what hidden tokens are aligned with, if with anything."""
        repa = self.config.repa
        if repa.encoder is None:
            return None
        model = check_alignment(repa, self.model)
        return AlignmentFeatures(repa.encoder, model, self.data, self.accelerator.device)

    def _objective(self) -> Objective:
        if self.features is None:
            return Objective(self.model, self.flow)
        repa = self.config.repa
        projector = make_projector(self.model, self.features.width, self.config.seed).to(self.accelerator.device)
        return Objective(self.model, self.flow, projector, repa.depth)

    def _parallelize(self) -> nn.Module:
        """Prepares blocks as the configuration says, and wraps the objective for several processes."""
        assert isinstance(self.model, Transformer)
        if self.config.checkpoint_activations:
            apply_activation_checkpointing(self.model.blocks)
        if self.config.compile:
            # What a block gives is looked at from outside where it is aligned, so that one is not compiled.
            aligned = self.config.repa.depth - 1 if self.features is not None else None
            apply_compile(block for i, block in enumerate(self.model.blocks) if i != aligned)
        if not self.sharded:
            return self.accelerator.prepare(self.objective)
        for network, model in ((self.objective, self.model), (self.ema, self.ema.module)):
            assert isinstance(model, Transformer)
            apply_fsdp(network, model.blocks, self.accelerator.num_processes, self.accelerator.device)
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

    # -------------------------------------------------------------------------------------------- the run

    def _resume(self) -> None:
        """Restores the checkpoint to start from, unless this trainer is as far already: it was iterated before."""
        checkpoint = state.checkpoint_to_resume(self.run, self.config.resume)
        if checkpoint is None:
            return
        record = state.read_record(checkpoint)
        if record.get("format", 1) != state.FORMAT and checkpoint.parent.parent.resolve() == self.run.resolve():
            raise ElitError(
                f"{self.run} was started by an earlier version, which drew other noise and levels; to go on from its "
                f"weights in another run: --resume {self.run} --out ANOTHER"
            )
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
        speed = self.last_speed = self.speedometer.read()
        held_out = self.validation.losses(self.averaged(), self.accelerator) if validated else {}
        if self.is_main:
            values: dict[str, Any] = {k: v for k, v in report._asdict().items() if v is not None}
            values |= held_out
            state.append_json_line(self.run / "log.jsonl", values)
            # A file of its own: the log is the same for every run of a configuration, and the speed is not.
            state.append_json_line(self.run / "speed.jsonl", {"step": report.step, **speed._asdict()})
            shown = {k: v for k, v in {**values, **speed._asdict()}.items() if v is not None and k != "step"}
            self.accelerator.log(shown, step=report.step)
        self.speedometer.restart()

    def _save_where_due(self) -> None:
        every = self.config.snapshot_every
        if every and self.step % every == 0:
            state.save_snapshot(self.run, self.step, self.trained, self.is_main)
        if self.step % self.config.checkpoint_every == 0 or self.step == self.config.steps:
            self.save()

    def _diverged(self, steps: int) -> str:
        """Says what to do after so many steps without a finite loss."""
        checkpoint = state.latest(self.run)
        way_on = f"--resume {checkpoint} " if checkpoint else ""
        return (
            f"the loss was not finite for {steps} steps in a row, up to step {self.step}; "
            f"train with a lower --optimizer.lr in another run directory: {way_on}--out ANOTHER"
        )


def check(config: TrainConfig) -> None:
    """Checks the numbers of a configuration that stand for themselves.

    Raises:
        ElitError: one is out of its range, or does not go with another.
    """
    counts = ("steps", "batch_size", "micro_batch_size", "log_every", "checkpoint_every", "keep_checkpoints")
    for name in (*counts, "max_skipped"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ElitError(f"{name} is {getattr(config, name)}; it must be at least 1")
    if config.snapshot_every < 0:
        raise ElitError(f"snapshot_every is {config.snapshot_every}; it must be at least 0")
    for name in ("label_dropout", "ema_decay"):
        if not 0 <= getattr(config, name) <= 1:
            raise ElitError(f"{name} is {getattr(config, name)}; it must be in [0, 1]")
    if config.parallel == "fsdp" and config.optimizer.name == "muon":
        raise ElitError("parallel is fsdp, and optimizer.name muon needs whole matrices; take adamw or parallel ddp")
    if config.parallel == "fsdp" and config.precision == "fp16":
        raise ElitError("precision is fp16, whose loss scale parallel fsdp does not know; take bf16")


def half_precision(config: TrainConfig) -> torch.dtype | None:
    """Returns the dtype of matrix products, where it is not float32."""
    if config.precision == "auto":
        return torch.bfloat16 if torch.cuda.is_available() else None
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[config.precision]


def _accelerator(config: TrainConfig) -> Any:
    """Finds processes, devices and trackers."""
    try:
        import accelerate
        import tensorboard  # noqa: F401
    except ImportError as error:
        raise ElitError(f"training needs {error.name}: pip install 'elit-diffusion[train]'") from error
    if "wandb" in config.trackers and importlib.util.find_spec("wandb") is None:
        raise ElitError("trackers has wandb, which is not installed: pip install wandb")
    if config.precision == "fp16" and not torch.cuda.is_available():
        raise ElitError("precision is fp16, which needs a GPU; take bf16 or fp32")
    accelerator = accelerate.Accelerator(
        cpu=default_device().type == "cpu",  # else processes without a GPU would not find each other
        mixed_precision="no",
        log_with=list(config.trackers),
        project_config=accelerate.utils.ProjectConfiguration(config.out, logging_dir=f"{config.out}/tensorboard"),
        # Buffers are tables of positions, the same everywhere: processes need not tell each other.
        kwargs_handlers=[accelerate.utils.DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    if config.batch_size < accelerator.num_processes:
        raise ElitError(f"batch_size is {config.batch_size}, too small for {accelerator.num_processes} processes")
    return accelerator
