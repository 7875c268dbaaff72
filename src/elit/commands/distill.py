"""`elit distill`: makes a pretrained transformer of diffusers elastic, and trains it on the trainer."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from elit.atomic import atomic_folder
from elit.commands.train import describe, run
from elit.errors import ElitError
from elit.launch import rank_and_world_size
from elit.training import Trainer
from elit.training.distillation import DistillConfig, Memory, build_distillation, estimate_memory

RESULT = "transformer"
"""The folder of a run that holds the elastic transformer, named as in the folder of a pipeline."""


def distill(config: DistillConfig) -> Trainer:
    """Make a pretrained diffusers transformer elastic and distil it into itself; a stopped run continues.

    Raises:
        ElitError: see :class:`Trainer` and :func:`~elit.training.distillation.build_distillation`.
    """
    rank, processes = rank_and_world_size()
    if Path(config.base).resolve() in (Path(config.out).resolve(), (Path(config.out) / RESULT).resolve()):
        raise ElitError(f"out is {config.out}, which holds the base; give another folder, for it would be replaced")
    console = Console(soft_wrap=True, highlight=False, quiet=rank != 0)
    shards = processes if config.parallel == "fsdp" else 1
    console.print(memory_table(estimate_memory(config), config.trainable, shards))
    trainer = Trainer(config, build=build_distillation)
    console.print(describe(trainer, f"{config.base} made elastic"))
    run(trainer, console)
    result = write_result(trainer)
    trainer.accelerator.end_training()
    family = type(trainer.model.transformer).__name__.removeprefix("FSDP")
    console.print(f"done: {result} is a {family}; in Python:")
    console.print(f"  pipe.transformer = elit.integrations.families.{family}.from_pretrained('{result}')", markup=False)
    return trainer


def memory_table(estimates: dict[str, Memory], chosen: str, shards: int = 1) -> Table:
    """Tabulates what each set of trained weights needs in gigabytes on a device, of which one is chosen.

    Args:
        shards: processes that each hold their share.
    """
    of_each = f", on each of {shards} devices" if shards > 1 else ""
    title = f"GB of memory{of_each}, beside activations, for each --trainable"
    table = Table(
        "", "weights", "gradients", "optimizer", "average", "teacher", "total", title=title, box=None, pad_edge=False
    )
    for name, memory in estimates.items():
        sizes = [f"{size / shards / 1e9:,.3g}" for size in (*memory.parts, memory.total)]
        table.add_row(f"{name} <-" if name == chosen else name, *sizes)
    table.columns[0].no_wrap = True
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def write_result(trainer: Trainer) -> Path:
    """Writes the averaged weights as a transformer of diffusers, in place of an earlier one of the run; all processes
    call it.

    Raises:
        ElitError: the disk is full or the folder cannot be written.
    """
    folder = trainer.run / RESULT
    averaged = trainer.averaged()
    if trainer.is_main:
        with atomic_folder(folder, replace=True) as temporary:
            trainer.task.save(averaged, temporary)
    trainer.accelerator.wait_for_everyone()
    return folder
