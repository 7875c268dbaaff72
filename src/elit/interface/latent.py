"""Read, Write and the latent interface around the core of a transformer (arXiv 2603.12245, section 3).

Shapes: B batch, N spatial tokens, G windows ("groups"), J latents and spatial tokens per window, J~ <= J latents in
use, K = G * J~, D width. Latents are group-major, (B, G, J~, D): dropping the tail is a slice. Cross-attention stays
inside a window and is one batched attention over B * G.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from elit.decode import check_types
from elit.errors import ElitError
from elit.interface.anchors import Anchors, spread_order
from elit.interface.budget import to_level, valid_levels
from elit.interface.grid import TokenGrid, Triple, coordinates, triple
from elit.layers import (
    CrossAttention,
    Mlp,
    Modulation,
    Rotary,
    RotaryTable,
    init_model,
    layer_norm,
    modulate,
    remembered_tables,
    residual,
    rotary,
)


@dataclass(frozen=True)
class InterfaceConfig:
    """Configures a latent interface.

    Attributes:
        group_size: side of a window in tokens, or (time, height, width). J is the number of tokens in a window.
        levels: the numbers of latents J~ that the model is trained with; None means all from ``min_latents`` to J.
            Training sets it, and a saved model keeps it.
        min_latents: the smallest level J_min, where ``levels`` is None; None means J / 16, as in the paper.
        variant: ``paper`` (latents begin as learned vectors; pre-norms everywhere, rotary positions), ``anchored`` (the
            same, but a latent begins as a token of its window and, after the core, takes its place; the first J~ lie
            evenly in the window) or ``published`` (the released SiT checkpoints: as paper, but queries of Read and
            inputs of Write not normalized, query-key norms over the full width, learned window and latent positions,
            budgets rounded down).
        write_depth: number of Write layers.
        tail_visible: what becomes of the latents beyond the budget. With False they are dropped everywhere, as in the
            paper. With True, Read fills all J latents, and Write sees those beyond the budget as Read left them; the
            released checkpoints were trained so. The core runs on J~ latents either way.
    """

    group_size: int | tuple[int, ...] = 4
    min_latents: int | None = None
    variant: Literal["paper", "anchored", "published"] = "paper"
    write_depth: int = 1
    tail_visible: bool = False
    levels: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check_types(self)
        triple(self.group_size)  # tells what is no size
        if self.write_depth < 1:
            raise ElitError(f"write_depth is {self.write_depth}; it must be at least 1")
        if self.variant == "anchored" and self.tail_visible:
            raise ElitError("tail_visible is for latents that are no tokens; leave it out with variant anchored")


class Read(nn.Module):
    """Fills latents by cross-attention from the spatial tokens of their window (Eq. 2)."""

    def __init__(self, width: int, num_heads: int, variant: str) -> None:
        super().__init__()
        published = variant == "published"
        self.query_norm = nn.Identity() if published else layer_norm(width)
        self.context_norm = layer_norm(width)
        self.attention = CrossAttention(width, num_heads, "width" if published else "head")
        self.mlp_norm = layer_norm(width)
        self.mlp = Mlp(width, width, bias=False)
        self.modulation = Modulation(width, 7 if published else 6)  # the published seventh part is not used

    def forward(
        self, latents: Tensor, s: Tensor, c: Tensor, rope: Rotary | None, latent_rope: Rotary | None = None
    ) -> Tensor:
        """Reads spatial tokens s (B, G, J, D) under condition c (B, D) into latents (B, G, J~, D), which it returns.

        Args:
            rope: positions of the tokens in their window.
            latent_rope: those of the latents; None is the origin.
        """
        shift_s, scale_s, gate_a, shift_m, scale_m, gate_m, *_ = self.modulation(c, s.dim())
        context = modulate(self.context_norm(s), shift_s, scale_s)
        query = self.query_norm(latents).flatten(0, 1)
        read = self.attention(query, context.flatten(0, 1), q_rope=latent_rope, k_rope=rope)
        latents = torch.addcmul(latents, gate_a, read.view_as(latents))
        return torch.addcmul(latents, gate_m, self.mlp(modulate(self.mlp_norm(latents), shift_m, scale_m)))


class Write(nn.Module):
    """Updates spatial tokens by cross-attention from the latents of their window. It starts as the identity."""

    def __init__(self, width: int, num_heads: int, variant: str) -> None:
        super().__init__()
        published = variant == "published"
        self.query_norm = nn.Identity() if published else layer_norm(width)
        self.context_norm = nn.Identity() if published else layer_norm(width)
        self.attention = CrossAttention(width, num_heads, "width" if published else "head")
        self.mlp_norm = nn.Identity() if published else layer_norm(width)
        self.mlp = Mlp(width, width, bias=False)

    def forward(self, s: Tensor, latents: Tensor, rope: Rotary | None, latent_rope: Rotary | None = None) -> Tensor:
        """Writes latents (B, G, J~, D) into spatial tokens s (B, G, J, D), which it returns.

        Args:
            rope: positions of the tokens in their window.
            latent_rope: those of the latents; None is the origin.
        """
        query, context = self.query_norm(s).flatten(0, 1), self.context_norm(latents).flatten(0, 1)
        s = s + self.attention(query, context, q_rope=rope, k_rope=latent_rope).view_as(s)
        return s + self.mlp(self.mlp_norm(s))

    def init_weights(self) -> None:
        nn.init.zeros_(self.attention.proj.weight)
        nn.init.zeros_(self.attention.proj.bias)
        nn.init.zeros_(self.mlp.fc2.weight)


class LatentInterface(nn.Module):
    """Reads spatial tokens into latents before the core of a transformer, and writes the latents back after it.

    A forward calls ``to_windows`` and ``read``, runs the core blocks on the first J~ latents, and then calls
    ``with_tail`` and ``write``. The interface knows no backbone: it needs tokens (B, N, D), their grid, a condition
    (B, D) and a level J~.

    Args:
        grid_size: tokens along (T, H, W) that the model is built for. Rotary positions work on other grids too.
        rope_theta: base of the rotary frequencies.
        level_step: levels are multiples of it, for a core that works on runs of so many latents.

    Raises:
        ElitError: windows that do not tile the grid, impossible ``levels`` or ``min_latents``, or windows without whole
            runs.
    """

    MAX_POSITIONS = 4096  # learned latent positions of the published checkpoints

    def __init__(
        self,
        config: InterfaceConfig,
        width: int,
        num_heads: int,
        grid_size: Triple,
        rope_theta: float,
        level_step: int = 1,
    ) -> None:
        super().__init__()
        self.config = config
        self.grid = TokenGrid(grid_size, triple(config.group_size))
        self.head_dim = width // num_heads
        self.rope_theta = rope_theta
        self.num_latents = self.grid.window_tokens
        self.level_step = level_step
        self.trained_levels = valid_levels(self.num_latents, config.min_latents, level_step, config.levels)
        self.levels = self.trained_levels

        if self.anchored:
            self.anchors = Anchors(self.grid.window)
        else:
            self.latents = nn.Parameter(torch.empty(self.num_latents, width))
        self.read_layer = Read(width, num_heads, config.variant)
        self.write_layers = nn.ModuleList(Write(width, num_heads, config.variant) for _ in range(config.write_depth))
        if self.published:
            if self.grid.num_tokens > self.MAX_POSITIONS:
                raise ElitError(
                    f"the published variant has {self.MAX_POSITIONS} latent positions, too few for "
                    f"{self.grid.num_tokens} tokens; use variant='paper'"
                )
            self.read_positions = nn.Parameter(torch.empty(self.num_latents, width))
            self.write_positions = nn.Parameter(torch.empty(self.num_latents, width))
            # Row g * J + j is latent j of window g; rows past the grid's tokens are kept for saving back only.
            self.latent_positions = nn.Parameter(torch.empty(self.MAX_POSITIONS, width))
        else:
            in_window = coordinates(self.grid.window, self.grid.axes, "cpu")
            in_core = latent_positions(self.grid, self.grid.axes, self.num_latents, self.anchored, "cpu")
            self.window_table = RotaryTable(in_window, self.head_dim, rope_theta)
            self.core_table = RotaryTable(in_core, self.head_dim, rope_theta)
            if self.anchored:
                in_order = in_window[spread_order(self.grid.window)]
                self.anchor_table = RotaryTable(in_order, self.head_dim, rope_theta)
        init_model(self)

    @property
    def published(self) -> bool:
        return self.config.variant == "published"

    @property
    def anchored(self) -> bool:
        return self.config.variant == "anchored"

    def init_weights(self) -> None:
        for parameter in self.parameters(recurse=False):
            nn.init.normal_(parameter, std=0.02)

    def allow_untrained_levels(self) -> None:
        """Makes every possible number of latents a level, also those that were not trained."""
        self.levels = valid_levels(self.num_latents, self.level_step, self.level_step)

    def level(self, budget: float | None) -> int:
        """Turns a budget in (0, 1] into the nearest level; None is the highest one that was trained."""
        if budget is None:
            return self.trained_levels[-1]
        return to_level(budget, self.levels, self.num_latents, self.published)

    def grid_of(self, size: Triple) -> TokenGrid:
        """Returns the windows of a token grid, which may differ from the grid that the interface was built for.

        Raises:
            ElitError: windows do not tile it, or the learned positions belong to another grid.
        """
        if size == self.grid.size:
            return self.grid
        if self.published:
            raise ElitError(f"the learned latent positions are those of a {self.grid.size} grid, not of {size}")
        return TokenGrid(size, self.grid.window)

    def to_windows(self, s: Tensor, grid: TokenGrid) -> Tensor:
        """Brings spatial tokens (B, N, D) into the windows that Read and Write work in: (B, G, J, D)."""
        windows = grid.to_windows(s)
        return windows + self.read_positions if self.published else windows

    def read(self, windows: Tensor, c: Tensor, level: int) -> Tensor:
        """Fills ``level`` latents of every window: windows (B, G, J, D), condition (B, D) -> latents (B, G, J~, D).

        A latent does not depend on the others, so reading at a higher level and slicing gives the same. Where the tail
        is visible all J are filled, (B, G, J, D).
        """
        filled = self.num_latents if self.config.tail_visible else level
        if self.anchored:
            latents = windows.index_select(2, self.anchors(filled))
        else:
            latents = residual(self.latents[:filled]).expand(*windows.shape[:2], -1, -1)
        latents = self.read_layer(latents, windows, c, self.window_rope(), self.latent_rope(filled))
        if not self.published:
            return latents
        num_windows = windows.shape[1]
        positions = self.latent_positions[: num_windows * self.num_latents].unflatten(0, (num_windows, -1))
        return latents + positions[:, :filled]

    def with_tail(self, latents: Tensor, filled: Tensor) -> Tensor:
        """Returns the latents that Write sees: those of the core, and where the tail is visible also the dropped ones.

        Args:
            latents: (B, G, J~, D), after the core.
            filled: what :meth:`read` returned, which holds the latents beyond the budget.
        """
        level = latents.shape[2]
        whole = isinstance(level, int) and level == self.num_latents  # a size that is traced is none: it may be any
        if whole or not self.config.tail_visible:
            return latents
        return torch.cat((latents, filled[:, :, level:]), dim=2)

    def write(self, windows: Tensor, latents: Tensor) -> Tensor:
        """Writes latents (B, G, J~, D) back into the spatial tokens of their windows (B, G, J, D)."""
        if self.published:
            windows = windows + self.write_positions
        level = latents.shape[2]
        if self.anchored:
            windows = windows.index_copy(2, self.anchors(level), latents)
        rope, latent_rope = self.window_rope(), self.latent_rope(level)
        for layer in self.write_layers:
            windows = layer(windows, latents, rope, latent_rope)
        return windows

    def window_rope(self) -> Rotary | None:
        """Returns rotary positions (J, d / 2) of the tokens of a window, relative to it.

        With them Read can tell the tokens of a window apart, and Write can put detail where it belongs. The published
        variant has learned positions instead: None.
        """
        return None if self.published else self.window_table()

    def latent_rope(self, level: int) -> Rotary | None:
        """Returns rotary positions (J~, d / 2) of anchored latents in their window; others are at its origin: None."""
        return Rotary(*(table[:level] for table in self.anchor_table())) if self.anchored else None

    def core_rope(self, grid: TokenGrid, level: int, device: torch.device) -> Rotary | None:
        """Returns rotary positions (K, d / 2) of the latents in the core, of :func:`latent_positions`. The published
        variant has none."""
        if self.published:
            return None
        if grid != self.grid:
            return latent_rotary(grid, self.grid.axes, level, self.anchored, self.head_dim, self.rope_theta, device)
        by_window = (grid.num_windows, self.num_latents, -1)
        # contiguous: the same layout at every level, also where flatten is a view, so that blocks compile once
        return Rotary(*(table.view(by_window)[:, :level].flatten(0, 1).contiguous() for table in self.core_table()))


def latent_positions(
    grid: TokenGrid, axes: int, level: int, anchored: bool = False, device: torch.device | str | None = None
) -> Tensor:
    """Returns the coordinates of the latents in use: (K, 1 + axes) the index in the window, then the row and column of
    the window (for video the time before them); of anchored ones (K, axes) those of their tokens in the grid."""
    if anchored:
        kept = grid.raster_index()[:, spread_order(grid.window)[:level]].flatten()
        return coordinates(grid.size, axes, "cpu")[kept].to(device)
    place = coordinates(grid.shape, axes, device)
    index = torch.arange(level, device=device).repeat(grid.num_windows)
    return torch.cat((index[:, None], place.repeat_interleave(level, dim=0)), dim=1)


@remembered_tables
def latent_rotary(
    grid: TokenGrid, axes: int, level: int, anchored: bool, head_dim: int, theta: float, device: torch.device
) -> Rotary:
    """Returns rotary positions (K, d / 2) of the latents of any grid."""
    return rotary(latent_positions(grid, axes, level, anchored, device), head_dim, theta)
