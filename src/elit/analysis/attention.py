"""Shows where the latents look: the attention of Read over the image, beside the flow-matching loss of every token."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from elit.conditions import Condition
from elit.errors import ElitError
from elit.flow import flow_matching_error, path_named, per_token
from elit.interface import triple
from elit.models import Model, Transformer


@dataclass(frozen=True)
class AttentionMaps:
    """What the latents look at in images at one noise level, averaged over heads: B images, J~ latents, h x w tokens.

    Attributes:
        latents: attention that each token receives from each latent of its window, scaled so that 1 is an even share:
            (B, J~, h, w).
        entropy: of the weights of each latent over its window, averaged over windows, in units of that of even weights:
            (B, J~) in [0, 1].
        loss: flow-matching loss of each token: (B, h, w).
    """

    latents: Tensor
    entropy: Tensor
    loss: Tensor

    @property
    def attention(self) -> Tensor:
        """The attention that each token receives, averaged over latents: (B, h, w)."""
        return self.latents.mean(1)


@torch.no_grad()
def attention_maps(
    model: Model,
    x: Tensor,
    y: Condition | None,
    t: float,
    noise: Tensor,
    budget: float | None = None,
    path: str = "linear",
) -> AttentionMaps:
    """Records the attention of Read and the loss of each token for noisy images.

    Args:
        x: images (B, C, H, W), with conditions y.
        t: noise level of all of them, with ``noise`` like x.
        budget: fraction of the latents; None is all.
        path: the path that the model was trained on.

    The weights come from the modules that attend, out of their own inputs.

    Raises:
        ElitError: the model has no latent interface, or is not one of images at one time.
    """
    if model.interface is None:
        raise ElitError("attention maps need a model with a latent interface")
    if not isinstance(model, Transformer):
        raise ElitError("attention maps look into Read, and an exported file runs as a whole; give the model itself")
    if model.stage_shapes is not None or len(model.input_shape()) != 3:
        raise ElitError("attention maps are of images at one noise level: not of multi-scale models or video")
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
    weights = captured[0].mean(1).unflatten(0, (len(x), grid.num_windows)).float()  # (B, G, J~, J)
    entropy = torch.special.entr(weights).sum(-1).mean(1) / math.log(grid.window_tokens)
    share = grid.from_windows(weights.transpose(2, 3) * grid.window_tokens)  # (B, N, J~)
    return AttentionMaps(share.transpose(1, 2).unflatten(2, loss.shape[1:]), entropy, loss)


def mean_maps(
    model: Model,
    x: Tensor,
    y: Condition | None,
    t: float,
    noises: Tensor,
    budget: float | None = None,
    path: str = "linear",
) -> AttentionMaps:
    """Averages :func:`attention_maps` over noises (M, B, C, H, W)."""
    maps = [attention_maps(model, x, y, t, noise, budget, path) for noise in noises]
    latents, entropy, loss = (
        torch.stack([getattr(each, name) for each in maps]).mean(0) for name in ("latents", "entropy", "loss")
    )
    return AttentionMaps(latents, entropy, loss)


@dataclass(frozen=True)
class Interval:
    """A mean over images, and the half-width of its 95 % interval (normal: 1.96 standard errors)."""

    mean: float
    half_width: float


@dataclass(frozen=True)
class AttentionCorrelations:
    """Rank correlations (Spearman's) within each image.

    Attributes:
        same_image: attention and loss, over the tokens of an image.
        another_image: the control: the attention of the next image, and the loss of this one.
        entropy: index of a latent and entropy of its attention, over latents; None of fewer than 3 latents.
    """

    same_image: Interval
    another_image: Interval
    entropy: Interval | None


def correlate(maps: AttentionMaps) -> AttentionCorrelations:
    """Correlates attention with loss within each of B > 1 different images."""
    attention, loss = maps.attention, maps.loss.flatten(1)
    same, another = (rank_correlation(each.flatten(1), loss) for each in (attention, attention.roll(1, 0)))
    index = torch.arange(maps.entropy.shape[1], device=maps.entropy.device).expand_as(maps.entropy)
    entropy = _interval(rank_correlation(index, maps.entropy)) if index.shape[1] > 2 else None
    return AttentionCorrelations(_interval(same), _interval(another), entropy)


def _interval(values: Tensor) -> Interval:
    return Interval(values.mean().item(), 1.96 * values.std().item() / len(values) ** 0.5)


def rank_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Computes Spearman's correlation of each row of (B, N) with the same row of another: (B,).

    Ties share their mean rank.
    """
    rank_a, rank_b = _ranks(a), _ranks(b)
    return F.cosine_similarity(rank_a - rank_a.mean(1, keepdim=True), rank_b - rank_b.mean(1, keepdim=True), dim=1)


def _ranks(rows: Tensor) -> Tensor:
    below = (rows[:, None, :] < rows[:, :, None]).sum(-1)
    equal = (rows[:, None, :] == rows[:, :, None]).sum(-1)
    return below + (equal - 1) / 2
