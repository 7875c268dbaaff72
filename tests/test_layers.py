"""The building blocks against plain loops, and the properties that attention and positions rely on."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from elit.interface import coordinates
from elit.layers import (
    Attention,
    Block,
    CrossAttention,
    FinalLayer,
    FullWidthRMSNorm,
    Mlp,
    QKNorm,
    Rotary,
    RotaryTable,
    SelfAttention,
    TimeEmbed,
    init_model,
    layer_norm,
    rotary,
    rotate,
    sincos_table,
)
from tests.helpers import reference
from tests.helpers.models import randomize, tiny

WIDTH, HEADS, THETA = 24, 3, 100.0
norms = pytest.mark.parametrize("qk_norm", ["none", "head", "width"])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ------------------------------------------------------------------------------------------------ positions


@given(
    st.integers(1, 12).map(lambda pairs: 2 * pairs),
    st.lists(st.lists(st.integers(0, 40), min_size=3, max_size=3), min_size=2, max_size=5),
    st.lists(st.integers(-30, 30), min_size=3, max_size=3),
)
def test_attention_logits_depend_on_relative_positions_only(
    head_dim: int, places: list[list[int]], shift: list[int]
) -> None:
    positions = torch.tensor(places)
    q, k = normal(len(places), head_dim), normal(len(places), head_dim, seed=1)

    def logits(at: Tensor) -> Tensor:
        rope = rotary(at, head_dim, THETA)
        return rotate(q, rope) @ rotate(k, rope).T

    # the tables are float32: 6e-8 for each of four factors, on sums of up to 24 products
    torch.testing.assert_close(logits(positions + torch.tensor(shift)), logits(positions), rtol=0, atol=1e-5)


def test_attention_logits_do_depend_on_every_axis() -> None:
    q, k = normal(1, 12), normal(1, 12, seed=1)
    here = rotary(torch.tensor([[3, 5, 7]]), 12, THETA)
    straight = (rotate(q, here) * rotate(k, here)).sum()
    for axis in range(3):
        moved = torch.tensor([[3, 5, 7]])
        moved[0, axis] += 1
        assert ((rotate(q, here) * rotate(k, rotary(moved, 12, THETA))).sum() - straight).abs() > 1e-3


@given(st.integers(1, 16).map(lambda pairs: 2 * pairs), st.integers(1, 4))
def test_rotation_keeps_norms_and_the_origin_is_the_identity(head_dim: int, axes: int) -> None:
    x = normal(5, head_dim)
    rope = rotary(torch.randint(100, (5, axes)), head_dim, THETA)
    assert rope.cos.shape == rope.sin.shape == (5, head_dim // 2)
    turned = rotate(x, rope)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1), rtol=1e-6, atol=0)  # float32 tables
    assert torch.equal(rotate(x, rotary(torch.zeros(5, axes), head_dim, THETA)), x)


@pytest.mark.parametrize(("head_dim", "axes"), [(16, 2), (16, 3), (10, 2), (14, 3), (2, 3)])
def test_rotation_is_the_plain_one(head_dim: int, axes: int) -> None:
    positions = torch.randint(50, (6, axes))
    x = normal(6, head_dim)
    turned = rotate(x, rotary(positions, head_dim, THETA))
    expected = [reference.turn(v.numpy(), p, THETA) for v, p in zip(x, positions.tolist(), strict=True)]
    np.testing.assert_allclose(turned.numpy(), np.array(expected), rtol=0, atol=1e-12)


def test_a_rotary_table_is_the_one_computed_and_is_not_saved() -> None:
    positions = coordinates((1, 3, 4))
    table = RotaryTable(positions, 8, THETA)
    for ours, computed in zip(table(), rotary(positions, 8, THETA), strict=True):
        assert torch.equal(ours, computed)
    assert table.state_dict() == {}


def test_a_rotary_table_is_computed_when_it_leaves_the_meta_device() -> None:
    """By a move, which a table of no values cannot follow by copying, or for weights that are loaded afterwards."""
    positions = coordinates((1, 3, 4))
    with torch.device("meta"):
        tables = [RotaryTable(positions, 8, THETA).half() for _ in range(2)]
        assert all(value.is_meta for table in tables for value in table())
    expected = rotary(positions, 8, THETA)
    for table in (tables[0].to("cpu"), tables[1].to_empty(device="cpu")):
        assert all(torch.equal(*pair) for pair in zip(table(), expected, strict=True))
        assert table.to("meta")().cos.is_meta
        assert all(torch.equal(*pair) for pair in zip(table.to("cpu")(), expected, strict=True))


def test_the_sincos_table_is_that_of_dit() -> None:
    """Every entry by its formula (half the channels for the column, half for the row; sines, then cosines)."""
    width, table = 16, sincos_table(coordinates((1, 3, 5)), 16)
    for n in range(15):
        for channel in range(width):
            place = n % 5 if channel < width // 2 else n // 5
            angle = place * 10_000 ** (-(channel % 4) / 4)
            expected = math.sin(angle) if channel % 8 < 4 else math.cos(angle)
            assert table[n, channel].item() == pytest.approx(expected, abs=1e-7)  # a rounding to float32


# ------------------------------------------------------------------------------------------------ norms


def test_the_full_width_norm_has_its_epsilon_outside_the_root() -> None:
    norm = randomize(FullWidthRMSNorm(WIDTH)).double()
    x = normal(4, WIDTH) * torch.tensor([[1e-5], [1e-3], [1.0], [1e3]])  # small values show the epsilon
    expected = [reference.full_width_norm(v.numpy(), reference.array(norm.weight)) for v in x]
    np.testing.assert_allclose(norm(x).detach().numpy(), np.array(expected), rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_norms_keep_the_dtype(dtype: torch.dtype) -> None:
    x = normal(2, 5, WIDTH).to(dtype)
    assert FullWidthRMSNorm(WIDTH).to(dtype)(x).dtype == dtype
    assert layer_norm(WIDTH)(x).dtype == dtype


def test_the_full_width_norm_of_bfloat16_is_computed_in_float32() -> None:
    x = normal(64, 512).bfloat16()
    exact = x.double() / (x.double().square().mean(-1, keepdim=True).sqrt() + 1e-5)
    rounded = FullWidthRMSNorm(512).bfloat16()(x).double()
    # one rounding of the result, half a unit in the last of bfloat16's 8 bits
    assert ((rounded - exact).abs() <= 2**-8 * 1.01 * exact.abs()).all()


# ------------------------------------------------------------------------------------------------ attention


def vectors(x: Tensor) -> list[np.ndarray]:
    return list(x.detach().numpy())


@norms
@pytest.mark.parametrize("with_rope", [True, False])
def test_cross_attention_is_the_plain_loop(qk_norm: QKNorm, with_rope: bool) -> None:
    attention = randomize(CrossAttention(WIDTH, HEADS, qk_norm)).double()
    x, context = normal(2, 4, WIDTH), normal(2, 6, WIDTH, seed=1)
    x_at, context_at = coordinates((1, 2, 2)), coordinates((1, 2, 3))
    ropes = [rotary(at, WIDTH // HEADS, THETA) if with_rope else None for at in (x_at, context_at)]
    answer = attention(x, context, *ropes)
    for sample in range(2):
        expected = reference.cross_attention(
            reference.weights_of(attention), vectors(x[sample]), vectors(context[sample]), HEADS,
            x_at.tolist() if with_rope else [None] * 4, context_at.tolist() if with_rope else [None] * 6,
            THETA, qk_norm == "width",
        )  # fmt: skip
        np.testing.assert_allclose(answer[sample].detach().numpy(), np.array(expected), rtol=0, atol=1e-12)


@norms
def test_attention_weights_are_those_of_the_forward(qk_norm: QKNorm) -> None:
    attention = randomize(CrossAttention(WIDTH, HEADS, qk_norm)).double()
    x, context = normal(2, 4, WIDTH), normal(2, 6, WIDTH, seed=1)
    ropes = [rotary(coordinates(size), WIDTH // HEADS, THETA) for size in ((1, 2, 2), (1, 2, 3))]
    weights = attention.weights(x, context, *ropes)
    assert weights.shape == (2, HEADS, 4, 6)
    assert weights.min() >= 0
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, HEADS, 4).double(), rtol=0, atol=1e-14)
    *_, values = attention.project(x, context, *ropes)
    torch.testing.assert_close(attention.merge(weights @ values), attention(x, context, *ropes), rtol=0, atol=1e-13)
    assert weights.std(-1).min() > 1e-3  # not the uniform ones


@norms
def test_self_attention_follows_its_tokens(qk_norm: QKNorm) -> None:
    attention = randomize(SelfAttention(WIDTH, HEADS, qk_norm)).double()
    x, order = normal(2, 6, WIDTH), torch.tensor([4, 2, 0, 5, 1, 3])
    rope = rotary(coordinates((1, 2, 3)), WIDTH // HEADS, THETA)
    moved = Rotary(rope.cos[order], rope.sin[order])
    torch.testing.assert_close(attention(x[:, order], moved), attention(x, rope)[:, order], rtol=0, atol=1e-13)
    assert (attention(x[:, order], rope) - attention(x, rope)[:, order]).abs().max() > 1e-3  # places matter


@norms
def test_normalized_queries_and_keys_do_not_feel_their_scale(qk_norm: QKNorm) -> None:
    attention = randomize(CrossAttention(WIDTH, HEADS, qk_norm)).double()
    x, context = normal(2, 4, WIDTH), normal(2, 6, WIDTH, seed=1)
    before = attention.weights(x, context)
    with torch.no_grad():
        for parameter in attention.q.parameters():
            parameter *= 1e3
    change = (attention.weights(x, context) - before).abs().max()
    assert change > 0.1 if qk_norm == "none" else change < 1e-4  # the epsilon of the norm


# ------------------------------------------------------------------------------------------------ blocks


@pytest.mark.parametrize("qk_norm", ["none", "head"])
@pytest.mark.parametrize("positions", ["rotary", "none"])
def test_a_block_is_the_plain_loop(qk_norm: QKNorm, positions: str) -> None:
    block = randomize(Block(WIDTH, HEADS, 4.0, qk_norm)).double()
    x, c, at = normal(3, 6, WIDTH), normal(3, WIDTH, seed=1), coordinates((1, 2, 3))
    rope = rotary(at, WIDTH // HEADS, THETA) if positions == "rotary" else None
    answer = block(x, c, rope)
    for sample in range(3):
        expected = reference.block(
            reference.weights_of(block), vectors(x[sample]), c[sample].numpy(), HEADS,
            [None] * 6 if rope is None else at.tolist(), THETA,
        )  # fmt: skip
        np.testing.assert_allclose(answer[sample].detach().numpy(), np.array(expected), rtol=0, atol=1e-12)


def test_the_final_layer_is_the_plain_one() -> None:
    final = randomize(FinalLayer(WIDTH, 5)).double()
    weights = reference.weights_of(final)
    x, c = normal(2, 3, WIDTH), normal(2, WIDTH, seed=1)
    for sample in range(2):
        shift, scale = np.split(reference.linear(weights, "modulation.linear", reference.silu(c[sample].numpy())), 2)
        for token, answer in zip(x[sample], final(x, c)[sample], strict=True):
            expected = reference.linear(weights, "linear", reference.layer_norm(token.numpy()) * (1 + scale) + shift)
            np.testing.assert_allclose(answer.detach().numpy(), expected, rtol=0, atol=1e-12)


def test_the_mlp_is_the_plain_one_with_the_tanh_gelu() -> None:
    mlp, x = randomize(Mlp(WIDTH, 2 * WIDTH)).double(), normal(7, WIDTH)
    expected = [reference.mlp(reference.weights_of(mlp), v) for v in vectors(x)]
    np.testing.assert_allclose(mlp(x).detach().numpy(), np.array(expected), rtol=0, atol=1e-12)


def test_the_time_embedding_is_the_plain_one() -> None:
    embed, t = randomize(TimeEmbed(WIDTH)).double(), torch.tensor([0.0, 0.125, 0.7, 1.0])
    weights = reference.weights_of(embed)
    for time, answer in zip(t.tolist(), embed(t), strict=True):
        angles = [time * math.exp(-math.log(10_000) * k / 128) for k in range(128)]
        features = np.array([math.cos(a) for a in angles] + [math.sin(a) for a in angles])
        expected = reference.linear(weights, "fc2", reference.silu(reference.linear(weights, "fc1", features)))
        np.testing.assert_allclose(answer.detach().numpy(), expected, rtol=0, atol=1e-6)  # features are float32


def test_a_new_block_is_the_identity_and_a_new_model_answers_zero() -> None:
    block, final = Block(WIDTH, HEADS, 4.0, "head"), FinalLayer(WIDTH, 5)
    for module in (block, final):
        init_model(module)
    x, c = torch.randn(2, 6, WIDTH), torch.randn(2, WIDTH)
    assert torch.equal(block(x, c, None), x)
    assert not final(x, c).any()


def test_a_new_linear_layer_is_xavier_uniform_without_bias() -> None:
    mlp = Mlp(100, 400)
    init_model(mlp)
    bound = math.sqrt(6 / 500)
    assert mlp.fc1.weight.abs().max() <= bound
    assert mlp.fc1.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)  # 40,000 draws
    assert not mlp.fc1.bias.any()


def test_heads_are_consecutive_channels() -> None:
    attention = Attention(6, 3, "none")
    heads = attention.heads(torch.arange(12.0).view(1, 2, 6))
    assert heads[0, :, 1].tolist() == [[6, 7], [8, 9], [10, 11]]


def test_rotary_tables_stay_float32_whatever_a_model_is_cast_to() -> None:
    model = tiny()
    exact = model.rope_table.cos.clone()
    there_and_back = model.to(torch.bfloat16).float()
    assert torch.equal(there_and_back.rope_table.cos, exact)
    assert model.to("meta").rope_table.cos.device.type == "meta"


def test_rotation_of_bfloat16_is_rounded_once() -> None:
    x = torch.randn(2, 5, 8)
    rope = rotary(torch.rand(5, 2) * 40, 8, 100.0)
    exact = rotate(x.bfloat16().float(), rope)
    assert torch.equal(rotate(x.bfloat16(), rope), exact.bfloat16())
