"""Optimizers, learning-rate schedule and the moving average of the weights."""

import math
from collections.abc import Mapping, MutableMapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer

from elit.models import Model
from elit.training.config import OptimizerConfig
from elit.training.parallelize import named_parameters

FUSED = {"qkv": 3, "kv": 2, "text_kv": 2}
"""How many matrices (queries, keys, values) stand above each other in the weight of a linear layer of some name."""


class SplitMuon(Muon):
    """Muon that orthogonalizes queries, keys and values of a fused weight one by one, as separate layers would be.

    Args:
        parameters: matrices.
        parts: of each, how many matrices of equal size stand above each other in it.
        options: of :class:`torch.optim.Muon`.
    """

    def __init__(self, parameters: list[nn.Parameter], parts: list[int], **options: float | str) -> None:
        super().__init__(parameters, **options)  # type: ignore[arg-type]
        self.parts = dict(zip(parameters, parts, strict=True))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Updates the matrices and their momentum, unless ``found_inf`` has been set to 1, as fused optimizers have it.

        That is looked at on the device alone, which keeps what was before until it knows.
        """
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        before = [] if found_inf is None else [(tensor, tensor.clone()) for tensor in self._changed()]
        super().step()
        for tensor, kept in before:
            torch.where(found_inf.bool(), kept, tensor, out=tensor)  # type: ignore[union-attr]

    def _changed(self) -> list[Tensor]:
        """Returns what a step changes: matrices that have gradients, and their momentum."""
        changed: list[Tensor] = []
        for group in self.param_groups:
            gradients: list[Tensor] = []
            super()._init_group(group, changed, gradients, changed)
        return changed

    def _init_group(
        self,
        group: MutableMapping[str, Any],
        params_with_grad: list[Tensor],
        grads: list[Tensor],
        muon_momentum_bufs: list[Tensor],
    ) -> bool:
        """Hands the update, which is in place, the parts of each matrix instead of the whole."""
        whole: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
        has_complex = super()._init_group(group, *whole)
        for parameter, *others in zip(*whole, strict=True):
            into = (params_with_grad, grads, muon_momentum_bufs)
            for tensors, tensor in zip(into, (parameter.detach(), *others), strict=True):
                tensors += tensor.chunk(self.parts[parameter])  # type: ignore[index]
        return has_complex


def named_groups(model: Model, config: OptimizerConfig) -> dict[str, list[str]]:
    """Lists the names of the trainable parameters of each optimizer: ``muon`` (where chosen) and ``adamw``."""
    names = [name for name, p in named_parameters(model) if p.requires_grad]
    if config.name == "adamw":
        return {"adamw": names}
    linear = {id(part.weight) for part in model.modules() if isinstance(part, nn.Linear)}
    inside = {
        name for name, p in named_parameters(model) if id(p) in linear and name.startswith(("blocks.", "interface."))
    }
    return {"muon": [n for n in names if n in inside], "adamw": [n for n in names if n not in inside]}


def make_optimizers(
    parameters: Mapping[str, nn.Parameter], names: Mapping[str, list[str]], config: OptimizerConfig
) -> dict[str, Optimizer]:
    """Makes one optimizer for each list of names, such as :func:`named_groups` gives."""
    groups = {kind: [parameters[name] for name in of_kind] for kind, of_kind in names.items()}
    optimizers: dict[str, Optimizer] = {
        "adamw": AdamW(groups["adamw"], lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=True)
    }
    if "muon" in groups:
        optimizers["muon"] = SplitMuon(
            groups["muon"],
            [FUSED.get(name.split(".")[-2], 1) for name in names["muon"]],
            lr=config.muon_lr,
            weight_decay=config.weight_decay,
            momentum=config.muon_momentum,
            ns_steps=config.muon_ns_steps,
            adjust_lr_fn="original",
        )
    return optimizers


def lr_factor(config: OptimizerConfig, step: int, steps: int) -> float:
    """Returns what multiplies the learning rates at a step: linear warm-up, then constant or a decay to zero."""
    warmup = min(1.0, (step + 1) / max(1, config.warmup_steps))
    start = config.decay_from * steps
    done = min(1.0, max(0.0, (step - start) / max(1.0, steps - start)))
    decay = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[config.decay]
    return warmup * decay


def set_lr(optimizers: Mapping[str, Optimizer], config: OptimizerConfig, factor: float) -> None:
    """Sets the learning rate of each optimizer to a multiple of the configured one."""
    base = {"adamw": config.lr, "muon": config.muon_lr}
    for kind, optimizer in optimizers.items():
        for group in optimizer.param_groups:
            group["lr"] = base[kind] * factor


class MovingAverage(nn.Module):
    """Keeps a moving average of the weights of a model; frozen ones are shared with it.

    After step i = 0, 1, ... its decay is min(decay, (1 + i) / (10 + i)); after the first one it is the weights.

    Args:
        model: whose weights they are.
        decay: the largest.

    Attributes:
        module: a model with the averaged weights.
    """

    def __init__(self, model: Model, decay: float) -> None:
        super().__init__()
        frozen = {id(parameter): parameter for parameter in model.parameters() if not parameter.requires_grad}
        self.module = deepcopy(model, frozen)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: Model, step: int, finite: Tensor) -> None:
        """Takes in the weights of a model after a step.

        Args:
            step: its number, from 0 on: the host counts, for a count on the device would have to be waited for.
            finite: () whether the step changed anything. If not, the average stays as it is.
        """
        weight = finite * (1 - min(self.decay, (1 + step) / (10 + step)) if step else 1.0)
        averages: list[Tensor] = [value for value in self.module.parameters() if value.requires_grad]
        weights: list[Tensor] = [value for value in model.parameters() if value.requires_grad]
        torch._foreach_lerp_(averages, weights, [weight] * len(averages))
