"""Guidance: ``v_weak + scale * (v_cond - v_weak)``, with a weak term that costs less where the model is elastic."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from elit.conditions import Condition, cat_conditions
from elit.errors import ElitError
from elit.flow.solvers import Velocity
from elit.interface import check_budget
from elit.models.base import Model


@dataclass(frozen=True)
class Guidance:
    """How a sampler guides.

    Attributes:
        kind: what the weak term is. ``cfg``: no class, same budget (Ho & Salimans 2022). ``ag``: same class, lower
            budget (autoguidance, Karras et al. 2024). ``ccfg``: no class and lower budget (cheap CFG, section 3.4 of
            the paper).
        scale: w; 1 or less is no guidance.
        budget: of the weak term, for ``ag`` and ``ccfg``; None is the model's lowest.
        interval: times (low, high) between which guidance is on, ends included (Kynkaanniemi et al. 2024).

    Raises:
        ElitError: an unknown kind, a scale that is no number, a budget outside (0, 1] or one for ``cfg``, or an
            interval that is none.
    """

    kind: Literal["cfg", "ccfg", "ag"] = "cfg"
    scale: float = 4.0
    budget: float | None = None
    interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if self.kind not in ("cfg", "ccfg", "ag"):
            raise ElitError(f"no guidance is named {self.kind!r}; there are cfg, ccfg and ag")
        if isinstance(self.scale, bool) or not isinstance(self.scale, int | float) or not math.isfinite(self.scale):
            raise ElitError(f"the guidance scale is {self.scale!r}; it must be a finite number")
        if self.budget is not None:
            if self.kind == "cfg":
                raise ElitError("cfg runs its weak term at the budget of the strong one; for another budget take ccfg")
            check_budget(self.budget, "the guidance budget")
        if len(self.interval) != 2 or not 0 <= self.interval[0] <= self.interval[1] <= 1:
            raise ElitError(f"the guidance interval {self.interval} is not (low, high) with 0 <= low <= high <= 1")

    def active(self, t: Tensor) -> Tensor:
        """Where guidance is on: a boolean of the shape of t."""
        low, high = self.interval
        return (low <= t) & (t <= high) & (self.scale > 1)

    def combine(self, v_cond: Tensor, v_weak: Tensor) -> Tensor:
        """The guided velocity."""
        return v_weak + self.scale * (v_cond - v_weak)

    @property
    def drops_class(self) -> bool:
        return self.kind != "ag"


def weak_budget(model: Model, guidance: Guidance) -> float | None:
    """Budget of the weak term of ``ag`` and ``ccfg``; None for ``cfg``.

    Raises:
        ElitError: the model cannot be guided so.
    """
    if guidance.drops_class and not model.conditional:
        raise ElitError(f"{guidance.kind} needs a class to drop, and this model has none; take ag")
    if guidance.kind == "cfg":
        return None
    if not model.levels:
        raise ElitError(f"{guidance.kind} needs a model with a latent interface; take cfg")
    return guidance.budget or model.levels[0] / model.num_latents


def model_velocity(
    model: Callable[..., Tensor],
    y: Condition | None,
    null: Condition | None,
    budgets: list[float | None],
    guidance: Guidance | None = None,
    weak: float | None = None,
    active: list[int] | None = None,
) -> Velocity:
    """The velocity that a solver integrates: the model in its dtype, guided, as float64.

    Args:
        model: (x, t, y, budget=...) -> velocity.
        y: conditions of the samples, and ``null`` those of the weak term of ``cfg`` and ``ccfg``.
        budgets: one per step, of the strong term.
        weak: budget of the weak term of ``ag`` and ``ccfg``.
        active: of a multi-scale model, the number of active stages at each step.
    """

    def run(x: Tensor, t: Tensor, condition: Condition | None, budget: float | None, step: int) -> Tensor:
        times = t.to(x.device, torch.float32).expand(len(x), *t.shape)
        stages = {} if active is None else {"active": active[step]}
        return model(x, times, condition, budget=budget, **stages).double()

    both = cat_conditions(y, null) if y is not None and null is not None else None

    def velocity(x: Tensor, t: Tensor, step: int) -> Tensor:
        budget, inputs = budgets[step], x.to(getattr(model, "dtype", torch.float32))
        if guidance is None or not (on := guidance.active(t)).any():
            return run(inputs, t, y, budget, step)
        if guidance.kind == "cfg":  # one budget, one batch
            v_cond, v_weak = run(torch.cat((inputs, inputs)), t, both, budget, step).chunk(2)
        else:
            v_cond = run(inputs, t, y, budget, step)
            v_weak = run(inputs, t, null if guidance.drops_class else y, weak, step)
        return torch.where(on.to(x.device), guidance.combine(v_cond, v_weak), v_cond)

    return velocity
