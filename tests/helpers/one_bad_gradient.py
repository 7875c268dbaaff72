"""Trains on several processes, of which the last has a gradient that is not finite at the third step.

Run as ``torchrun ... one_bad_gradient.py RUN PARALLEL``.
"""

import sys
from pathlib import Path

from torch import Tensor, nn

from elit.training import OptimizerConfig, Trainer
from tests.helpers.runs import config


def main(run: Path, parallel: str) -> None:
    trainer = Trainer(config(run, steps=5, parallel=parallel, optimizer=OptimizerConfig(lr=1e-3, warmup_steps=5)))
    last = trainer.accelerator.process_index == trainer.accelerator.num_processes - 1

    def poison(layer: nn.Module, inputs: object, output: Tensor) -> None:
        if last and trainer.step == 2:
            output.register_hook(lambda gradient: gradient * float("inf"))

    trainer.model.final.register_forward_hook(poison)
    trainer.run_to_end()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
