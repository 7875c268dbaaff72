"""Caching across steps: where little has changed since the core ran, it is skipped and its effect used again.

Which steps skip it depends on the times alone (TeaCache, Liu et al. 2024, with the change of the time embedding itself
as its signal): a pattern that is known before the first step, and the same for every sample with the same times. Head,
Read, Write and tail run at every step. What is kept is the core's change of the latents, of each sample and each term
of guidance.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from elit.errors import ElitError
from elit.models import Effect, Model, Transformer


@dataclass(frozen=True)
class Cache:
    """Lets a sampler skip the core of an elastic model at steps where little has changed since the core last ran.

    At such a step head, Read, Write and tail run as always, and the core's last effect on the latents takes its place.

    Attributes:
        threshold: the core runs again when the relative changes of the time embedding since it ran add up to this; 0
            runs it at every step. The first and the last step always run it.
        order: 0 takes the last effect as it was; 1 extrapolates it in time from the last two (as TaylorSeer does).

    Raises:
        ElitError: a threshold below 0, or another order.
    """

    threshold: float
    order: Literal[0, 1] = 0

    def __post_init__(self) -> None:
        number = isinstance(self.threshold, int | float) and not isinstance(self.threshold, bool)
        if not number or not math.isfinite(self.threshold) or self.threshold < 0:
            raise ElitError(f"the cache's threshold is {self.threshold!r}; it must be a number, at least 0")
        if self.order not in (0, 1):
            raise ElitError(f"the cache's order is {self.order!r}; it is 0 (reuse) or 1 (extrapolate)")

    def steps_that_run(self, changes: Sequence[float]) -> list[bool]:
        """Tells for each step whether the core runs.

        Args:
            changes: of each step, the relative change of the time embedding from its start to its end.
        """
        runs, since = [True], 0.0
        for change in changes[:-1]:
            since += change
            runs.append(since >= self.threshold)
            since = 0.0 if runs[-1] else since
        return [*runs[:-1], True]


def can_skip_core(model: Model) -> bool:
    """Tells whether a cache can skip the core of a model: an elastic one that runs in parts, as exported files do
    not."""
    return isinstance(model, Transformer) and model.interface is not None


@torch.no_grad()
def embedding_changes(model: Model, times: Tensor) -> list[float]:
    """Returns the relative L1 change of a model's time embedding in every step.

    Args:
        times: of one sample, (steps + 1,) or, of a multi-scale model, (steps + 1, S).

    Raises:
        ElitError: the model has no core to skip.
    """
    if not can_skip_core(model):
        lacks = "no latent interface" if model.interface is None else "no parts: it is exported as a whole"
        raise ElitError(f"a cache skips the core of an elastic model, and this model has {lacks}")
    assert isinstance(model, Transformer)
    embedded = model.embed_time(times.to(model.device, torch.float32)).double()
    change = embedded.diff(dim=0).abs().sum(1) / embedded[:-1].abs().sum(1)
    return change.tolist()


class EffectMemory:
    """What the core did to one sample in earlier steps, by term of guidance."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        self.effects: dict[str, list[tuple[float, Effect]]] = {}

    def keep(self, term: str, t: float, effect: Effect) -> None:
        """Remembers the effect at time t."""
        other_times = [kept for kept in self.effects.get(term, []) if kept[0] != t]  # heun comes to a time twice
        earlier = other_times[-1:] if self.cache.order else []
        self.effects[term] = [*earlier, (t, effect)]

    def recall(self, term: str, t: float, num_latents: int) -> Effect | None:
        """Returns the effect that is expected at time t, cut to a level; None where the core has to run, because it
        never did, or did at a lower level."""
        kept = self.effects.get(term)
        if not kept or kept[-1][1].latents.shape[1] < num_latents:
            return None
        last_t, last = kept[-1]
        last = cut(last, num_latents)
        if len(kept) == 1 or kept[0][0] == last_t or kept[0][1].latents.shape[1] < num_latents:
            return last
        first_t, first = kept[0]
        return extrapolated(cut(first, num_latents), last, (t - last_t) / (last_t - first_t))


def cut(effect: Effect, num_latents: int) -> Effect:
    """Returns the effect on the first latents of every window."""
    return effect._replace(latents=effect.latents[:, :num_latents])


def extrapolated(first: Effect, last: Effect, share: float) -> Effect:
    """Follows the line through two effects beyond the last one, by a share of the way between them."""
    latents = last.latents + share * (last.latents - first.latents)
    if last.text is None or first.text is None:
        return Effect(latents)
    length = min(len(first.text), len(last.text))  # padding may be of another length, and nothing looks at it
    change = last.text[:length] - first.text[:length]
    return Effect(latents, torch.cat((last.text[:length] + share * change, last.text[length:])))
