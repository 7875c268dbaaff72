"""HDiT against plain loops, its levels, and sizes that cannot be merged."""

from typing import Any

import numpy as np
import pytest
import torch

import elit
from elit import ElitError
from elit.interface import InterfaceConfig
from elit.models import DiT, HDiT, config_for
from tests.helpers import reference
from tests.helpers.models import inputs
from tests.helpers.stacks import Positions, Vectors, check_stack, tiny


def plain_blocks(model: HDiT, c: np.ndarray) -> Any:
    """Blocks first..end - 1 on vectors; tokens come in runs of four wherever the inner blocks are among them."""
    config, weights = model.config, reference.weights_of(model)
    inner, outer = config.outer_depth, config.depth - config.outer_depth

    def some(first: int, end: int, x: Vectors, positions: Positions, heads: int) -> Vectors:
        for i in range(first, end):
            own = reference.part(weights, f"blocks.{i}")
            x = reference.block(own, x, c, heads, positions, config.rope_theta)
        return x

    def blocks(first: int, end: int, x: Vectors, positions: Positions) -> Vectors:
        if end <= inner or first >= outer:
            return some(first, end, x, positions, config.num_heads)
        x = some(first, inner, x, positions, config.num_heads)
        runs = [np.concatenate(x[i : i + 4]) for i in range(0, len(x), 4)]
        wide = some(
            inner, outer, [reference.linear(weights, "merge", r) for r in runs], positions[::4], 2 * config.num_heads
        )
        back = [token for w in wide for token in np.split(reference.linear(weights, "split", w), 4)]
        share = weights["inner_share"]
        x = [(1 - share) * a + share * b for a, b in zip(x, back, strict=True)]
        return some(outer, end, x, positions, config.num_heads)

    return blocks


@pytest.mark.parametrize("name", ["ELIT-HDiT", "ELIT-HDiT, all outer blocks in space"])
@pytest.mark.parametrize("level", [4, 8])
def test_the_stack_is_the_plain_loops(name: str, level: int) -> None:
    model = tiny(name, input_size=(8, 8), interface=InterfaceConfig((1, 2, 4))).double()
    check_stack(model, plain_blocks, level)


def test_the_plain_stack_merges_squares() -> None:
    model = tiny("ELIT-HDiT", interface=None, input_size=(8, 12)).double()
    size = (1, 4, 6)
    x, t, y = inputs(model, 1, dtype=torch.float64)
    s, c = DiT.embed(model, x, size), model.condition(t, y)  # in raster order
    order = [n for square in reference.windows_of(size, (1, 2, 2)) for n in square]
    places = reference.places(size, False)
    tokens, at = [reference.array(s[0, n]) for n in order], [places[n] for n in order]
    expected = np.empty(s.shape[1:])
    expected[order] = plain_blocks(model, reference.array(c[0]))(0, model.config.depth, tokens, at)
    velocity = DiT.project(model, torch.from_numpy(expected)[None], c, model.encode(x, t, y))
    torch.testing.assert_close(model(x, t, y), velocity, rtol=0, atol=1e-10)  # float64, 6 blocks


@pytest.mark.parametrize(
    ("group", "smallest", "levels"),
    [(4, None, (4, 8, 12, 16)), (8, None, tuple(range(4, 65, 4))), (4, 8, (8, 12, 16)), (4, 5, (8, 12, 16))],
)
def test_levels_are_multiples_of_four(group: int, smallest: int | None, levels: tuple[int, ...]) -> None:
    model = tiny("ELIT-HDiT", input_size=32, interface=InterfaceConfig(group, min_latents=smallest))
    assert model.levels == levels


def test_a_budget_is_rounded_to_a_level() -> None:
    model = tiny("ELIT-HDiT", input_size=16, interface=InterfaceConfig(4))
    assert [model.level(budget) for budget in (0.25, 0.4, 0.5, 0.7, 1, None)] == [4, 8, 8, 12, 16, 16]
    with pytest.raises(ElitError, match=r"means 1 of 16 latents, .* trained with 4, 8, 12 and 16: take at least 0\.25"):
        model.level(1 / 16)
    x, t, y = inputs(model, 2)
    assert torch.equal(model(x, t, y, 0.4), model(x, t, y, 0.5))


def test_depths_of_the_named_sizes() -> None:
    of = {size: config_for(f"HDiT-{size}/2") for size in ("S", "B", "L", "XL")}
    assert {size: (config.outer_depth, config.inner_depth) for size, config in of.items()} == {
        "S": (4, 4), "B": (4, 4), "L": (7, 10), "XL": (8, 12),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "changes", "why"),
    [
        ("HDiT-B/2", {"inner_depth": 5}, "inner_depth 5 of depth 12 leaves no two equal outer parts"),
        ("HDiT-B/2", {"inner_depth": 0}, "inner_depth 0 of depth 12"),
        ("HDiT-B/2", {"inner_depth": 14}, "inner_depth 14 of depth 12"),
        ("ELIT-HDiT-B/2", {"head_depth": 5}, "must not exceed the 4 outer blocks of each side"),
        ("ELIT-HDiT-B/2", {"group_size": 1}, "a window of 1 latents has no runs of 4"),
        ("HDiT-B/2", {"resolution": 48}, "a grid of 3x3 tokens has an odd side"),
    ],
)
def test_what_does_not_fit_is_named(name: str, changes: dict[str, Any], why: str) -> None:
    with pytest.raises(ElitError, match=why), torch.device("meta"):
        elit.create(name, **changes)


def test_a_plain_model_refuses_a_grid_of_odd_sides() -> None:
    model = tiny("ELIT-HDiT", interface=None)
    with pytest.raises(ElitError, match="a grid of 4x5 tokens has an odd side"):
        model(torch.randn(1, 3, 8, 10), torch.rand(1), torch.zeros(1, dtype=torch.long))
