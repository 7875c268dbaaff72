"""What is known of a step: some of it when it is launched, and the rest when the device is done with it."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


class Numbers:
    """Brings numbers from the device to the host, without waiting for them until they are looked at.

    Args:
        values: (n,), on their device.
    """

    def __init__(self, values: Tensor) -> None:
        self._on_host = values.detach().to("cpu", non_blocking=True)  # into pinned memory
        self._arrived = torch.cuda.Event() if values.is_cuda else None
        if self._arrived is not None:
            self._arrived.record()

    @cached_property
    def values(self) -> list[float]:
        """The numbers; whoever asks first waits for the device."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._on_host.tolist()


@dataclass(frozen=True)
class StepReport:
    """What one step did.

    A step is reported when it is launched. ``loss``, ``grad_norm``, ``terms`` and ``skipped`` are known when the device
    is done with it, and reading one of them waits for that; those of the step before can be had without waiting.

    Attributes:
        step: number of steps done.
        lr: learning rate of AdamW.
        num_latents: J~ of the step, the mean where samples differ; 0 without an interface.
        batch_size: samples of the step, over all processes.
        numbers: on their way from the device: loss, norm of the gradient, 1 if the step was skipped, how many processes
            were asked to stop (by SIGINT, by SIGTERM), and what else the objective computes.
        skipped_before: number of skipped steps before this one.
        names: of what else the objective computes.
    """

    step: int
    lr: float
    num_latents: float
    batch_size: int
    numbers: Numbers = field(repr=False, compare=False)
    skipped_before: int = field(repr=False, compare=False)
    names: tuple[str, ...] = ()

    @property
    def loss(self) -> float:
        """Mean loss of the batch: that of flow matching, or what the base of a distillation was trained with."""
        return self.numbers.values[0]

    @property
    def grad_norm(self) -> float:
        """The norm of the gradient before clipping."""
        return self.numbers.values[1]

    @property
    def skipped(self) -> int:
        """Steps so far whose loss or gradient was not finite, and which changed nothing."""
        return self.skipped_before + int(self.numbers.values[2])

    @property
    def terms(self) -> dict[str, float]:
        """What the objective computes beside the loss, in the mean: ``alignment``, the cosine similarity with the
        features of an encoder (``repa``); or of a distillation ``distillation`` and ``distance``."""
        return dict(zip(self.names, self.numbers.values[5:], strict=True))

    @property
    def alignment(self) -> float | None:
        """Mean cosine similarity with the features of an encoder, where there is one (``repa``)."""
        return self.terms.get("alignment")

    @property
    def stop_requests(self) -> list[float]:
        """How many processes were asked to stop before this step: by SIGINT, and by SIGTERM."""
        return self.numbers.values[3:5]

    def as_dict(self) -> dict[str, Any]:
        """Returns all of it, as a line of the log has it."""
        values = {
            "step": self.step, "loss": self.loss, "grad_norm": self.grad_norm, "lr": self.lr,
            "num_latents": self.num_latents, "batch_size": self.batch_size, "skipped": self.skipped,
        }  # fmt: skip
        return values | self.terms
