"""The trainer: an iterable of steps, on one process or many.

Everything random in a step (data order, noise, times, dropped labels, budget) is a function of (seed, step) and of the
place in the global batch. A run that is killed therefore goes on from its last checkpoint to the very bits that it
would have reached, and processes agree without talking: what they exchange are gradients, losses and whether to stop.
"""

import importlib.util
import json
import math
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from elit.conditions import Condition, map_condition
from elit.data import Captioned, Data, open_data, sample_indices
from elit.errors import ElitError
from elit.flow import path_named
from elit.launch import default_device
from elit.models import MMDiT, MMDiTConfig, Model, Transformer, config_for, create
from elit.seeding import derive_seed, torch_seeded
from elit.training import state
from elit.training.batch import Draws, as_many_for_all, draw, micro_batches, share
from elit.training.budgets import scaled_batch_size, training_levels
from elit.training.config import TrainConfig
from elit.training.objective import Objective
from elit.training.optim import lr_factor, make_ema, make_optimizers, named_groups, set_lr
from elit.training.provenance import provenance
from elit.training.repa import Features, check_alignment, make_projector
from elit.training.sharding import shard, whole
from elit.training.speed import Speed, Speedometer, peak_flops
from elit.training.validation import Validation

STOPPING = (signal.SIGINT, signal.SIGTERM)


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


def build_model(config: TrainConfig, data: Data) -> Model:
    """A new model that fits the data, with weights from the seed, and with the empty prompt of captions.

    Raises:
        ElitError: a name or field that does not exist, or sizes that do not fit.
    """
    channels, *size = data.shape
    fitted: dict[str, Any] = {"in_channels": channels, "num_classes": data.num_classes, "input_size": tuple(size)}
    if config.elit.group_size is not None:
        if "group_size" in config.model.fields:
            raise ElitError("group_size is given twice, in elit and in model.fields; leave one out")
        fitted["group_size"] = config.elit.group_size
    empty = None
    if isinstance(data, Captioned):
        if not isinstance(config_for(config.model.name), MMDiTConfig):
            raise ElitError(
                f"the data have captions; take a model of text like ELIT-MMDiT-B/2, not {config.model.name}"
            )
        empty = data.encode([""])
        fitted |= {"text_width": empty.tokens.shape[2], "empty_length": int(empty.mask.sum())}
    with torch_seeded(config.seed, "weights"):
        try:
            model = create(config.model.name, **(fitted | config.model.fields))
        except ElitError as error:
            if config.elit.group_size is not None and "group size" in str(error):
                raise ElitError(f"elit.group_size: {error}") from error
            raise
    if isinstance(model, MMDiT) and empty is not None:
        model.set_empty_prompt(empty)
    return model


class Trainer:
    """Trains a model as a configuration says, continuing the run directory's last checkpoint.

    ``for report in trainer: ...`` does one step per turn; leaving the loop early leaves a run that can be continued.
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
        stopped_by: the signal that ended training before its last step, in this process or another; None without.

    Raises:
        ElitError: a setting that does not fit, or a run directory that cannot be used.
    """

    def __init__(self, config: TrainConfig, data: Data | None = None, held_out: Data | None = None) -> None:
        check(config)
        self.config = config
        self.run = Path(config.out)
        state.to_continue(self.run, config.resume)  # a wrong path is told before anything is built
        if data is None:
            data = open_data(config.data, text_encoder=config.text_encoder, flips=config.flips)
        self.data = data
        self.path = path_named(config.path)
        self.model = build_model(config, self.data)
        self.levels = training_levels(config.elit, self.model)
        self.validation = Validation(config, self.model, held_out)
        self.accelerator = _accelerator(config)
        self.model.to(self.accelerator.device)
        self.ema = make_ema(self.model, config.ema_decay)
        self.features = self._features()
        self.objective = self._objective()
        self.sharded = config.parallel == "fsdp" and self.accelerator.num_processes > 1
        if self.sharded:
            self._shard()
        self.trained = self._trained()
        self.half = half_precision(config)
        self.scaler = torch.amp.GradScaler(self.accelerator.device.type, enabled=self.half == torch.float16)
        peak = peak_flops(self.accelerator.device) if self.half else None
        self.speedometer = Speedometer(self.model, peak and peak * self.accelerator.num_processes)
        self.last_speed: Speed | None = None
        self._batch_sizes: dict[int, int] = {}  # by level, where they are scaled
        self.provenance = provenance()
        self.step = 0
        self.seen = 0  # samples, over all steps
        self.skipped = 0
        self.stopped_by: signal.Signals | None = None
        self._told = dict.fromkeys(STOPPING, False)  # signals here, of which all processes hear at the next step

    def __iter__(self) -> Iterator[StepReport]:
        with ExitStack() as stack:
            if self.is_main:
                stack.enter_context(state.locked(self.run))
                state.write_or_compare_config(self.run, self.config)
            stack.enter_context(_stop_on_signals(self))
            self.accelerator.wait_for_everyone()
            self._resume()
            network = self._wrap()
            self._start_log()
            skipped_in_a_row = 0
            while self.step < self.config.steps and not self.interrupted:
                report = self._train_step(network)
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
            if self.interrupted:
                self.save()
            self.accelerator.wait_for_everyone()  # what the main process writes is there when any of them returns
            self.accelerator.end_training()

    def run_to_end(self) -> None:
        """All steps, without looking at them."""
        for _ in self:
            pass

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes."""
        return self.accelerator.is_main_process

    @property
    def interrupted(self) -> bool:
        """Whether a signal (Ctrl-C, SIGTERM) ended training before its last step."""
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
        """The moving average as one whole model; where it is in shards, all processes call this, for a copy."""
        average = self.ema.module
        assert isinstance(average, Model)
        if not self.sharded:
            return average
        copy = type(average)(average.config)
        copy.load_state_dict(whole(average.state_dict()))
        return copy.to(self.accelerator.device)

    # -------------------------------------------------------------------------------------------- one step

    def _train_step(self, network: nn.Module) -> StepReport:
        config, step, processes = self.config, self.step, self.accelerator.num_processes
        level = self.levels.draw(config.seed, step)
        count = self._batch_size(level)
        mine = share(count, self.accelerator.process_index, processes)
        indices = sample_indices(config.seed, self.seen, count, len(self.data))[mine]
        seed = derive_seed(config.seed, "step", step)
        draws, times = draw(config, self.model, self.path, seed, count, mine, self.accelerator.device)
        levels = self._levels(times, level)

        factor = lr_factor(config.optimizer, step, config.steps)
        set_lr(self.trained.optimizers, config.optimizer, factor)
        parts = micro_batches(levels[mine], config.micro_batch_size)
        if self.sharded:
            parts = as_many_for_all(parts, levels, config.micro_batch_size, processes)
        total = torch.zeros(1 if self.features is None else 2, device=self.accelerator.device)
        for i, part in enumerate(parts):
            with self._sync(network, last=i == len(parts) - 1):
                of_part = draws.take(part.places.to(total.device))
                terms = self._losses(network, indices[part.places], of_part, part.level).sum(1) * part.weight / count
                loss = terms[0] + config.repa.coefficient * terms[1:].sum()
                self.scaler.scale(loss * processes).backward()  # gradients of processes are averaged
            total += terms.detach()
        mean_loss, *alignment = self._agree(total)
        norm = self._update(math.isfinite(mean_loss))
        skipped = self.skipped + (not (math.isfinite(mean_loss) and math.isfinite(norm)))
        self.step, self.seen = step + 1, self.seen + count
        for of_sample in set(levels):
            self.speedometer.add(of_sample, levels.count(of_sample))
        mean_level = level if len(set(levels)) == 1 else sum(levels) / count
        lr = config.optimizer.lr * factor
        return StepReport(step + 1, mean_loss, norm, lr, mean_level, count, skipped, *(-v for v in alignment))

    def _batch_size(self, level: int) -> int:
        """Samples of a step at a level, over all processes."""
        if self.config.elit.batching == "constant" or not level:
            return self.config.batch_size
        if level not in self._batch_sizes:
            self._batch_sizes[level] = scaled_batch_size(self.model, level, self.config.batch_size)
        return self._batch_sizes[level]

    def _levels(self, t: Tensor, level: int) -> list[int]:
        """J~ of every sample: the step's, or by the sample's own noise level."""
        by_noise = self.config.elit.by_noise
        return [level] * len(t) if by_noise is None else [self.model.level(by_noise(time)) for time in t.tolist()]

    def _sync(self, network: Any, last: bool) -> AbstractContextManager[None]:
        """Within it, gradients of processes are averaged after the last micro-batch only."""
        if self.sharded:
            network.set_requires_gradient_sync(last)
            return nullcontext()
        return nullcontext() if last else self.accelerator.no_sync(network)

    def _losses(self, network: nn.Module, indices: Tensor, draws: Draws, level: int) -> Tensor:
        """Losses of each sample of a micro-batch: (1, B), and with alignment (2, B)."""
        x, y = self._batch(indices)
        if y is not None:
            y = self.model.drop_condition(y, draws.dropped)
        budget = level / self.model.num_latents if level else None
        with torch.autocast(x.device.type, self.half, enabled=self.half is not None):
            features = None if self.features is None else self.features(indices, x)
            return network(x, y, draws, budget, features)

    def _batch(self, indices: Tensor) -> tuple[Tensor, Condition | None]:
        """Data (B, C, H, W) and labels (B,) at indices (B,); no labels for an unconditional model."""
        x, y = self.data.batch(indices, derive_seed(self.config.seed, "data", self.step))
        device = self.accelerator.device
        return x.to(device), map_condition(lambda v: v.to(device), y) if self.model.conditional else None

    def _agree(self, losses: Tensor) -> list[float]:
        """The losses summed over processes, which also learn here whether one of them was told to stop."""
        told = torch.cat((losses, losses.new_tensor([float(self._told[kind]) for kind in STOPPING])))
        totals = self.accelerator.reduce(told, "sum").tolist()
        signals = totals[len(losses) :]
        self.stopped_by = next((kind for kind, count in zip(STOPPING, signals, strict=True) if count), None)
        return totals[: len(losses)]

    def _update(self, finite: bool) -> float:
        """A step of the optimizers and the average, unless loss or gradient are not finite: the gradient's norm."""
        optimizers = self.trained.optimizers.values()
        for optimizer in optimizers:
            self.scaler.unscale_(optimizer)
        of_all: Any = nn.utils.clip_grad_norm_(self.objective.parameters(), self.config.optimizer.clip)
        norm = float(of_all.full_tensor() if self.sharded else of_all)
        if finite and math.isfinite(norm):
            for optimizer in optimizers:
                self.scaler.step(optimizer)
            self.ema.update_parameters(self.model)
        self.scaler.update()
        self.objective.zero_grad()
        return norm

    # -------------------------------------------------------------------------------------------- the run

    def _features(self) -> Features | None:
        """What hidden tokens are aligned with, if with anything."""
        repa = self.config.repa
        if repa.encoder is None:
            return None
        model = check_alignment(repa, self.model)
        return Features(repa.encoder, model, self.data, self.accelerator.device)

    def _objective(self) -> Objective:
        if self.features is None:
            return Objective(self.model, self.path)
        repa = self.config.repa
        projector = make_projector(self.model, self.features.width, self.config.seed).to(self.accelerator.device)
        return Objective(self.model, self.path, projector, repa.depth)

    def _shard(self) -> None:
        for network, model in ((self.objective, self.model), (self.ema, self.ema.module)):
            assert isinstance(model, Transformer)
            shard(network, model.blocks, self.accelerator.num_processes, self.accelerator.device)

    def _trained(self) -> state.Trained:
        """With optimizers of the parameters as they are now, whole or in shards."""
        projector, names = self.objective.projector, named_groups(self.model, self.config.optimizer)
        parameters = dict(self.model.named_parameters())
        if projector is not None:
            more = {f"repa.{name}": parameter for name, parameter in projector.named_parameters()}
            parameters, names["adamw"] = parameters | more, names["adamw"] + list(more)
        optimizers = make_optimizers(parameters, names, self.config.optimizer)
        return state.Trained(self.model, self.ema, projector, optimizers, names)

    def _wrap(self) -> nn.Module:
        """What is trained: blocks prepared, and gradients averaged over processes."""
        prepare_blocks(self.model, self.config)
        if self.sharded:
            return self.objective
        # Buffers are tables of positions, the same everywhere: processes need not tell each other.
        buffers = [name for name, _ in self.objective.named_buffers()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self.objective, buffers)
        return self.accelerator.prepare(self.objective)

    def _resume(self) -> None:
        checkpoint = state.to_continue(self.run, self.config.resume)
        if checkpoint is None:
            return
        record = state.restore_checkpoint(checkpoint, self.trained)
        self.step, self.seen, self.skipped = record["step"], record["seen"], record["skipped"]
        if self.scaler.is_enabled() and record["scaler"]:
            self.scaler.load_state_dict(record["scaler"])

    def _start_log(self) -> None:
        if self.is_main:
            for name in ("log.jsonl", "speed.jsonl"):
                state.truncate_log(self.run / name, self.step)
        # Events of steps after the checkpoint are hidden: training writes them again.
        self.accelerator.init_trackers("elit", init_kwargs={"tensorboard": {"purge_step": self.step + 1}})
        self.speedometer.restart()

    def _log(self, report: StepReport) -> None:
        """Lines of the log, before a checkpoint of the same step: a resumed run finds them or writes them again."""
        validated = self.validation.due(report.step)
        if report.step % self.config.log_every and report.step != self.config.steps and not validated:
            return
        speed = self.last_speed = self.speedometer.read()
        held_out = self.validation.losses(self.averaged(), self.accelerator) if validated else {}
        if self.is_main:
            values: dict[str, Any] = {k: v for k, v in report._asdict().items() if v is not None}
            values |= held_out
            _append(self.run / "log.jsonl", values)
            # A file of its own: the log is the same for every run of a configuration, and the speed is not.
            _append(self.run / "speed.jsonl", {"step": report.step, **speed._asdict()})
            shown = {k: v for k, v in {**values, **speed._asdict()}.items() if v is not None and k != "step"}
            self.accelerator.log(shown, step=report.step)
        self.speedometer.restart()


def prepare_blocks(model: Model, config: TrainConfig) -> None:
    """Compiles the blocks, and has them compute activations again in the backward, as a configuration says.

    The forward of a model knows of neither. Blocks share one compilation, whose number of tokens and batch are
    dynamic: another budget is not another compilation.
    """
    assert isinstance(model, Transformer)
    for block in model.blocks:
        forward: Callable[..., Any] = block.forward
        if config.compile:
            forward = torch.compile(forward, dynamic=True)
        if config.checkpoint_activations:
            forward = partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)
        block.forward = forward


def _append(path: Path, values: dict[str, Any]) -> None:
    with path.open("a") as log:
        log.write(json.dumps(values) + "\n")


def check(config: TrainConfig) -> None:
    """Raises:
    ElitError: a number of the configuration is out of its range.
    """
    counts = ("steps", "batch_size", "micro_batch_size", "log_every", "checkpoint_every", "keep_checkpoints")
    for name in (*counts, "max_skipped"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ElitError(f"{name} is {getattr(config, name)}; it must be at least 1")
    for name in ("label_dropout", "ema_decay"):
        if not 0 <= getattr(config, name) <= 1:
            raise ElitError(f"{name} is {getattr(config, name)}; it must be in [0, 1]")
    if config.parallel == "fsdp" and config.optimizer.name == "muon":
        raise ElitError("parallel is fsdp, and optimizer.name muon needs whole matrices; take adamw or parallel ddp")
    if config.parallel == "fsdp" and config.precision == "fp16":
        raise ElitError("precision is fp16, whose loss scale parallel fsdp does not know; take bf16")


def _accelerator(config: TrainConfig) -> Any:
    """Processes, devices and trackers."""
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
        mixed_precision="no",  # its setting holds for the process, ours for a trainer
        log_with=list(config.trackers),
        project_config=accelerate.utils.ProjectConfiguration(config.out, logging_dir=f"{config.out}/tensorboard"),
    )
    if config.batch_size < accelerator.num_processes:
        raise ElitError(f"batch_size is {config.batch_size}, too small for {accelerator.num_processes} processes")
    return accelerator


def half_precision(config: TrainConfig) -> torch.dtype | None:
    """The dtype of matrix products, where it is not float32."""
    if config.precision == "auto":
        return torch.bfloat16 if torch.cuda.is_available() else None
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[config.precision]


@contextmanager
def _stop_on_signals(trainer: Trainer) -> Iterator[None]:
    """SIGINT and SIGTERM end the loop after a step that all processes end with, so that what is saved is consistent."""

    def stop(kind: int, _: object) -> None:
        trainer._told[signal.Signals(kind)] = True

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {kind: signal.signal(kind, stop) for kind in STOPPING}
    try:
        yield
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
