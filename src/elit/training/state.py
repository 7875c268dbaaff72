"""A run on disk, and its exact resume.

::

    run/
      config.yaml                    what was asked for
      log.jsonl                      one line per logged step
      speed.jsonl                    how fast it was, likewise
      samples/                       grids, where asked for
      tensorboard/
      checkpoints/step-00001000/     whole or absent; the last few are kept
        config.json                  the model, and
        model.safetensors            its averaged weights: the folder loads as it is
        training.safetensors         raw weights (raw.*), optimizer state (adamw.*, muon.*), the projector (repa.*)
        training.json                step, samples seen, scale of fp16, versions, commit
      snapshots/step-00001000/       whole or absent; all are kept
        config.json, model.safetensors

All randomness of training is a function of (seed, step), so this is all there is to restore.
"""

import fcntl
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from elit.atomic import atomic_file, atomic_folder
from elit.errors import ElitError
from elit.models import Model
from elit.models.files import CONFIG, TRAINING, WEIGHTS, checkpoints, save_model
from elit.tensors import check_fit, read_tensors, write_tensors
from elit.training.config import OptimizerConfig, RunConfig
from elit.training.optim import MovingAverage, lr_factor
from elit.training.parallelize import gather_full_tensors, shard_like

CONFIG_FILE = "config.yaml"
RECORD = "training.json"
FORMAT = 2  # of a checkpoint; 1 drew other noise, and without budgets trained the full one alone
MUTABLE_ON_RESUME = {
    *("out", "resume", "steps", "log_every", "checkpoint_every", "keep_checkpoints", "snapshot_every", "max_skipped"),
    *("validation", "trackers", "micro_batch_size", "parallel", "compile", "checkpoint_activations", "deterministic"),
    "prefetch",
}
"""Settings that a continued run may change."""


@dataclass(frozen=True)
class Trained:
    """What training changes, whole or in shards.

    Attributes:
        model: the raw weights.
        ema: their moving average.
        projector: of alignment with an encoder, or None.
        optimizers: by kind (adamw, muon).
        names: of the parameters of each optimizer, in its order.
    """

    model: Model
    ema: MovingAverage
    projector: nn.Module | None
    optimizers: dict[str, Optimizer]
    names: dict[str, list[str]]

    def tensors(self) -> dict[str, Tensor]:
        """Collects all tensors but the average, by their names in ``training.safetensors``."""
        found = {f"raw.{k}": v for k, v in self.model.state_dict().items()}
        found |= {} if self.projector is None else {f"repa.{k}": v for k, v in self.projector.state_dict().items()}
        for kind, optimizer in self.optimizers.items():
            found |= optimizer_tensors(kind, optimizer, self.names[kind])
        return found


def optimizer_tensors(kind: str, optimizer: Optimizer, names: list[str]) -> dict[str, Tensor]:
    """Collects the state of an optimizer under names ``kind.PARAMETER.KEY``."""
    state = optimizer.state_dict()["state"]
    return {f"{kind}.{names[i]}.{key}": value for i, entry in state.items() for key, value in entry.items()}


def restore_optimizer(kind: str, optimizer: Optimizer, names: list[str], tensors: dict[str, Tensor]) -> None:
    """Loads full tensors, as :func:`optimizer_tensors` names them, into the state of an optimizer."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for i, (name, parameter) in enumerate(zip(names, parameters, strict=True)):
        entry = _under(f"{kind}.{name}.", tensors)
        # "a.weight" also begins "a.weight.b"; a key of optimizer state has no dot
        state[i] = {k: shard_like(v, parameter) for k, v in entry.items() if "." not in k}
    filled = {i: entry for i, entry in state.items() if entry}
    optimizer.load_state_dict({"state": filled, "param_groups": optimizer.state_dict()["param_groups"]})


def restore_module(module: nn.Module, tensors: dict[str, Tensor], source: Path) -> None:
    """Loads full tensors into a module, which may be in shards.

    Raises:
        ElitError: they do not fit.
    """
    wanted = module.state_dict()
    check_fit(wanted, tensors, source)
    module.load_state_dict({k: shard_like(v, wanted[k]) for k, v in tensors.items()})


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


# ------------------------------------------------------------------------------------------------ checkpoints


def save_checkpoint(run: Path, step: int, trained: Trained, extra: dict[str, Any], keep: int, main: bool) -> None:
    """Writes the checkpoint of a step, whole or not at all, and removes all but the last ``keep``.

    All processes call it, for shards are put together; the main one writes.

    Raises:
        ElitError: the disk is full or the folder cannot be written; earlier checkpoints stay.
    """
    averaged = trained.ema.module
    weights = gather_full_tensors(averaged.state_dict(), keep=main)
    tensors = gather_full_tensors(trained.tensors(), keep=main)
    target = run / "checkpoints" / name_of(step)
    if not main or target.exists():
        return
    record = {"format": FORMAT, "step": step, **extra}
    try:
        with atomic_folder(target) as folder:
            save_model(averaged, folder, weights)
            write_tensors(folder / TRAINING, tensors)
            (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n")
    except ElitError as error:
        before = latest(run)
        safe = f"the last checkpoint, {before}, is whole" if before else "there is no checkpoint yet"
        raise ElitError(f"{error}; {safe}: make room and run the same command again") from error
    for old in checkpoints(run)[: -max(1, keep)]:
        shutil.rmtree(old)


def save_snapshot(run: Path, step: int, averaged: Model, save: Callable[[Model, Path], None], main: bool) -> None:
    """Writes the averaged weights of a step alone, a quarter of a checkpoint, into ``snapshots``, where they stay.

    Args:
        averaged: the model that holds them, whole.
        save: writes a model into a folder.
        main: whether this is the process that writes.

    Raises:
        ElitError: the disk is full or the folder cannot be written.
    """
    target = run / "snapshots" / name_of(step)
    if main and not target.exists():
        with atomic_folder(target) as folder:
            save(averaged, folder)


def drop_snapshots(run: Path, step: int) -> None:
    """Removes snapshots of later steps: training writes them again."""
    for folder in run.glob("snapshots/step-*"):
        if folder.name > name_of(step):
            shutil.rmtree(folder)


def name_of(step: int) -> str:
    """Returns the name of the folder of a step."""
    return f"step-{step:08d}"


def read_record(folder: Path) -> dict[str, Any]:
    """Reads what a checkpoint says of itself (``step``, ...).

    Raises:
        ElitError: it is missing or damaged.
    """
    try:
        return json.loads((folder / RECORD).read_text())
    except (OSError, ValueError) as error:
        raise ElitError(
            f"{folder / RECORD} is missing or damaged; remove {folder} to go back one checkpoint"
        ) from error


def restore_checkpoint(folder: Path, trained: Trained) -> None:
    """Restores all tensors from a checkpoint, bit for bit.

    Raises:
        ElitError: a file is missing or damaged, or belongs to another model.
    """
    tensors = read_tensors(folder / TRAINING)
    restore_module(trained.model, _under("raw.", tensors), folder / TRAINING)
    restore_module(trained.ema.module, read_tensors(folder / WEIGHTS), folder / WEIGHTS)
    if trained.projector is not None:
        projector = _under("repa.", tensors)
        if not projector:
            raise ElitError(f"repa.encoder is set, but {folder} was trained without; start a run of its own")
        restore_module(trained.projector, projector, folder / TRAINING)
    for kind, optimizer in trained.optimizers.items():
        restore_optimizer(kind, optimizer, trained.names[kind], tensors)


# ------------------------------------------------------------------------------------------------ the run directory


def check_resume(run: Path, config: RunConfig) -> Path | None:
    """Finds the checkpoint that training starts from, after a look whether the configuration may go on from it.

    Raises:
        ElitError: ``resume`` has none, or the run was started by an earlier version or with another setting, or its
            learning rate would jump.
    """

    checkpoint, own = checkpoint_to_resume(run, config.resume), latest(run)
    if own is None:
        return checkpoint
    record = read_record(own)
    if record.get("format", 1) != FORMAT:
        raise ElitError(
            f"{run} was started by an earlier version, which drew other noise and levels; to go on from its "
            f"weights in another run: --resume {run} --out ANOTHER"
        )
    if not (run / CONFIG_FILE).exists():
        return checkpoint
    settings, defaults = _as_yaml(config), _defaults_of(config)
    # A setting that came with a later version of the library had its default.
    before = with_defaults(read_config(run), defaults)
    for key in sorted(settings.keys() - MUTABLE_ON_RESUME):
        if before[key] != settings[key]:
            raise ElitError(
                f"{run} was started with {key} = {before[key]!r}, not {settings[key]!r}; "
                "continue it with the same settings or choose another out"
            )
    _check_schedule(config.optimizer, record["step"], before["steps"], config.steps, own)
    return checkpoint


def write_config(run: Path, config: RunConfig) -> None:
    """Stores a run's configuration."""
    import yaml

    with atomic_file(run / CONFIG_FILE) as temporary:
        temporary.write_text(yaml.safe_dump(_as_yaml(config), sort_keys=False))


def read_config(run: Path) -> dict[str, Any]:
    """Reads a run's configuration; nothing where there is none."""
    import yaml

    file = run / CONFIG_FILE
    return yaml.safe_load(file.read_text()) or {} if file.exists() else {}


def _as_yaml(config: RunConfig) -> dict[str, Any]:
    """Returns a configuration as YAML has it: no tuples."""
    return json.loads(json.dumps(asdict(config)))


def _defaults_of(config: RunConfig) -> dict[str, Any]:
    """Returns the defaults of a configuration as YAML has them; what has none is as it is given."""
    needed = {each.name for each in fields(config) if each.default is MISSING and each.default_factory is MISSING}
    return _as_yaml(type(config)(**{name: getattr(config, name) for name in needed}))


def with_defaults(settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Adds the defaults that are missing to settings, at every depth."""
    merged = {**defaults, **settings}
    for key, default in defaults.items():
        if isinstance(default, Mapping) and isinstance(merged[key], Mapping):
            merged[key] = with_defaults(merged[key], default)
    return merged


def _check_schedule(config: OptimizerConfig, step: int, before: int, steps: int, checkpoint: Path) -> None:
    """Raises:
    ElitError: there are more steps already; or with another number of them, the decay has brought the learning rate
        somewhere else by now.
    """
    if step > steps:
        raise ElitError(
            f"steps is {steps}, and {checkpoint} has done {step} already; give at least as many, or another out"
        )
    was, would_be = lr_factor(config, step, before), lr_factor(config, step, steps)
    if was != would_be:
        raise ElitError(
            f"steps is {steps} and was {before}: the learning rate, which decays over all steps, would jump from "
            f"{was:.3g} to {would_be:.3g} of its peak at step {step}; keep steps, or give another out and --resume "
            f"{checkpoint}"
        )


def append_json_line(path: Path, values: Mapping[str, Any]) -> None:
    """Appends values to a log; a number that is not finite is null there, for JSON has no NaN."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
    with path.open("a") as log:
        log.write(json.dumps(finite, allow_nan=False) + "\n")


def truncate_log(path: Path, step: int) -> None:
    """Drops lines of a run's log that come after a step: training writes them again."""
    if path.exists():
        kept = [line for line in path.read_text().splitlines() if _step_of(line) <= step]
        with atomic_file(path) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in kept))


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except ValueError:  # cut short by a kill
        return math.inf


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Holds a run directory for one process; the lock goes with the process, however it ends.

    Raises:
        ElitError: another process trains there.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        handle = (run / ".lock").open("w")
    except OSError as error:
        raise ElitError(f"cannot write to {run}: {error.strerror}") from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ElitError(f"another process is training in {run}; wait for it or choose another out") from error
        yield


def checkpoint_to_resume(run: Path, resume: str | None) -> Path | None:
    """Finds the checkpoint that training starts from: the run's own latest, else that of ``resume`` (a run or a
    checkpoint).

    Raises:
        ElitError: ``resume`` is neither, or an earlier checkpoint of this very run.
    """
    own = latest(run)
    if resume is None:
        return own
    given = Path(resume)
    wanted = given if (given / RECORD).is_file() else latest(given)
    if wanted is None:
        raise ElitError(f"resume is {resume}, which is neither a checkpoint (step-...) nor a run that has one")
    if own is not None and wanted.resolve() != own.resolve() and wanted.resolve().parent == own.resolve().parent:
        raise ElitError(f"resume is {resume}, but {run} is already at {own.name}; remove what follows to go back")
    return own or wanted


def latest(run: Path) -> Path | None:
    """Finds the last whole checkpoint of a run."""
    found = [folder for folder in checkpoints(run) if (folder / CONFIG).exists()]
    return found[-1] if found else None
