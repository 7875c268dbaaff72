"""The mathematics of the model once more, in plain float64 loops over numpy vectors.

Written from the paper and the facts about the published checkpoints, not from the library: no attention kernel, no
batched layout, no module. Slow and obvious; weights come as the ``state_dict`` of what is tested.
"""

import math
from collections.abc import Sequence

import numpy as np
from torch import Tensor, nn

Vector = np.ndarray
Weights = dict[str, np.ndarray]
Position = Sequence[float] | None


def array(x: Tensor) -> np.ndarray:
    return x.detach().double().numpy()


def weights_of(module: nn.Module) -> Weights:
    return {name: array(value) for name, value in module.state_dict().items()}


def part(weights: Weights, prefix: str) -> Weights:
    return {k.removeprefix(f"{prefix}."): v for k, v in weights.items() if k.startswith(f"{prefix}.")}


def linear(weights: Weights, name: str, x: Vector) -> Vector:
    return weights[f"{name}.weight"] @ x + weights.get(f"{name}.bias", 0.0)


def layer_norm(x: Vector) -> Vector:
    return (x - x.mean()) / math.sqrt(((x - x.mean()) ** 2).mean() + 1e-6)


def silu(x: Vector) -> Vector:
    return x / (1 + np.exp(-x))


def gelu(x: Vector) -> Vector:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def mlp(weights: Weights, x: Vector) -> Vector:
    return linear(weights, "fc2", gelu(linear(weights, "fc1", x)))


def turn(x: Vector, position: Position, theta: float) -> Vector:
    """Rotary embedding of one head's vector. Tables are kept in float32, so cosines and sines are rounded to it."""
    if position is None:
        return x
    half, axes = len(x) // 2, len(position)
    out, pair = np.empty_like(x), 0
    for axis in range(axes):
        count = half // axes + (1 if axis < half % axes else 0)
        for k in range(count):
            angle = position[axis] * theta ** (-k / count)
            cos, sin = float(np.float32(math.cos(angle))), float(np.float32(math.sin(angle)))
            out[pair] = x[pair] * cos - x[pair + half] * sin
            out[pair + half] = x[pair] * sin + x[pair + half] * cos
            pair += 1
    return out


def head_norm(x: Vector, scale: Vector | None) -> Vector:
    return x if scale is None else scale * x / math.sqrt((x**2).mean() + 1e-6)


def full_width_norm(x: Vector, scale: Vector) -> Vector:
    return scale * x / (math.sqrt((x**2).mean()) + 1e-5)


def attend(
    queries: list[Vector],
    keys: list[Vector],
    values: list[Vector],
    heads: int,
    weights: Weights,
    query_positions: Sequence[Position],
    key_positions: Sequence[Position],
    theta: float,
    full_width: bool = False,
) -> list[Vector]:
    """Multi-head attention, a query at a time; ``weights`` holds the norms and the output projection."""
    q_scale, k_scale = weights.get("q_norm.weight"), weights.get("k_norm.weight")
    if full_width:
        assert q_scale is not None
        assert k_scale is not None
        queries = [full_width_norm(q, q_scale) for q in queries]
        keys = [full_width_norm(k, k_scale) for k in keys]
        q_scale = k_scale = None
    size, out = len(queries[0]) // heads, []
    for query, query_position in zip(queries, query_positions, strict=True):
        merged = np.zeros(len(query))
        for head in range(heads):
            one = slice(head * size, (head + 1) * size)
            q = turn(head_norm(query[one], q_scale), query_position, theta)
            logits = np.array(
                [
                    q @ turn(head_norm(k[one], k_scale), at, theta) / math.sqrt(size)
                    for k, at in zip(keys, key_positions, strict=True)
                ]
            )
            attention = np.exp(logits - logits.max())
            attention /= attention.sum()
            for a, value in zip(attention, values, strict=True):
                merged[one] += a * value[one]
        out.append(linear(weights, "proj", merged))
    return out


def cross_attention(
    weights: Weights,
    x: list[Vector],
    context: list[Vector],
    heads: int,
    x_positions: Sequence[Position],
    context_positions: Sequence[Position],
    theta: float,
    full_width: bool,
) -> list[Vector]:
    width = len(x[0])
    kv = [linear(weights, "kv", c) for c in context]
    queries, keys, values = [linear(weights, "q", q) for q in x], [v[:width] for v in kv], [v[width:] for v in kv]
    return attend(queries, keys, values, heads, weights, x_positions, context_positions, theta, full_width)


def block(
    weights: Weights, x: list[Vector], c: Vector, heads: int, positions: Sequence[Position], theta: float
) -> list[Vector]:
    """The DiT block."""
    width = len(x[0])
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = np.split(linear(weights, "modulation.linear", silu(c)), 6)
    qkv = [linear(weights, "attention.qkv", layer_norm(token) * (1 + scale_a) + shift_a) for token in x]
    queries, keys, values = ([v[i * width : (i + 1) * width] for v in qkv] for i in range(3))
    attended = attend(queries, keys, values, heads, part(weights, "attention"), positions, positions, theta)
    x = [token + gate_a * a for token, a in zip(x, attended, strict=True)]
    return [token + gate_m * mlp(part(weights, "mlp"), layer_norm(token) * (1 + scale_m) + shift_m) for token in x]


# ------------------------------------------------------------------------------------------------ the interface

Size = tuple[int, int, int]


def windows_of(size: Size, window: Size) -> list[list[int]]:
    """Raster indices of the tokens of every window: windows in raster order, tokens in raster order inside."""
    (t, h, w), (wt, wh, ww) = size, window
    return [
        [
            ((gt * wt + i) * h + gh * wh + j) * w + gw * ww + k
            for i in range(wt)
            for j in range(wh)
            for k in range(ww)
        ]
        for gt in range(t // wt)
        for gh in range(h // wh)
        for gw in range(w // ww)
    ]  # fmt: skip


def places(size: Size, video: bool) -> list[tuple[int, ...]]:
    """(row, column) of every token of a grid, or (time, row, column) of a video."""
    t, h, w = size
    return [(i, j, k) if video else (j, k) for i in range(t) for j in range(h) for k in range(w)]


def read(
    weights: Weights, s: list[Vector], c: Vector, size: Size, window: Size, heads: int, theta: float,
    published: bool, level: int,
) -> list[list[Vector]]:  # fmt: skip
    """The first ``level`` latents of every window of one sample, after Read and what is added to them."""
    layer, count = part(weights, "read_layer"), math.prod(window)
    width = len(c)
    shift_s, scale_s, gate_a, shift_m, scale_m, gate_m = np.split(
        linear(layer, "modulation.linear", silu(c))[: 6 * width], 6
    )
    result = []
    for g, tokens in enumerate(windows_of(size, window)):
        spatial = [s[n] + (weights["read_positions"][i] if published else 0) for i, n in enumerate(tokens)]
        context = [layer_norm(token) * (1 + scale_s) + shift_s for token in spatial]
        latents = [weights["latents"][j] for j in range(level)]
        queries = latents if published else [layer_norm(latent) for latent in latents]
        at = [None] * count if published else places(window, size[0] > 1)
        attended = cross_attention(
            part(layer, "attention"), queries, context, heads, [None] * level, at, theta, published
        )
        latents = [latent + gate_a * a for latent, a in zip(latents, attended, strict=True)]
        latents = [
            latent + gate_m * mlp(part(layer, "mlp"), layer_norm(latent) * (1 + scale_m) + shift_m)
            for latent in latents
        ]
        if published:
            latents = [latent + weights["latent_positions"][g * count + j] for j, latent in enumerate(latents)]
        result.append(latents)
    return result


def write(
    weights: Weights, s: list[Vector], latents: list[list[Vector]], size: Size, window: Size, heads: int,
    theta: float, published: bool, depth: int,
) -> list[Vector]:  # fmt: skip
    """Spatial tokens of one sample after Write; ``latents`` are those that Write sees, window by window."""
    count, out = math.prod(window), list(s)
    for g, tokens in enumerate(windows_of(size, window)):
        spatial = [
            s[n] + (weights["read_positions"][i] + weights["write_positions"][i] if published else 0)
            for i, n in enumerate(tokens)
        ]
        at = [None] * count if published else places(window, size[0] > 1)
        for k in range(depth):
            layer = part(weights, f"write_layers.{k}")
            norm = (lambda x: x) if published else layer_norm
            attended = cross_attention(
                part(layer, "attention"), [norm(x) for x in spatial], [norm(x) for x in latents[g]], heads, at,
                [None] * len(latents[g]), theta, published,
            )  # fmt: skip
            spatial = [x + a for x, a in zip(spatial, attended, strict=True)]
            spatial = [x + mlp(part(layer, "mlp"), norm(x)) for x in spatial]
        for n, token in zip(tokens, spatial, strict=True):
            out[n] = token
    return out
