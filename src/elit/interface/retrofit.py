"""The latent interface of a transformer that was trained without one.

A pretrained core knows tokens, not latents, so latents are *anchored*: latent j of a window begins as one of the
window's own tokens and keeps its position. At full budget every token is kept, and with a closed Read and Write the
core then does what it always did: the model answers as its base does, before any training. Below full budget a window
keeps the tokens that are spread most evenly over it.

Shapes: B batch, N spatial tokens, G windows, J tokens and latents per window, J~ <= J latents in use, K = G * J~, D
width.
"""

from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from elit.errors import ElitError
from elit.interface.anchors import carry_weights, spread_order
from elit.interface.budget import valid_levels
from elit.interface.grid import TokenGrid, Triple, coordinates
from elit.interface.latent import Read, Write
from elit.layers import Rotary, init_model, rotary

Start = Literal["base", "paper"]


class Layout(NamedTuple):
    """Says where the latents of one level lie in a grid. A compiled forward sees the level in the sizes of its tensors.

    Attributes:
        grid: the tokens and their windows.
        slots: the places in a window whose tokens are kept, ascending: (J~,).
        numbers: which of the J latents lie at these places: (J~,).
        kept: the places in the grid of all kept tokens, ascending: (K,). The core sees latents in this order.
        to_core: reorders latents from windows (G, J~) to that of ``kept``: (K,).
        to_windows: reorders them back: (K,).
        carry: how much of the change of each kept token every token of the window takes over: (J, J~).
        rope: rotary positions of the tokens in their window.
        latent_rope: those of the kept ones.
    """

    grid: TokenGrid
    slots: Tensor
    numbers: Tensor
    kept: Tensor
    to_core: Tensor
    to_windows: Tensor
    carry: Tensor
    rope: Rotary
    latent_rope: Rotary


class RetrofitInterface(nn.Module):
    """Reads the tokens of a pretrained transformer into latents before its core, and writes them back after it.

    Args:
        width, num_heads: of the transformer.
        window: tokens of a window along (T, H, W).
        min_latents: the smallest level J_min; None is J / 16.
        start: what the new layers do before any training. ``base``: latents begin as tokens, Read adds nothing to
            them, and Write puts what the core made of kept tokens in their place, gives dropped tokens the change of
            kept ones near them, and adds nothing else. At full budget the model then equals its base. ``paper``:
            latents begin as learned vectors and Write adds nothing, as in a new ELIT model, which begins as its head
            and tail.

    Raises:
        ElitError: an impossible ``min_latents``, or no start of that name.
    """

    ROPE_THETA = 10_000.0

    def __init__(
        self, width: int, num_heads: int, window: Triple, min_latents: int | None = None, start: Start = "base"
    ) -> None:
        super().__init__()
        if start not in ("base", "paper"):
            raise ElitError(f"no start is named {start!r}; there are base and paper")
        self.window = window
        self.start = start
        self.head_dim = width // num_heads
        self.num_latents = TokenGrid(window, window).window_tokens
        self.levels = valid_levels(self.num_latents, min_latents)
        if start == "paper":
            self.latents = nn.Parameter(torch.empty(self.num_latents, width))
        self.read_layer = Read(width, num_heads, "paper")
        self.write_layer = Write(width, num_heads, "paper")
        init_model(self)

    def init_weights(self) -> None:
        for parameter in self.parameters(recurse=False):
            nn.init.normal_(parameter, std=0.02)

    def layout(self, size: Triple, level: int, device: torch.device) -> Layout:
        """Returns the layout of a level in a grid of tokens (T, H, W). What was computed once is remembered.

        Raises:
            ElitError: windows do not tile the grid.
        """
        return _layout(TokenGrid(size, self.window), level, self.head_dim, self.ROPE_THETA, device)

    def read(self, s: Tensor, c: Tensor, layout: Layout) -> Tensor:
        """Makes latents (B, K, D) of spatial tokens s (B, N, D) under the condition c (B, D)."""
        windows = layout.grid.to_windows(s)
        if self.start == "base":
            latents = windows[:, :, layout.slots]
        else:
            latents = self.latents[layout.numbers].to(s.dtype).expand(*windows.shape[:2], -1, -1)
        latents = self.read_layer(latents, windows, c, layout.rope, layout.latent_rope)
        return latents.flatten(1, 2)[:, layout.to_core]

    def write(self, s: Tensor, latents: Tensor, layout: Layout) -> Tensor:
        """Writes latents (B, K, D), after the core, back into spatial tokens s (B, N, D), as they were before Read."""
        windows = layout.grid.to_windows(s)
        latents = latents[:, layout.to_windows].unflatten(1, (layout.grid.num_windows, -1))
        if self.start == "base":
            change = latents - windows[:, :, layout.slots]
            windows = windows + layout.carry.to(s.dtype) @ change
            windows = windows.index_copy(2, layout.slots, latents)  # exact, where adding the change would round
        return layout.grid.from_windows(self.write_layer(windows, latents, layout.rope, layout.latent_rope))


@lru_cache(maxsize=256)
@torch.inference_mode(False)  # what is remembered may be needed for training next
def _layout(grid: TokenGrid, level: int, head_dim: int, theta: float, device: torch.device) -> Layout:
    order = spread_order(grid.window)
    slots = order[:level].sort().values
    kept = grid.raster_index()[:, slots].flatten()
    to_core = kept.argsort()
    places = coordinates(grid.window, grid.axes)
    rope = rotary(places, head_dim, theta)
    return Layout(
        grid,
        slots.to(device),
        order.argsort()[slots].to(device),
        kept[to_core].to(device),
        to_core.to(device),
        to_core.argsort().to(device),
        carry_weights(places, slots).to(device),
        Rotary(rope.cos.to(device), rope.sin.to(device)),
        Rotary(rope.cos[slots].to(device), rope.sin[slots].to(device)),
    )
