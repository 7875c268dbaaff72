"""MM-DiT against plain loops; text of any length; guidance; text encoders."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import elit
from elit import ElitError, Guidance
from elit.analysis import count_flops
from elit.conditions import Text
from elit.models import MMDiT
from tests.helpers import reference
from tests.helpers.models import inputs
from tests.helpers.stacks import Positions, Vectors, plain_stack, tiny


def model_of(**changes: Any) -> MMDiT:
    model = tiny("ELIT-MMDiT", **changes)
    model.empty_prompt.copy_(torch.randn(model.empty_prompt.shape, generator=torch.Generator().manual_seed(3)))
    return model


# ------------------------------------------------------------------------------------------------ the reference


def plain_blocks(model: MMDiT, words: Vectors, known: int, c: np.ndarray) -> Any:
    """Joint blocks first..end - 1 on vectors; the text stream is remembered from one call to the next."""
    config, weights = model.config, reference.weights_of(model)

    def parts(own: reference.Weights, name: str) -> list[np.ndarray]:
        return np.split(
            reference.linear(own, f"{name}.linear", reference.silu(c)), len(own[f"{name}.linear.bias"]) // 32
        )

    def projected(own: reference.Weights, x: Vectors, shift: np.ndarray, scale: np.ndarray, name: str) -> list[Vectors]:
        inside = [reference.linear(own, name, reference.layer_norm(v) * (1 + scale) + shift) for v in x]
        return [[v[i : i + 32] for v in inside] for i in range(0, len(inside[0]), 32)]

    def attended(own: reference.Weights, q: Vectors, k: Vectors, v: Vectors, at: Positions, to: Positions) -> Vectors:
        return reference.attend(q, k, v, config.num_heads, own, at, to, config.rope_theta)

    def after(own: reference.Weights, x: Vectors, out: Vectors, m: list[np.ndarray]) -> Vectors:
        x = [a + m[2] * b for a, b in zip(x, out, strict=True)]
        mlp = reference.part(own, "mlp")
        return [a + m[5] * reference.mlp(mlp, reference.layer_norm(a) * (1 + m[4]) + m[3]) for a in x]

    def scaled(x: Vectors, scale: np.ndarray) -> Vectors:
        """Each stream norms its own keys, before the attention that they share."""
        return [np.concatenate([reference.head_norm(h, scale) for h in np.split(v, config.num_heads)]) for v in x]

    def blocks(first: int, end: int, x: Vectors, positions: Positions) -> Vectors:
        nonlocal words
        for i in range(first, end):
            own = reference.part(weights, f"blocks.{i}")
            image = reference.part(own, "image")
            m = parts(image, "modulation")
            q, k, v = projected(image, x, m[0], m[1], "attention.qkv")
            norms = reference.part(image, "attention")
            proj = {name: value for name, value in norms.items() if name.startswith("proj")}
            q, k = scaled(q, norms["q_norm.weight"]), scaled(k, norms["k_norm.weight"])
            last = i == config.depth - 1
            if last:
                shift, scale = parts(own, "text_modulation")
                text_k, text_v = projected(own, words, shift, scale, "text_kv")
                text_k = scaled(text_k, own["text_k_norm.weight"])
            else:
                text = reference.part(own, "text")
                n = parts(text, "modulation")
                text_q, text_k, text_v = projected(text, words, n[0], n[1], "attention.qkv")
                of_text = reference.part(text, "attention")
                text_q, text_k = scaled(text_q, of_text["q_norm.weight"]), scaled(text_k, of_text["k_norm.weight"])
            keys, values = k + text_k[:known], v + text_v[:known]
            to: Positions = [*positions, *[None] * known]
            x = after(image, x, attended(proj, q, keys, values, positions, to), m)
            if not last:
                text_proj = {name: value for name, value in of_text.items() if name.startswith("proj")}
                out = attended(text_proj, text_q, keys, values, [None] * len(words), to)
                words = after(text, words, out, n)
        return x

    return blocks


@pytest.mark.parametrize("level", [1, 4])
@pytest.mark.parametrize("known", [1, 4])
def test_the_model_is_the_plain_loops(level: int, known: int) -> None:
    model = model_of().double()
    x, t, y = inputs(model, 1, dtype=torch.float64)
    y = Text(y.tokens[:, :4], torch.arange(4)[None] < known)
    weights = reference.weights_of(model)
    size = model.config.grid_size
    s = list(model.embed(x, size)[0].detach().numpy())
    prompt = list(y.tokens[0].numpy())
    time = model.time_embed(t)[0].detach().numpy()
    c = time + reference.linear(weights, "pooled_embed", np.mean(prompt[:known], axis=0))
    words = [reference.linear(weights, "text_embed", word) for word in prompt]
    tokens = plain_stack(model, s, c, level, plain_blocks(model, words, known, c))
    condition = torch.from_numpy(c)[None]
    expected = model.project(torch.from_numpy(np.array(tokens))[None], condition, model.encode(x, t, y))
    torch.testing.assert_close(model(x, t, y, level / 4), expected, rtol=0, atol=1e-10)  # float64, 4 blocks


# ------------------------------------------------------------------------------------------------ text


@pytest.mark.parametrize("elastic", [True, False])
def test_padding_is_not_seen(elastic: bool) -> None:
    model = (model_of() if elastic else model_of(interface=None)).double()
    x, t, y = inputs(model, 3, dtype=torch.float64)
    answer = model(x, t, y)
    other = torch.where(y.mask[..., None], y.tokens, 7.0)
    longer = Text(torch.nn.functional.pad(other, (0, 0, 0, 5)), torch.nn.functional.pad(y.mask, (0, 5)))
    torch.testing.assert_close(model(x, t, longer), answer, rtol=0, atol=1e-11)  # float64, other sums of zeros


def test_every_token_counts() -> None:
    model = model_of()
    x, t, y = inputs(model, 2)
    y = y._replace(mask=torch.ones_like(y.mask))
    answer = model(x, t, y)
    for token in range(y.tokens.shape[1]):
        changed = y.tokens.clone()
        changed[:, token] += 1
        assert (model(x, t, y._replace(tokens=changed)) - answer).abs().amax((1, 2, 3)).min() > 1e-4


@pytest.mark.parametrize("length", [1, 2, 9])
def test_text_has_any_length(length: int) -> None:
    model = model_of()
    x, t, _ = inputs(model, 2)
    y = Text(torch.randn(2, length, 24), torch.ones(2, length, dtype=torch.bool))
    assert model(x, t, y, 0.5).isfinite().all()


def test_text_without_a_token_is_no_text() -> None:
    model = model_of()
    x, t, y = inputs(model, 2)
    assert model(x, t, y._replace(mask=torch.zeros_like(y.mask))).isfinite().all()


def test_the_empty_prompt_stands_in_for_dropped_text() -> None:
    model = model_of()
    _, _, y = inputs(model, 4)
    null = model.null_condition(y)
    assert torch.equal(null.tokens[:, :2], model.empty_prompt.expand(4, -1, -1))
    assert null.mask.sum(1).tolist() == [2] * 4
    assert null.tokens.shape == y.tokens.shape
    dropped = torch.tensor([True, False, True, False])
    mixed = model.drop_condition(y, dropped)
    assert torch.equal(mixed.tokens[dropped], null.tokens[dropped])
    assert torch.equal(mixed.mask[~dropped], y.mask[~dropped])
    assert torch.equal(mixed.tokens[~dropped], y.tokens[~dropped])
    with pytest.raises(ElitError, match="text of 1 tokens is shorter than the empty prompt; pad it to 2"):
        model.null_condition(Text(y.tokens[:, :1], y.mask[:, :1]))


def test_the_empty_prompt_is_set_and_saved(tmp_path: Any) -> None:
    model = model_of()
    tokens = torch.randn(1, 4, 24)
    model.set_empty_prompt(Text(tokens, torch.tensor([[True, True, False, False]])))
    assert torch.equal(model.empty_prompt, tokens[0, :2])
    model.save_pretrained(tmp_path / "model")
    assert torch.equal(elit.load(tmp_path / "model").empty_prompt, tokens[0, :2])
    with pytest.raises(ElitError, match="build the model with empty_length=3 and text_width=24"):
        model.set_empty_prompt(Text(tokens, torch.tensor([[True, True, True, False]])))


@pytest.mark.parametrize(
    ("y", "why"),
    [
        (None, "the model needs text"),
        (torch.zeros(2, dtype=torch.long), "the model needs text"),
        (Text(torch.zeros(2, 3, 25), torch.ones(2, 3)), r"tokens of shape \(2, 3, 25\).*takes \(batch, length, 24\)"),
        (Text(torch.zeros(2, 3, 24), torch.ones(2, 4)), r"mask of shape \(2, 4\)"),
    ],
)
def test_text_that_does_not_fit_is_named(y: Any, why: str) -> None:
    model = model_of()
    x, t, _ = inputs(model, 2)
    with pytest.raises(ElitError, match=why):
        model(x, t, y)


def test_classes_are_refused() -> None:
    with pytest.raises(ElitError, match="an MM-DiT is conditioned by text"):
        replace(model_of().config, num_classes=10)


# ------------------------------------------------------------------------------------------------ sampling


@pytest.mark.parametrize("kind", ["cfg", "ccfg", "ag"])
def test_guidance_works_as_with_labels(kind: Any) -> None:
    """Two Euler steps, spelled out."""
    model = model_of()
    _, _, y = inputs(model, 3)
    noise = torch.randn(3, *model.input_shape())
    guidance = Guidance(kind, scale=2.0)
    samples = elit.sample(model, y, noise=noise, steps=2, guidance=guidance, batch_size=2)
    weak = None if kind == "cfg" else 1 / 4
    x = noise.double()
    for at in (1.0, 0.5):
        t = torch.full((3,), at)
        strong: Tensor = model(x.float(), t, y).double()
        other = model(x.float(), t, y if kind == "ag" else model.null_condition(y), weak).double()
        x = x - 0.5 * (other + 2 * (strong - other))
    torch.testing.assert_close(samples, x.float(), rtol=0, atol=1e-4)  # float32, other batches


def test_sampling_without_text_is_refused() -> None:
    with pytest.raises(ElitError, match="the model takes text: give text"):
        elit.sample(model_of(), seeds=[0])
    with pytest.raises(ElitError, match="one of each per sample, not 2 labels, 3 seeds"):
        elit.sample(model_of(), inputs(model_of(), 2)[2], seeds=[0, 1, 2])


def test_a_named_model_counts() -> None:
    config = elit.models.config_for("ELIT-MMDiT-B/2", text_width=64)
    assert count_flops(config, 1).total < 0.75 * count_flops(config).total
