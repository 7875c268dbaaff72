"""Windows: what they hold, in which order, and that nothing is lost."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from elit import ElitError
from elit.interface import TokenGrid, coordinates, triple

sides = st.integers(1, 3)
triples = st.tuples(sides, sides, sides)


@st.composite
def grids(draw: st.DrawFn) -> TokenGrid:
    """Any grid of up to 9 tokens a side, with any window that tiles it."""
    window, shape = draw(triples), draw(triples)
    return TokenGrid((window[0] * shape[0], window[1] * shape[1], window[2] * shape[2]), window)


@given(grids(), st.integers(1, 3), st.integers(1, 5))
def test_windows_are_undone_by_their_inverse(grid: TokenGrid, batch: int, width: int) -> None:
    x = torch.randn(batch, grid.num_tokens, width)
    windows = grid.to_windows(x)
    assert windows.shape == (batch, grid.num_windows, grid.window_tokens, width)
    assert torch.equal(grid.from_windows(windows), x)
    y = torch.randn_like(windows)
    assert torch.equal(grid.to_windows(grid.from_windows(y)), y)


@given(grids())
def test_windows_and_their_tokens_are_in_raster_order(grid: TokenGrid) -> None:
    (_, h, w), (wt, wh, ww), (_, gh, gw) = grid.size, grid.window, grid.shape
    index = grid.raster_index()
    assert index.shape == (grid.num_windows, grid.window_tokens)
    for g in range(grid.num_windows):
        window_t, window_row, window_column = g // (gh * gw), g // gw % gh, g % gw
        for j in range(grid.window_tokens):
            t = window_t * wt + j // (wh * ww)
            row = window_row * wh + j // ww % wh
            column = window_column * ww + j % ww
            assert index[g, j] == (t * h + row) * w + column


@given(grids())
def test_every_token_is_in_exactly_one_window(grid: TokenGrid) -> None:
    assert sorted(grid.raster_index().flatten().tolist()) == list(range(grid.num_tokens))
    assert grid.num_windows * grid.window_tokens == grid.num_tokens


def test_a_window_of_an_image_is_a_square_of_it() -> None:
    image = torch.arange(24).view(1, 24, 1)  # 4 rows of 6
    windows = TokenGrid.of((4, 6), (2, 3)).to_windows(image)[0, :, :, 0]
    assert windows.tolist() == [
        [0, 1, 2, 6, 7, 8],
        [3, 4, 5, 9, 10, 11],
        [12, 13, 14, 18, 19, 20],
        [15, 16, 17, 21, 22, 23],
    ]


def test_the_papers_grids() -> None:
    image, video = TokenGrid.of(16, 4), TokenGrid.of((8, 16, 16), (2, 4, 4))
    assert (image.num_windows, image.window_tokens, image.shape) == (16, 16, (1, 4, 4))
    assert (video.num_windows, video.window_tokens, video.shape) == (64, 32, (4, 4, 4))


@pytest.mark.parametrize(
    ("size", "window", "axis"),
    [((1, 8, 8), (1, 3, 4), "height"), ((1, 8, 9), (1, 4, 4), "width"), ((3, 8, 8), (2, 4, 4), "time")],
)
def test_windows_that_do_not_tile_name_the_axis_and_what_would(
    size: tuple[int, int, int], window: tuple[int, int, int], axis: str
) -> None:
    with pytest.raises(ElitError, match=rf"group size .* does not divide .* along {axis}; take one of \[1"):
        TokenGrid(size, window)


def test_sizes_are_spelled_out() -> None:
    assert triple(8) == (1, 8, 8)
    assert triple((4, 6)) == (1, 4, 6)
    assert triple([2, 4, 6]) == (2, 4, 6)


@pytest.mark.parametrize("size", [0, -4, (4,), (4, 0), (1, 2, 3, 4), ()])
def test_impossible_sizes_are_named(size: int | tuple[int, ...]) -> None:
    with pytest.raises(ElitError, match="neither a positive number"):
        triple(size)


def test_coordinates_are_row_and_column_and_for_video_time_first() -> None:
    assert coordinates((1, 2, 3)).tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
    assert coordinates((2, 1, 2)).tolist() == [[0, 0, 0], [0, 0, 1], [1, 0, 0], [1, 0, 1]]
    assert coordinates((1, 1, 3)).tolist() == [[0, 0], [0, 1], [0, 2]]
