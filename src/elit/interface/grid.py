"""The grid of spatial tokens and its windows.

Images are the T = 1 case of (T, H, W). Shapes: N = T * H * W tokens in raster order; G windows in raster order, each
with J tokens in raster order.
"""

import math
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from elit.errors import ElitError

Triple = tuple[int, int, int]


def triple(size: int | tuple[int, ...] | list[int]) -> Triple:
    """``8`` and ``(8, 8)`` are images, (1, 8, 8); three numbers are (T, H, W)."""
    sizes = (1, size, size) if isinstance(size, int) else (1, *size) if len(size) == 2 else tuple(size)
    if len(sizes) != 3 or min(sizes) < 1:
        raise ElitError(f"size {size!r} is neither a positive number, (height, width) nor (time, height, width)")
    return sizes[0], sizes[1], sizes[2]


def position_axes(size: Triple) -> int:
    """How many axes positions on a grid have: (row, column), and with T > 1 time before them."""
    return 3 if size[0] > 1 else 2


@dataclass(frozen=True)
class TokenGrid:
    """T x H x W tokens, cut into equal windows.

    Raises:
        ElitError: the windows do not tile the grid.
    """

    size: Triple
    window: Triple

    def __post_init__(self) -> None:
        for tokens, side, axis in zip(self.size, self.window, ("time", "height", "width"), strict=True):
            if tokens % side:
                raise ElitError(
                    f"group size {side} does not divide the {tokens} tokens of the grid along {axis}; "
                    f"take one of {[n for n in range(1, tokens + 1) if tokens % n == 0]}"
                )

    @classmethod
    def of(cls, size: int | tuple[int, ...], window: int | tuple[int, ...]) -> Self:
        return cls(triple(size), triple(window))

    @property
    def num_tokens(self) -> int:
        """N."""
        return math.prod(self.size)

    @property
    def shape(self) -> Triple:
        """Number of windows along (T, H, W)."""
        (t, h, w), (wt, wh, ww) = self.size, self.window
        return t // wt, h // wh, w // ww

    @property
    def axes(self) -> int:
        """3 for video, 2 for images."""
        return position_axes(self.size)

    @property
    def num_windows(self) -> int:
        """G."""
        return math.prod(self.shape)

    @property
    def window_tokens(self) -> int:
        """J."""
        return math.prod(self.window)

    def to_windows(self, x: Tensor) -> Tensor:
        """Raster tokens (B, N, D) -> windows (B, G, J, D)."""
        (gt, gh, gw), (wt, wh, ww) = self.shape, self.window
        x = x.reshape(x.shape[0], gt, wt, gh, wh, gw, ww, -1).permute(0, 1, 3, 5, 2, 4, 6, 7)
        return x.reshape(x.shape[0], self.num_windows, self.window_tokens, -1)

    def from_windows(self, x: Tensor) -> Tensor:
        """Windows (B, G, J, D) -> raster tokens (B, N, D)."""
        (gt, gh, gw), (wt, wh, ww) = self.shape, self.window
        x = x.reshape(x.shape[0], gt, gh, gw, wt, wh, ww, -1).permute(0, 1, 4, 2, 5, 3, 6, 7)
        return x.reshape(x.shape[0], self.num_tokens, -1)

    def raster_index(self) -> Tensor:
        """Raster position of every token of every window: (G, J)."""
        index = torch.arange(self.num_tokens)
        return self.to_windows(index[None, :, None])[0, :, :, 0]


def coordinates(size: Triple, axes: int | None = None, device: torch.device | str | None = None) -> Tensor:
    """Integer coordinates (N, axes) of a grid in raster order: (row, column), or with three axes (time, row, column).

    Args:
        axes: 2 or 3; by default as many as the grid needs.
    """
    axes = position_axes(size) if axes is None else axes
    shown = size[3 - axes :]
    return torch.cartesian_prod(*(torch.arange(n, device=device) for n in shown)).view(-1, axes)
