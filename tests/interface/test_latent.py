"""Read, Write and the interface against plain float64 loops, and what must hold whatever the weights are."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.utils.flop_counter import FlopCounterMode

from elit import ElitError
from elit.interface import InterfaceConfig, LatentInterface, TokenGrid
from elit.interface.latent import latent_positions
from elit.layers import init_model
from tests.helpers import reference
from tests.helpers.models import PUBLISHED, randomize

HEADS, WIDTH, THETA = 4, 32, 100.0
PAPER = InterfaceConfig(group_size=2)
VARIANTS = {
    "paper": PAPER,
    "paper, deep Write": InterfaceConfig(group_size=2, write_depth=2),
    "paper, tail visible": InterfaceConfig(group_size=2, tail_visible=True),
    "published": PUBLISHED,
    "published, tail dropped": replace(PUBLISHED, tail_visible=False),
}
every_variant = pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())


def build(
    config: InterfaceConfig, size: tuple[int, int, int] = (1, 4, 6), width: int = WIDTH, heads: int = HEADS
) -> LatentInterface:
    return randomize(LatentInterface(config, width, heads, size, THETA), seed=1).double()


def tokens(interface: LatentInterface, batch: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Spatial tokens and conditions."""
    draws = torch.Generator().manual_seed(seed)
    width = interface.latents.shape[1]
    s = torch.randn(batch, interface.grid.num_tokens, width, generator=draws, dtype=torch.float64)
    return s, torch.randn(batch, width, generator=draws, dtype=torch.float64)


def read(interface: LatentInterface, s: Tensor, c: Tensor, level: int) -> Tensor:
    """Latents (B, G, J~, D), as the core takes them."""
    return interface.read(interface.to_windows(s, interface.grid), c, level)[:, :, :level]


def mix(latents: Tensor) -> Tensor:
    """A stand-in for the core: all latents (B, G, J~, D) of a sample see each other."""
    return torch.tanh(latents) + latents.mean((1, 2), keepdim=True)


def roundtrip(
    interface: LatentInterface,
    s: Tensor,
    c: Tensor,
    level: int,
    core: Callable[[Tensor], Tensor] = mix,
    grid: TokenGrid | None = None,
) -> Tensor:
    """Spatial tokens (B, N, D) through Read, a core and Write."""
    grid = interface.grid if grid is None else grid
    windows = interface.to_windows(s, grid)
    filled = interface.read(windows, c, level)
    latents = core(filled[:, :, :level])
    return grid.from_windows(interface.write(windows, interface.with_tail(latents, filled)))


# ------------------------------------------------------------------------------------------------ the reference


@every_variant
@pytest.mark.parametrize(
    ("size", "group_size"), [((1, 4, 6), 2), ((2, 4, 4), (1, 2, 2)), ((4, 2, 4), (2, 2, 2))], ids=str
)
def test_read_and_write_are_the_plain_loops(
    config: InterfaceConfig, size: tuple[int, int, int], group_size: int | tuple[int, int, int]
) -> None:
    interface = build(replace(config, group_size=group_size), size)
    grid, published = interface.grid, config.variant == "published"
    weights, (s, c) = reference.weights_of(interface), tokens(interface)
    for level in {1, interface.num_latents // 2 + 1, interface.num_latents}:
        latents = read(interface, s, c, level)
        answer = roundtrip(interface, s, c, level, lambda x: torch.tanh(x) + 0.1)  # Write sees what the core gives
        filled = interface.num_latents if config.tail_visible else level
        for sample in range(len(s)):
            vectors = list(reference.array(s[sample]))
            expected = reference.read(
                weights, vectors, reference.array(c[sample]), size, grid.window, HEADS, THETA, published, filled
            )
            kept = np.array([window[:level] for window in expected])
            # both sides are float64; what is left is the order of summation, some 1e-15 a term
            np.testing.assert_allclose(latents[sample].detach().numpy(), kept, rtol=0, atol=1e-12)
            seen = [[*(np.tanh(x) + 0.1 for x in window[:level]), *window[level:]] for window in expected]
            wrote = reference.write(
                weights, vectors, seen, size, grid.window, HEADS, THETA, published, config.write_depth
            )
            np.testing.assert_allclose(answer[sample].detach().numpy(), np.array(wrote), rtol=0, atol=1e-12)


@every_variant
def test_float32_is_float64_within_its_precision(config: InterfaceConfig) -> None:
    interface = build(config)
    s, c = tokens(interface)
    exact = roundtrip(interface, s, c, 3)
    rough = roundtrip(interface.float(), s.float(), c.float(), 3)
    # 2^-24 a rounding, some hundred roundings in a row, values of about 3: 1e-5 leaves a margin of ten
    torch.testing.assert_close(rough.double(), exact, rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------------ shapes, levels


@every_variant
@pytest.mark.parametrize("level", [1, 2, 3, 4])
def test_shapes_are_those_of_the_latents_kept(config: InterfaceConfig, level: int) -> None:
    interface = build(config)
    s, c = tokens(interface, batch=3)
    filled = interface.read(interface.to_windows(s, interface.grid), c, level)
    assert filled.shape == (3, interface.grid.num_windows, 4 if config.tail_visible else level, WIDTH)
    assert roundtrip(interface, s, c, level).shape == s.shape


@pytest.mark.parametrize("config", [PAPER, VARIANTS["published, tail dropped"]], ids=["paper", "published"])
def test_fewer_latents_are_a_prefix_of_more(config: InterfaceConfig) -> None:
    interface = build(config)
    s, c = tokens(interface)
    full = read(interface, s, c, 4)
    for level in (1, 2, 3):
        few = read(interface, s, c, level)
        torch.testing.assert_close(few, full[:, :, :level], rtol=0, atol=1e-13)  # float64, another batch of queries


def test_levels_run_from_the_smallest_to_all() -> None:
    def levels(group_size: int, min_latents: int | None = None) -> tuple[int, ...]:
        config = InterfaceConfig(group_size, min_latents)
        return LatentInterface(config, 8, 2, (1, 16, 16), THETA).levels

    assert levels(4) == tuple(range(1, 17))
    assert levels(8) == tuple(range(4, 65))
    assert levels(4, min_latents=8) == tuple(range(8, 17))
    assert levels(4, min_latents=16) == (16,)
    assert levels(1) == (1,)


def test_a_budget_is_rounded_as_its_variant_says() -> None:
    paper = LatentInterface(InterfaceConfig(4), 8, 2, (1, 4, 4), THETA)
    published = LatentInterface(InterfaceConfig(4, variant="published"), 8, 2, (1, 4, 4), THETA)
    assert [paper.level(b) for b in (None, 1.0, 0.29, 0.25, 0.01)] == [16, 16, 5, 4, 1]  # less than one is one
    assert [published.level(b) for b in (None, 1.0, 0.29, 0.25, 0.01)] == [16, 16, 4, 4, 1]


def test_levels_are_those_of_training_where_they_are_told() -> None:
    interface = LatentInterface(InterfaceConfig(4, levels=(16, 4, 8)), 8, 2, (1, 4, 4), THETA)
    assert interface.levels == (4, 8, 16)
    assert [interface.level(b) for b in (None, 1.0, 0.7, 0.3, 0.22)] == [16, 16, 8, 4, 4]  # the nearest of them
    with pytest.raises(
        ElitError, match=r"trained with 4, 8 and 16: take at least 0\.25, or allow others with --untrained-levels"
    ):
        interface.level(1 / 16)
    interface.allow_untrained_levels()
    assert interface.levels == tuple(range(1, 17))
    assert interface.level(1 / 16) == 1


def test_no_budget_is_the_highest_level_that_was_trained() -> None:
    interface = LatentInterface(InterfaceConfig(4, levels=(2, 8)), 8, 2, (1, 4, 4), THETA)
    assert interface.level(None) == interface.level(1.0) == 8


@pytest.mark.parametrize("levels", [(), (0, 4), (17,)])
def test_impossible_levels_are_named(levels: tuple[int, ...]) -> None:
    with pytest.raises(ElitError, match=r"levels is .*; a window of 16 latents has the levels"):
        LatentInterface(InterfaceConfig(4, levels=levels), 8, 2, (1, 4, 4), THETA)


@pytest.mark.parametrize("min_latents", [0, -1, 17])
def test_an_impossible_smallest_level_is_named(min_latents: int) -> None:
    with pytest.raises(ElitError, match=f"min_latents is {min_latents}; a window has 1 to 16 latents"):
        LatentInterface(InterfaceConfig(4, min_latents), 8, 2, (1, 4, 4), THETA)


def test_a_group_size_that_does_not_tile_is_named() -> None:
    with pytest.raises(ElitError, match="group size 3 does not divide the 16 tokens"):
        LatentInterface(InterfaceConfig(3), 8, 2, (1, 16, 16), THETA)


def test_the_published_variant_has_positions_for_its_own_grid_only() -> None:
    with pytest.raises(ElitError, match="4096 latent positions, too few for 4160 tokens"):
        LatentInterface(InterfaceConfig(1, variant="published"), 8, 2, (1, 65, 64), THETA)
    published = build(PUBLISHED)
    assert published.grid_of((1, 4, 6)) == published.grid
    with pytest.raises(ElitError, match=r"\(1, 4, 6\) grid, not of \(1, 8, 8\)"):
        published.grid_of((1, 8, 8))


def test_the_paper_variant_takes_any_grid_that_its_windows_tile() -> None:
    interface = build(PAPER)
    grid = interface.grid_of((1, 8, 10))
    assert grid == TokenGrid((1, 8, 10), (1, 2, 2))
    s, c = torch.randn(2, 80, WIDTH).double(), torch.randn(2, WIDTH).double()
    assert interface.read(interface.to_windows(s, grid), c, 2).shape == (2, 20, 2, WIDTH)
    assert roundtrip(interface, s, c, 2, grid=grid).shape == s.shape
    with pytest.raises(ElitError, match="group size 2 does not divide the 5 tokens"):
        interface.grid_of((1, 5, 8))


# ------------------------------------------------------------------------------------------------ what must hold


@every_variant
def test_a_new_write_gives_the_spatial_tokens_back(config: InterfaceConfig) -> None:
    fresh = LatentInterface(config, WIDTH, HEADS, (1, 4, 6), THETA)
    init_model(fresh)
    s, c = torch.randn(2, 24, WIDTH), torch.randn(2, WIDTH)
    answer = roundtrip(fresh, s, c, 4)
    if config.variant == "paper":
        assert torch.equal(answer, s)
    else:  # the published Write adds its positions to the tokens themselves
        added = (fresh.read_positions + fresh.write_positions).expand(2, 6, -1, -1)
        torch.testing.assert_close(answer, s + fresh.grid.from_windows(added))


@pytest.mark.parametrize("config", [PAPER, VARIANTS["published, tail dropped"]], ids=["paper", "published"])
@pytest.mark.parametrize("level", [1, 2, 3])
def test_the_answer_depends_on_the_latents_kept_and_on_no_other(config: InterfaceConfig, level: int) -> None:
    interface = build(config)
    s, c = tokens(interface)
    before = roundtrip(interface, s, c, level)
    with torch.no_grad():
        interface.latents[level:] += 100
    assert torch.equal(roundtrip(interface, s, c, level), before)
    for kept in range(level):
        with torch.no_grad():
            interface.latents[kept] += 0.1 * torch.arange(WIDTH).cos()
        after = roundtrip(interface, s, c, level)
        assert (after - before).abs().amax(dim=(0, 2)).min() > 1e-6  # in every spatial token
        before = after


@pytest.mark.parametrize("config", [VARIANTS["paper, tail visible"], PUBLISHED], ids=["paper", "published"])
def test_a_visible_tail_is_seen_by_write_but_not_by_the_core(config: InterfaceConfig) -> None:
    interface = build(config)
    s, c = tokens(interface)
    before, seen = roundtrip(interface, s, c, 2), read(interface, s, c, 2)
    with torch.no_grad():
        interface.latents[3] += torch.arange(WIDTH).cos()
    assert torch.equal(read(interface, s, c, 2), seen)
    assert (roundtrip(interface, s, c, 2) - before).abs().max() > 1e-6


@every_variant
def test_windows_do_not_see_each_other(config: InterfaceConfig) -> None:
    interface = build(config)
    s, c = tokens(interface)
    changed = interface.grid.to_windows(s)
    changed[:, 2] += torch.randn_like(changed[:, 2])
    changed = interface.grid.from_windows(changed)

    def answers(x: Tensor) -> tuple[Tensor, Tensor]:
        return read(interface, x, c, 3), interface.grid.to_windows(roundtrip(interface, x, c, 3, torch.tanh))

    for before, after in zip(answers(s), answers(changed), strict=True):
        differs = (after - before).abs().amax(dim=(0, 2, 3))
        assert differs[2] > 1e-3
        differs[2] = 0
        assert differs.max() < 1e-13  # float64; a batched product may sum in another order


def test_read_permutes_with_its_windows() -> None:
    interface = build(PAPER)
    s, c = tokens(interface)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    moved = interface.grid.from_windows(interface.grid.to_windows(s)[:, order])
    latents, again = read(interface, s, c, 3), read(interface, moved, c, 3)
    torch.testing.assert_close(again, latents[:, order], rtol=0, atol=1e-13)
    assert (again - latents).abs().max() > 1e-2


def test_read_tells_the_tokens_of_a_window_apart() -> None:
    interface = build(PAPER)
    s, c = tokens(interface)
    swapped = interface.grid.to_windows(s)[:, :, [1, 0, 2, 3]]
    latents, again = read(interface, s, c, 4), read(interface, interface.grid.from_windows(swapped), c, 4)
    assert (again - latents).abs().max() > 1e-3


def test_write_ignores_the_order_of_the_latents_it_reads() -> None:
    """Attention over a set: what a latent is comes from its content, given in Read and the core."""
    interface = build(PAPER)
    s, c = tokens(interface)
    as_they_are = roundtrip(interface, s, c, 4, lambda latents: latents)
    moved = roundtrip(interface, s, c, 4, lambda latents: latents[:, :, [2, 0, 3, 1]])
    torch.testing.assert_close(moved, as_they_are, rtol=0, atol=1e-13)


def test_read_listens_to_the_condition() -> None:
    interface = build(PAPER)
    s, c = tokens(interface)
    assert (read(interface, s, c, 4) - read(interface, s, -c, 4)).abs().max() > 0.1


# ------------------------------------------------------------------------------------------------ positions


def test_latents_are_placed_by_index_then_window() -> None:
    interface = build(PAPER)
    place = latent_positions(interface.grid, 2, interface.num_latents).tolist()
    assert place == [[j, row, column] for row in range(2) for column in range(3) for j in range(4)]
    video = build(InterfaceConfig((1, 2, 2)), (2, 2, 4))
    assert latent_positions(video.grid, 3, video.num_latents).tolist() == [
        [j, t, 0, column] for t in range(2) for column in range(2) for j in range(4)
    ]


@pytest.mark.parametrize("size", [(1, 4, 6), (1, 6, 4), (1, 8, 8)])
def test_core_positions_of_a_level_are_those_of_the_latents_kept(size: tuple[int, int, int]) -> None:
    interface = build(PAPER)
    grid, cpu = interface.grid_of(size), torch.device("cpu")
    x = torch.randn(8).double()
    for level in (1, 3, 4):
        rope = interface.core_rope(grid, level, cpu)
        assert rope is not None
        kept = [p for p in latent_positions(grid, 2, interface.num_latents).tolist() if p[0] < level]
        assert rope.cos.shape == (len(kept), 4)
        for cos, sin, place in zip(rope.cos, rope.sin, kept, strict=True):
            turned = reference.turn(x.numpy(), place, THETA)
            a, b = x.chunk(2)
            ours = torch.cat((a * cos - b * sin, a * sin + b * cos))
            np.testing.assert_allclose(ours.numpy(), turned, rtol=0, atol=1e-12)


def test_the_published_variant_has_no_rotary_positions() -> None:
    interface = build(PUBLISHED)
    assert interface.window_rope() is None
    assert interface.core_rope(interface.grid, 2, torch.device("cpu")) is None


# ------------------------------------------------------------------------------------------------ gradients


@every_variant
def test_gradients_are_those_of_finite_differences(config: InterfaceConfig) -> None:
    interface = build(config, (1, 2, 4), width=8, heads=2)
    s, c = tokens(interface, batch=1)

    def of_inputs(x: Tensor, condition: Tensor) -> Tensor:
        return roundtrip(interface, x, condition, 3)

    assert gradcheck(of_inputs, (s.requires_grad_(), c.requires_grad_()))


@every_variant
def test_gradients_of_the_weights_are_those_of_finite_differences(config: InterfaceConfig) -> None:
    interface = build(config, (1, 2, 4), width=8, heads=2)
    s, c = tokens(interface, batch=1)
    names, weights = zip(*interface.named_parameters(), strict=True)

    class Both(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.interface = interface

        def forward(self) -> Tensor:
            return roundtrip(self.interface, s, c, 3)

    both = Both()

    def of_weights(*values: Tensor) -> Tensor:
        named = {f"interface.{name}": value for name, value in zip(names, values, strict=True)}
        return torch.func.functional_call(both, named, ())

    assert gradcheck(of_weights, weights, fast_mode=True)


@every_variant
def test_every_weight_has_a_gradient(config: InterfaceConfig) -> None:
    interface = build(config)
    s, c = tokens(interface)
    roundtrip(interface, s, c, 4).square().sum().backward()
    for name, weight in interface.named_parameters():
        assert weight.grad is not None, name
        touched = weight.grad.abs() > 0
        if name == "read_layer.modulation.linear.weight" or name == "read_layer.modulation.linear.bias":
            touched = touched[: 6 * WIDTH]  # the published seventh part serves nothing
        if name == "latent_positions":
            assert not touched[interface.grid.num_tokens :].any()  # rows of larger grids
            touched = touched[: interface.grid.num_tokens]
        assert touched.flatten(1).any(1).all() if weight.dim() > 1 else touched.any(), name


def test_the_gradient_of_dropped_latents_is_zero() -> None:
    interface = build(PAPER)
    s, c = tokens(interface)
    roundtrip(interface, s, c, 2).square().sum().backward()
    assert interface.latents.grad is not None
    assert (interface.latents.grad.abs().sum(1) > 0).tolist() == [True, True, False, False]


def test_attention_is_cheaper_with_fewer_latents() -> None:
    """FLOPs of Read and Write are those of the latents kept: what is dropped is not computed."""
    interface = LatentInterface(InterfaceConfig(4), WIDTH, HEADS, (1, 16, 16), THETA).to("meta")
    s, c = torch.empty(1, 256, WIDTH, device="meta"), torch.empty(1, WIDTH, device="meta")

    def cost(level: int) -> int:
        with FlopCounterMode(display=False) as counter:
            roundtrip(interface, s, c, level)
        return counter.get_total_flops()

    token, latent = 2 * WIDTH**2, 16 * 2 * WIDTH**2  # one linear layer, for a token and for a latent of each window
    attention = 2 * 2 * 2 * 256 * WIDTH  # Read and Write, scores and values, of each latent of a window
    modulation = 6 * 2 * WIDTH**2
    for level in (1, 4, 16):
        of_tokens = 256 * token * (2 + 2 + 2)  # keys and values of Read; queries and projection of Write; its MLP
        of_latents = latent * (2 + 2 + 2)  # queries and projection of Read, its MLP; keys and values of Write
        assert cost(level) == of_tokens + modulation + level * (of_latents + attention)
