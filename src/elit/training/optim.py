"""Optimizers, learning-rate schedule and the moving average of the weights."""

import math

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer
from torch.optim.swa_utils import AveragedModel

from elit.models import Model
from elit.training.config import OptimizerConfig

Tensors = tuple[Tensor, ...] | list[Tensor]


def named_groups(model: Model, config: OptimizerConfig) -> dict[str, list[str]]:
    """Names of the trainable parameters of each optimizer: ``muon`` (where chosen) and ``adamw``."""
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    if config.name == "adamw":
        return {"adamw": names}
    matrices = {
        f"{owner}.{name}"
        for owner, part in model.named_modules()
        if isinstance(part, nn.Linear) and owner.startswith(("blocks.", "interface."))
        for name in ("weight",)
    }
    return {"muon": [n for n in names if n in matrices], "adamw": [n for n in names if n not in matrices]}


def make_optimizers(
    parameters: dict[str, nn.Parameter], names: dict[str, list[str]], config: OptimizerConfig
) -> dict[str, Optimizer]:
    """One optimizer for each list of names, such as :func:`named_groups` gives."""
    groups = {kind: [parameters[name] for name in of_kind] for kind, of_kind in names.items()}
    optimizers: dict[str, Optimizer] = {
        "adamw": AdamW(groups["adamw"], lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=True)
    }
    if "muon" in groups:
        optimizers["muon"] = Muon(
            groups["muon"],
            lr=config.muon_lr,
            weight_decay=config.weight_decay,
            momentum=config.muon_momentum,
            ns_steps=config.muon_ns_steps,
            adjust_lr_fn="original",
        )
    return optimizers


def lr_factor(config: OptimizerConfig, step: int, steps: int) -> float:
    """What multiplies the learning rates at a step: linear warm-up, then constant or a decay to zero."""
    warmup = min(1.0, (step + 1) / max(1, config.warmup_steps))
    start = config.decay_from * steps
    done = min(1.0, max(0.0, (step - start) / max(1.0, steps - start)))
    decay = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[config.decay]
    return warmup * decay


def set_lr(optimizers: dict[str, Optimizer], config: OptimizerConfig, factor: float) -> None:
    base = {"adamw": config.lr, "muon": config.muon_lr}
    for kind, optimizer in optimizers.items():
        for group in optimizer.param_groups:
            group["lr"] = base[kind] * factor


def make_ema(model: Model, decay: float) -> AveragedModel:
    """A moving average with decay min(decay, (1 + i) / (10 + i)) after i updates."""

    @torch.no_grad()
    def update(average: Tensors, current: Tensors, count: Tensor | int) -> None:
        i = int(count)
        torch._foreach_lerp_(average, current, 1 - min(decay, (1 + i) / (10 + i)))

    return AveragedModel(model, multi_avg_fn=update)
