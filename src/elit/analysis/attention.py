"""Where the latents look: Read attention over the image, beside the flow-matching loss of every token."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from elit.errors import ElitError
from elit.flow import flow_matching_error, path_named, per_token
from elit.interface import triple
from elit.models import Model


@dataclass(frozen=True)
class AttentionMaps:
    """Of images at one noise level.

    Attributes:
        attention: attention that each token receives from the latents of its window, averaged over heads and latents
            and scaled so that 1 is its even share: (B, h, w) in tokens.
        loss: flow-matching loss of each token: (B, h, w).
    """

    attention: Tensor
    loss: Tensor


@torch.no_grad()
def attention_maps(
    model: Model,
    x: Tensor,
    y: Tensor | None,
    t: float,
    noise: Tensor,
    budget: float | None = None,
    path: str = "linear",
) -> AttentionMaps:
    """Read attention and loss per token, for images x (B, C, H, W) with labels y and noise at time t.

    The weights come from the modules that attend, out of their own inputs.

    Raises:
        ElitError: the model has no latent interface.
    """
    if model.interface is None:
        raise ElitError("attention maps need a model with a latent interface")
    captured: list[Tensor] = []

    def capture(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        captured.append(module.weights(*args, **kwargs))

    hook = model.interface.read_layer.attention.register_forward_pre_hook(capture, with_kwargs=True)
    try:
        times = torch.full((len(x),), t, device=x.device)
        error = flow_matching_error(partial(model, y=y, budget=budget), x, times, noise, path_named(path))
    finally:
        hook.remove()
    loss = per_token(error, triple(model.config.patch_size)[2])
    grid = model.interface.grid_of((1, *loss.shape[1:]))
    weights = captured[0].mean(dim=(1, 2)).view(len(x), grid.num_windows, -1)  # (B, G, J)
    share = weights * grid.window_tokens
    return AttentionMaps(grid.from_windows(share[..., None]).view_as(loss), loss)


def rank_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Spearman's correlation of each row of (B, N) with the same row of another: (B,). Ties share their mean rank."""
    rank_a, rank_b = _ranks(a), _ranks(b)
    return F.cosine_similarity(rank_a - rank_a.mean(1, keepdim=True), rank_b - rank_b.mean(1, keepdim=True), dim=1)


def _ranks(rows: Tensor) -> Tensor:
    below = (rows[:, None, :] < rows[:, :, None]).sum(-1)
    equal = (rows[:, None, :] == rows[:, :, None]).sum(-1)
    return below + (equal - 1) / 2
