"""Anchored latents: which token of its window each latent begins as, and returns to.

Shapes: J tokens and latents per window, J~ <= J latents in use, A axes of a position.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from elit.interface.grid import Triple, coordinates
from elit.layers import Table


class Anchors(Table):
    """Keeps which token of a window each of its latents begins as.

    Args:
        window: tokens of a window along (T, H, W).
    """

    order: Tensor

    def __init__(self, window: Triple) -> None:
        super().__init__(window)

    @staticmethod
    def compute(*arguments: Any) -> dict[str, Tensor]:
        return {"order": spread_order(*arguments).clone()}

    def forward(self, level: int) -> Tensor:
        """Returns the tokens of the first latents: (J~,)."""
        return self.order[:level]


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # what is remembered may be needed for training next
def spread_order(window: Triple) -> Tensor:
    """Orders the tokens of a window so that the first ones of all windows together lie evenly in the grid: (J,).

    It begins in the middle of the window, and goes on with the token that is farthest from all before it. Windows
    repeat, so distances go around the edges of a window.
    """
    places = coordinates(window, 3, "cpu").double()
    size = torch.tensor(window, dtype=torch.float64, device="cpu")
    apart = (places[:, None] - places[None]).abs()
    distance = torch.minimum(apart, size - apart).norm(dim=-1)  # (J, J)
    middle = ((size - 1) / 2).floor()
    order = [int((places - middle).norm(dim=-1).argmin())]
    while len(order) < len(places):
        nearest = distance[:, order].amin(1)
        # of the tokens that are equally far from their nearest one, the one that is far from all
        order.append(int((nearest + 1e-6 * distance[:, order].mean(1)).argmax()))
    return torch.tensor(order, device="cpu")


def carry_weights(places: Tensor, slots: Tensor) -> Tensor:
    """Returns, for every token of a window, the weights of the kept ones by inverse squared distance: (J, J~).

    Args:
        places: coordinates of the tokens of the window (J, A).
        slots: which of them are kept (J~,).
    """
    squared = (places[:, None] - places[None, slots]).square().sum(-1).float()
    weights = 1 / squared.clamp(min=1e-6)
    return weights / weights.sum(1, keepdim=True)
