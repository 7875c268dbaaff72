"""A run on disk, and its exact resume.

::

    run/
      config.yaml                    what was asked for
      log.jsonl                      one line per logged step
      speed.jsonl                    how fast it was, likewise
      samples/                       grids, where asked for
      tensorboard/
      checkpoints/step-00001000/     whole or absent
        config.json                  the model, and
        model.safetensors            its averaged weights: the folder loads as it is
        training.safetensors         raw weights (raw.*), optimizer state (adamw.*, muon.*), the projector (repa.*)
        training.json                step, samples seen, scale of fp16, versions, commit

All randomness of training is a function of (seed, step), so this is all there is to restore.
"""

import fcntl
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from elit.atomic import atomic_file, atomic_folder
from elit.errors import ElitError
from elit.models import Model
from elit.models.files import (
    CONFIG,
    TRAINING,
    WEIGHTS,
    check_fit,
    checkpoints,
    read_tensors,
    save_model,
    write_tensors,
)
from elit.training.config import TrainConfig
from elit.training.sharding import like, whole

RECORD = "training.json"
GROWING = {
    *("out", "resume", "steps", "log_every", "checkpoint_every", "keep_checkpoints", "max_skipped", "validation"),
    *("trackers", "micro_batch_size", "parallel", "compile", "checkpoint_activations"),
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
    ema: AveragedModel
    projector: nn.Module | None
    optimizers: dict[str, Optimizer]
    names: dict[str, list[str]]

    def tensors(self) -> dict[str, Tensor]:
        """All but the average, by their names in ``training.safetensors``."""
        found = {f"raw.{k}": v for k, v in self.model.state_dict().items()}
        found |= {} if self.projector is None else {f"repa.{k}": v for k, v in self.projector.state_dict().items()}
        for kind, optimizer in self.optimizers.items():
            found |= optimizer_tensors(kind, optimizer, self.names[kind])
        return found


def optimizer_tensors(kind: str, optimizer: Optimizer, names: list[str]) -> dict[str, Tensor]:
    """State of an optimizer under names ``kind.PARAMETER.KEY``."""
    state = optimizer.state_dict()["state"]
    return {f"{kind}.{names[i]}.{key}": value for i, entry in state.items() for key, value in entry.items()}


def restore_optimizer(kind: str, optimizer: Optimizer, names: list[str], tensors: dict[str, Tensor]) -> None:
    """The inverse of :func:`optimizer_tensors`, from whole tensors."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for i, (name, parameter) in enumerate(zip(names, parameters, strict=True)):
        entry = _under(f"{kind}.{name}.", tensors)
        # "a.weight" also begins "a.weight.b"; a key of optimizer state has no dot
        state[i] = {k: like(v, parameter) for k, v in entry.items() if "." not in k}
    filled = {i: entry for i, entry in state.items() if entry}
    optimizer.load_state_dict({"state": filled, "param_groups": optimizer.state_dict()["param_groups"]})


def restore_module(module: nn.Module, tensors: dict[str, Tensor], source: Path) -> None:
    """Weights of a module, which may be in shards, from whole tensors.

    Raises:
        ElitError: they do not fit.
    """
    wanted = module.state_dict()
    check_fit(wanted, tensors, source)
    module.load_state_dict({k: like(v, wanted[k]) for k, v in tensors.items()})


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def save_checkpoint(run: Path, step: int, trained: Trained, extra: dict[str, Any], keep: int, main: bool) -> None:
    """Writes the checkpoint of a step, whole or not at all, and removes all but the last ``keep``.

    All processes call it, for shards are put together; the main one writes.

    Raises:
        ElitError: the disk is full or the folder cannot be written; earlier checkpoints stay.
    """
    averaged = trained.ema.module
    assert isinstance(averaged, Model)
    weights, tensors = whole(averaged.state_dict(), keep=main), whole(trained.tensors(), keep=main)
    target = run / "checkpoints" / f"step-{step:08d}"
    if not main or target.exists():
        return
    record = {"step": step, "averaged": int(trained.ema.n_averaged), **extra}
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


def restore_checkpoint(folder: Path, trained: Trained) -> dict[str, Any]:
    """Restores everything from a checkpoint, bit for bit, and returns its record (``step``, ...).

    Raises:
        ElitError: a file is missing or damaged, or belongs to another model.
    """
    try:
        record = json.loads((folder / RECORD).read_text())
    except (OSError, ValueError) as error:
        raise ElitError(
            f"{folder / RECORD} is missing or damaged; remove {folder} to go back one checkpoint"
        ) from error
    tensors = read_tensors(folder / TRAINING)
    restore_module(trained.model, _under("raw.", tensors), folder / TRAINING)
    restore_module(trained.ema.module, read_tensors(folder / WEIGHTS), folder / WEIGHTS)
    trained.ema.n_averaged.fill_(record["averaged"])
    if trained.projector is not None:
        projector = _under("repa.", tensors)
        if not projector:
            raise ElitError(f"repa.encoder is set, but {folder} was trained without; start a run of its own")
        restore_module(trained.projector, projector, folder / TRAINING)
    for kind, optimizer in trained.optimizers.items():
        restore_optimizer(kind, optimizer, trained.names[kind], tensors)
    return record


# ------------------------------------------------------------------------------------------------ the run directory


def write_or_compare_config(run: Path, config: TrainConfig) -> None:
    """Stores a run's configuration, or checks that a run to be continued has the same.

    Raises:
        ElitError: the run was started with another setting.
    """
    import yaml

    settings, defaults = (json.loads(json.dumps(asdict(c))) for c in (config, TrainConfig()))  # as in YAML: no tuples
    path = run / "config.yaml"
    if path.exists() and checkpoints(run):
        before = defaults | (yaml.safe_load(path.read_text()) or {})  # a setting that came later had its default
        for key in sorted(settings.keys() - GROWING):
            if before[key] != settings[key]:
                raise ElitError(
                    f"{run} was started with {key} = {before[key]!r}, not {settings[key]!r}; "
                    "continue it with the same settings or choose another out"
                )
    with atomic_file(path) as temporary:
        temporary.write_text(yaml.safe_dump(settings, sort_keys=False))


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
        return float("inf")


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


def to_continue(run: Path, resume: str | None) -> Path | None:
    """The checkpoint that training starts from: the run's own latest, else that of ``resume`` (a run or a checkpoint).

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
    """The last whole checkpoint of a run."""
    found = [folder for folder in checkpoints(run) if (folder / CONFIG).exists()]
    return found[-1] if found else None
