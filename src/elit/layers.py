"""The building blocks that the interface and every backbone share.

Letters in shapes: B batch, L tokens of any kind, D width, H heads, d = D / H, A position axes.

Precision is one policy, whether a model runs under autocast or its weights are half precision: matrix products and
attention take the half precision; the residual stream, norms, modulated values, rotary positions and softmax stay
float32. So tokens are float32 in head, core and tail of every backbone.
"""

import math
from collections.abc import Callable, Hashable
from functools import wraps
from typing import Any, Literal, NamedTuple, Self, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORM_EPS = 1e-6
T = TypeVar("T")


class Linear(nn.Linear):
    """A linear layer that takes the residual stream: float32 is rounded to the precision of its weights."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype) if x.itemsize > self.weight.itemsize else x)


def residual(x: Tensor) -> Tensor:
    """Returns tokens in the precision of the residual stream: float32, or float64 as it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def layer_norm(width: int) -> nn.LayerNorm:
    """Makes a LayerNorm without affine parameters: the modulation, where there is one, takes their place."""
    return nn.LayerNorm(width, eps=NORM_EPS, elementwise_affine=False)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Returns ``x * (1 + scale) + shift``, with one (broadcast) shift and scale per sample."""
    return torch.addcmul(shift, x, 1 + scale)


class Modulation(nn.Module):
    """Adaptive layer norm, zero-initialized (adaLN-Zero, Peebles & Xie 2023): condition (B, D) -> ``parts`` x (B,
    D).

    Args:
        condition_width: of the condition, where it is not that of the tokens.
    """

    def __init__(self, width: int, parts: int, condition_width: int | None = None) -> None:
        super().__init__()
        self.parts = parts
        self.linear = Linear(condition_width or width, parts * width)

    def forward(self, c: Tensor, dims: int) -> tuple[Tensor, ...]:
        """Returns the parts shaped (B, 1, .., 1, D) with ``dims`` dimensions, ready to broadcast over tokens."""
        out = self.linear(F.silu(c))
        return out.view(c.shape[0], *(1,) * (dims - 2), -1).chunk(self.parts, dim=-1)

    def init_weights(self) -> None:
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)


class Mlp(nn.Module):
    """Applies two linear layers with a GELU (tanh approximation) between them."""

    def __init__(self, width: int, hidden: int, bias: bool = True) -> None:
        super().__init__()
        self.fc1 = Linear(width, hidden, bias=bias)
        self.fc2 = Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


# ------------------------------------------------------------------------------------------------ positions


class Rotary(NamedTuple):
    """Holds the cosines and sines of the rotation of each channel pair, both (L, d / 2)."""

    cos: Tensor
    sin: Tensor


def rotary(positions: Tensor, head_dim: int, theta: float) -> Rotary:
    """Computes the axial rotary embedding (Su et al. 2021) of integer or real positions (L, A).

    The d / 2 channel pairs are shared out over the axes as evenly as possible, the first axes taking the rest;
    an axis with n pairs turns pair k by ``position * theta ** (-k / n)``.
    """
    axes = positions.shape[-1]
    pairs = [(head_dim // 2 + axes - 1 - axis) // axes for axis in range(axes)]
    angles = [
        positions[:, axis, None].double()
        * theta ** (-torch.arange(n, device=positions.device, dtype=torch.float64) / max(n, 1))
        for axis, n in enumerate(pairs)
    ]
    angle = torch.cat(angles, dim=-1)
    return Rotary(angle.cos().float(), angle.sin().float())


def rotate(x: Tensor, rope: Rotary) -> Tensor:
    """Turns the channel pairs (k, k + d / 2) of x (..., L, d), in float32 or better, and returns the dtype of x."""
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = rope.cos.to(wide), rope.sin.to(wide)
    a, b = x.to(wide).chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).to(x.dtype)


class Table(nn.Module):
    """Keeps constants beside the weights, so that a forward computes none.

    They move with their module, but keep their dtype. On the ``meta`` device they are empty, and they are computed when
    their module leaves that device.

    Args:
        arguments: of :meth:`compute`.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__()
        self.arguments = arguments
        for name, value in self.compute(*arguments).items():
            self.register_buffer(name, value.to(torch.get_default_device()), persistent=False)

    @staticmethod
    def compute(*arguments: Any) -> dict[str, Tensor]:
        """Makes the constants by name, on the CPU."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Of what `fn` does to tensors, only the move is wanted here.
        known = {name: value for name, value in self._buffers.items() if value is not None}
        one = next(iter(known.values()))
        try:
            device = fn(one[:0]).device
        except NotImplementedError:  # it copies, and from meta nothing can be copied
            device = fn(torch.empty(0, device="cpu")).device
        if one.is_meta and device.type != "meta":
            known = self.compute(*self.arguments)
        self._buffers.update({name: value.to(device) for name, value in known.items()})
        return self


class RotaryTable(Table):
    """Keeps a :func:`rotary` table for the grid of training. It stays float32: bfloat16 has 8 bits, too few for
    positions.

    Args:
        positions: (L, A), on the CPU.
        head_dim, theta: as for :func:`rotary`.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, positions: Tensor, head_dim: int, theta: float) -> None:
        super().__init__(positions, head_dim, theta)

    @staticmethod
    def compute(*arguments: Any) -> dict[str, Tensor]:
        return rotary(*arguments)._asdict()

    def forward(self) -> Rotary:
        return Rotary(self.cos, self.sin)


def remembered_tables(compute: Callable[..., T]) -> Callable[..., T]:
    """Makes a function remember the tables of positions that it computed, by its arguments.

    They are ordinary tensors, whoever asks first, also under :func:`torch.inference_mode`. A forward on another grid
    than that of training then computes its tables once, and nothing is kept on a module. They are never forgotten, for
    CUDA graphs keep their addresses.
    """
    known: dict[tuple[Hashable, ...], T] = {}

    @wraps(compute)
    def table(*arguments: Hashable) -> T:
        if arguments in known:
            return known[arguments]
        with torch.inference_mode(False), torch.no_grad():
            found = compute(*arguments)
        parts = found if isinstance(found, tuple) else (found,)
        if all(type(part) is Tensor for part in parts):  # and not of a tracer, which lends its own
            known[arguments] = found
        return found

    return table


def sincos_table(positions: Tensor, width: int) -> Tensor:
    """Computes the fixed sine-cosine table of DiT, (L, D), for positions (L, 2) given as (row, column).

    The first half of the channels encodes the column, the second half the row; in each, sines then cosines.
    """
    quarter = torch.arange(width // 4, dtype=torch.float64, device=positions.device)
    frequencies = 10_000 ** (-quarter / (width / 4))

    def encode(position: Tensor) -> Tensor:
        angle = torch.outer(position.double(), frequencies)
        return torch.cat((angle.sin(), angle.cos()), dim=-1)

    return torch.cat((encode(positions[:, 1]), encode(positions[:, 0])), dim=-1).float()


# ------------------------------------------------------------------------------------------------ attention


class FullWidthRMSNorm(nn.Module):
    """Normalizes by the RMS over the whole width, before the split into heads: ``weight * x / (rms(x) + 1e-5)``.

    The published checkpoints need this epsilon outside the root (their Read and Write).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        rms = wide.square().mean(-1, keepdim=True).sqrt()
        return self.weight * (wide / (rms + 1e-5)).to(x.dtype)


QKNorm = Literal["none", "head", "width"]


def qk_norm_pair(kind: QKNorm, width: int, num_heads: int) -> tuple[nn.Module, nn.Module]:
    """Makes the norms of queries and keys: none, RMS per head, or RMS over the full width (published interface)."""
    if kind == "head":
        return nn.RMSNorm(width // num_heads, eps=NORM_EPS), nn.RMSNorm(width // num_heads, eps=NORM_EPS)
    if kind == "width":
        return FullWidthRMSNorm(width), FullWidthRMSNorm(width)
    return nn.Identity(), nn.Identity()


class Attention(nn.Module):
    """Has what self- and cross-attention share: heads, query and key norms, rotary positions, output projection."""

    def __init__(self, width: int, num_heads: int, qk_norm: QKNorm) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_in_heads = qk_norm != "width"
        self.q_norm, self.k_norm = qk_norm_pair(qk_norm, width, num_heads)
        self.proj = Linear(width, width)

    def heads(self, x: Tensor, norm: nn.Module | None = None, rope: Rotary | None = None) -> Tensor:
        """Splits (B, L, D) into heads (B, H, L, d), and normalizes and rotates them where asked."""
        if norm is not None and not self.norm_in_heads:
            x = norm(x)
        x = x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        if norm is not None and self.norm_in_heads:
            x = norm(x)
        return x if rope is None else rotate(x, rope)

    def merge(self, out: Tensor) -> Tensor:
        """Joins heads (B, H, L, d) into (B, L, D) and projects them."""
        return self.proj(out.transpose(1, 2).flatten(2))


class SelfAttention(Attention):
    """Lets every token attend to every token."""

    def __init__(self, width: int, num_heads: int, qk_norm: QKNorm = "none") -> None:
        super().__init__(width, num_heads, qk_norm)
        self.qkv = Linear(width, 3 * width)

    def project(self, x: Tensor, rope: Rotary | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Computes queries, keys and values per head, each (B, H, L, d)."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.heads(q, self.q_norm, rope), self.heads(k, self.k_norm, rope), self.heads(v)

    def forward(self, x: Tensor, rope: Rotary | None = None) -> Tensor:
        return self.merge(F.scaled_dot_product_attention(*self.project(x, rope)))


class CrossAttention(Attention):
    """Lets queries (B, L, D) attend to a context (B, M, D)."""

    def __init__(self, width: int, num_heads: int, qk_norm: QKNorm) -> None:
        super().__init__(width, num_heads, qk_norm)
        self.q = Linear(width, width)
        self.kv = Linear(width, 2 * width)

    def project(
        self, x: Tensor, context: Tensor, q_rope: Rotary | None, k_rope: Rotary | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Computes queries, keys and values per head: (B, H, L, d), (B, H, M, d), (B, H, M, d)."""
        k, v = self.kv(context).chunk(2, dim=-1)
        return self.heads(self.q(x), self.q_norm, q_rope), self.heads(k, self.k_norm, k_rope), self.heads(v)

    def forward(self, x: Tensor, context: Tensor, q_rope: Rotary | None = None, k_rope: Rotary | None = None) -> Tensor:
        return self.merge(F.scaled_dot_product_attention(*self.project(x, context, q_rope, k_rope)))

    def weights(self, x: Tensor, context: Tensor, q_rope: Rotary | None = None, k_rope: Rotary | None = None) -> Tensor:
        """Returns the attention weights (B, H, L, M) of a forward: the same attention over an identity as values."""
        q, k, _ = self.project(x, context, q_rope, k_rope)
        identity = torch.eye(k.shape[-2], dtype=k.dtype, device=k.device).expand(*k.shape[:-1], -1)
        return F.scaled_dot_product_attention(q, k, identity)


# ------------------------------------------------------------------------------------------------ transformer


class Block(nn.Module):
    """Applies self-attention and an MLP to tokens, both under adaLN-Zero: the block of DiT.

    Args:
        condition_width: of the condition, where it is not that of the tokens.
    """

    def __init__(
        self, width: int, num_heads: int, mlp_ratio: float, qk_norm: QKNorm, condition_width: int | None = None
    ) -> None:
        super().__init__()
        self.attention_norm = layer_norm(width)
        self.attention = SelfAttention(width, num_heads, qk_norm)
        self.mlp_norm = layer_norm(width)
        self.mlp = Mlp(width, round(width * mlp_ratio))
        self.modulation = Modulation(width, 6, condition_width)

    def forward(self, x: Tensor, c: Tensor, rope: Rotary | None) -> Tensor:
        parts = self.modulation(c, x.dim())
        return self.after(x, self.attention(self.before(x, parts), rope), parts)

    def before(self, x: Tensor, parts: tuple[Tensor, ...]) -> Tensor:
        """Returns the input of the attention: x, normalized and modulated."""
        shift, scale, *_ = parts
        return modulate(self.attention_norm(x), shift, scale)

    def after(self, x: Tensor, attended: Tensor, parts: tuple[Tensor, ...]) -> Tensor:
        """Adds the output of the attention to x, and then that of the MLP."""
        _, _, gate_a, shift, scale, gate_m = parts
        x = torch.addcmul(x, gate_a, attended)
        return torch.addcmul(x, gate_m, self.mlp(modulate(self.mlp_norm(x), shift, scale)))


class TimeEmbed(nn.Module):
    """Embeds times (B,) in [0, 1] as (B, D): 128 cosines and sines, then an MLP."""

    FREQUENCIES = 128

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = Linear(2 * self.FREQUENCIES, width)
        self.fc2 = Linear(width, width)

    def forward(self, t: Tensor) -> Tensor:
        k = torch.arange(self.FREQUENCIES, dtype=torch.float32, device=t.device)
        angle = t[:, None].float() * torch.exp(-math.log(10_000) / self.FREQUENCIES * k)
        features = torch.cat((angle.cos(), angle.sin()), dim=-1).to(self.fc1.weight.dtype)
        return self.fc2(F.silu(self.fc1(features)))

    def init_weights(self) -> None:
        for layer in (self.fc1, self.fc2):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)


class FinalLayer(nn.Module):
    """Projects tokens (B, N, D) to patches (B, N, values). It starts at zero, so that a new model answers zero."""

    def __init__(self, width: int, values: int) -> None:
        super().__init__()
        self.norm = layer_norm(width)
        self.modulation = Modulation(width, 2)
        self.linear = Linear(width, values)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.modulation(c, x.dim())
        return self.linear(modulate(self.norm(x), shift, scale))

    def init_weights(self) -> None:
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)


def init_model(model: nn.Module) -> None:
    """DiT's start: Xavier-uniform linear layers with zero biases, then whatever a part says of itself, children
    first."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    for part in reversed(list(model.modules())):
        init = getattr(part, "init_weights", None)
        if init is not None:
            init()
