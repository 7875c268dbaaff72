"""Guidance: ``v_weak + scale * (v_cond - v_weak)``, with a weak term that costs less where the model is elastic."""

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from elit.errors import ElitError
from elit.interface import check_budget
from elit.models.base import Model


@dataclass(frozen=True)
class Guidance:
    """Says how sampling is guided: ``v_weak + scale * (v_cond - v_weak)``.

    ``v_cond`` is the velocity that the model predicts for the class at the budget of the samples, and ``v_weak`` that
    of a weaker prediction, from which guidance leads away.

    Attributes:
        kind: what the weak term is. ``cfg`` drops the class and keeps the budget (Ho & Salimans 2022). ``ag`` keeps the
            class and lowers the budget (autoguidance, Karras et al. 2024). ``ccfg`` drops the class and lowers the
            budget (cheap CFG, section 3.4 of the paper).
        scale: w; 1 is no guidance, and with a scale between 0 and 1 the velocity lies between the weak and the strong
            one.
        budget: the budget of the weak term of ``ag`` and ``ccfg``; None is the lowest that the model was trained for.
            Where the samples have this budget too, ``ag`` changes nothing, and ``ccfg`` is ``cfg``.
        interval: the times (low, high) between which guidance is on, ends included (Kynkaanniemi et al. 2024).

    Raises:
        ElitError: an unknown kind, a scale that is not a finite number, a budget outside (0, 1] or any budget with
            ``cfg``, or an interval that is not (low, high) in [0, 1].
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
        """Tells where guidance is on: a boolean of the shape of t."""
        low, high = self.interval
        return (low <= t) & (t <= high) & (self.scale != 1)

    def combine(self, v_cond: Tensor, v_weak: Tensor) -> Tensor:
        """Returns the guided velocity."""
        return v_weak + self.scale * (v_cond - v_weak)

    @property
    def drops_condition(self) -> bool:
        """Whether the weak term goes without class or text."""
        return self.kind != "ag"


def weak_level(model: Model, guidance: Guidance) -> int | None:
    """Returns the level of the weak term of ``ag`` and ``ccfg``; None for ``cfg``, whose terms share one.

    Raises:
        ElitError: the model cannot be guided so, or was not trained for the weak budget.
    """
    if guidance.drops_condition and not model.conditional:
        raise ElitError(f"{guidance.kind} needs a class to drop, and this model has none; take ag")
    if guidance.kind == "cfg":
        return None
    if model.interface is None:
        raise ElitError(f"{guidance.kind} needs a model with a latent interface; take cfg")
    if guidance.kind == "ag" and len(model.levels) == 1:
        raise ElitError("ag needs a lower budget for its weak term, and this model was trained with one budget alone")
    return model.interface.trained_levels[0] if guidance.budget is None else model.level(guidance.budget)
