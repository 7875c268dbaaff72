"""Measures a model on held-out data, without sampling, and how near samples are to known images."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from elit.conditions import map_condition
from elit.data import Data
from elit.flow import TimeDensity, flow_matching_loss, path_named
from elit.models import Model
from elit.seeding import generator, normal


@torch.inference_mode()
def held_out_loss(
    model: Model,
    data: Data,
    budget: float | None,
    times: TimeDensity,
    path: str = "linear",
    draws: int = 1,
    seed: int = 0,
    batch_size: int = 360,
) -> Tensor:
    """Computes the flow-matching loss of every held-out sample and draw: (draws * M,).

    Times and noise depend on the seed alone: two budgets or two models see the same, so their difference is far less
    noisy than either.
    """
    losses = []
    for draw in range(draws):
        for start in range(0, len(data), batch_size):
            x, y = data.batch(torch.arange(start, min(start + batch_size, len(data))))
            rng = generator(seed, "held-out", draw, start)
            t = times.draw(len(x), path_named(path), rng)
            noise = normal(rng, x.shape)
            x, t, noise = (part.to(model.device) for part in (x, t, noise))
            labels = map_condition(lambda v: v.to(model.device), y) if model.conditional else None
            velocity = partial(model, y=labels, budget=budget)
            losses.append(flow_matching_loss(velocity, x, t, noise, path_named(path)).cpu())
    return torch.cat(losses)


@dataclass(frozen=True)
class BudgetLoss:
    """Held-out loss at a budget.

    Attributes:
        excess: above that of full budget on the same noise, with its standard error.
    """

    budget: float
    loss: float
    excess: float
    excess_standard_error: float


def losses_by_budget(
    model: Model, data: Data, budgets: Sequence[float], times: TimeDensity, path: str = "linear", draws: int = 2
) -> list[BudgetLoss]:
    """Computes held-out losses at several budgets, of which the last must be the full one."""
    losses = [held_out_loss(model, data, budget, times, path, draws) for budget in budgets]
    rows = []
    for budget, loss in zip(budgets, losses, strict=True):
        excess = loss - losses[-1]
        error = excess.std().item() / len(excess) ** 0.5
        rows.append(BudgetLoss(budget, loss.mean().item(), excess.mean().item(), error))
    return rows


def nearest_distance(images: Tensor, others: Tensor, batch_size: int = 500) -> Tensor:
    """Computes the root-mean-square pixel distance from each image (M, C, H, W) to the nearest of others: (M,)."""
    flat = others.flatten(1)
    nearest = [torch.cdist(part.flatten(1), flat).amin(1) for part in images.split(batch_size)]
    return torch.cat(nearest) / flat.shape[1] ** 0.5
