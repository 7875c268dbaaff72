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
    """Turns a size into (time, height, width): 8 and (8, 8) are those of an image and become (1, 8, 8).

    Raises:
        ElitError: it is not one, two or three positive numbers.
    """
    sizes = (1, size, size) if isinstance(size, int) else (1, *size) if len(size) == 2 else tuple(size)
    if len(sizes) != 3 or min(sizes) < 1:
        raise ElitError(f"size {size!r} is neither a positive number, (height, width) nor (time, height, width)")
    return sizes[0], sizes[1], sizes[2]


def position_axes(size: Triple) -> int:
    """Returns the number of coordinates of a position: 2 (row, column), and for video 3 (time, row, column)."""
    return 3 if size[0] > 1 else 2


@dataclass(frozen=True)
class TokenGrid:
    """Describes T x H x W tokens that are cut into equal windows, and moves tokens into windows and back.

    Attributes:
        size: tokens along (T, H, W).
        window: tokens of a window along (T, H, W).

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
        """The number of tokens, N."""
        return math.prod(self.size)

    @property
    def shape(self) -> Triple:
        """The number of windows along (T, H, W)."""
        (t, h, w), (wt, wh, ww) = self.size, self.window
        return t // wt, h // wh, w // ww

    @property
    def axes(self) -> int:
        """The number of coordinates of a position: 3 for video, 2 for images."""
        return position_axes(self.size)

    @property
    def num_windows(self) -> int:
        """The number of windows, G."""
        return math.prod(self.shape)

    @property
    def window_tokens(self) -> int:
        """The number of tokens in a window, J."""
        return math.prod(self.window)

    def to_windows(self, x: Tensor) -> Tensor:
        """Moves tokens from raster order (B, N, D) into windows (B, G, J, D)."""
        (gt, gh, gw), (wt, wh, ww) = self.shape, self.window
        x = x.reshape(x.shape[0], gt, wt, gh, wh, gw, ww, -1).permute(0, 1, 3, 5, 2, 4, 6, 7)
        return x.reshape(x.shape[0], self.num_windows, self.window_tokens, -1)

    def from_windows(self, x: Tensor) -> Tensor:
        """Moves tokens from windows (B, G, J, D) back into raster order (B, N, D)."""
        (gt, gh, gw), (wt, wh, ww) = self.shape, self.window
        x = x.reshape(x.shape[0], gt, gh, gw, wt, wh, ww, -1).permute(0, 1, 4, 2, 5, 3, 6, 7)
        return x.reshape(x.shape[0], self.num_tokens, -1)

    def raster_index(self) -> Tensor:
        """Returns the raster position of every token of every window: (G, J)."""
        index = torch.arange(self.num_tokens, device="cpu")
        return self.to_windows(index[None, :, None])[0, :, :, 0]


def coordinates(size: Triple, axes: int | None = None, device: torch.device | str | None = None) -> Tensor:
    """Returns the integer coordinates of all tokens of a grid in raster order, (N, axes): (row, column), or with three
    axes (time, row, column).

    Args:
        axes: 2 or 3; by default as many as the grid needs.
    """
    axes = position_axes(size) if axes is None else axes
    shown = size[3 - axes :]
    return torch.cartesian_prod(*(torch.arange(n, device=device) for n in shown)).view(-1, axes)
