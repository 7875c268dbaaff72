"""MM-DiT (Esser et al. 2024): an image stream and a text stream that attend to each other, with or without the latent
interface.

Each stream has its own blocks; attention runs over both together. Under ELIT the image stream passes the core as
latents, and the text stream stays whole. Rotary positions turn the image stream alone: text stands at their origin, its
order being in what the encoder gave. Shapes: B batch, N spatial tokens, K latents, X tokens of the image stream of
either kind, L text tokens, D width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elit.conditions import Text
from elit.errors import ElitError
from elit.interface.grid import Triple
from elit.layers import Block, Linear, Modulation, QKNorm, Rotary, layer_norm, modulate, qk_norm_pair, residual
from elit.models.dit import DiT
from elit.models.transformer import Stream, TransformerConfig, check_batch


@dataclass(frozen=True)
class MMDiTConfig(TransformerConfig):
    """Configures an MM-DiT. The fields are those of :class:`TransformerConfig`, without classes.

    Attributes:
        text_width: width of the text embeddings.
        empty_length: number of tokens of the empty prompt, which stands for "no text" in guidance and training.
    """

    num_classes: int = 0
    text_width: int = 768
    empty_length: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_classes:
            raise ElitError(f"an MM-DiT is conditioned by text: num_classes must be 0, not {self.num_classes}")
        if min(self.text_width, self.empty_length, self.depth) < 1:
            raise ElitError(
                f"text_width {self.text_width}, empty_length {self.empty_length} and depth {self.depth} must be at "
                "least 1"
            )


class JointBlock(nn.Module):
    """Runs a DiT block on each of two streams, image and text, with one attention over both."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float, qk_norm: QKNorm) -> None:
        super().__init__()
        self.image = Block(width, num_heads, mlp_ratio, qk_norm)
        self.text = Block(width, num_heads, mlp_ratio, qk_norm)

    def forward(self, x: Tensor, text: Tensor, c: Tensor, rope: Rotary | None, seen: Tensor) -> tuple[Tensor, Tensor]:
        """Returns both streams after the block: x (B, X, D) and text (B, L, D).

        Args:
            c: the condition (B, D).
            rope: rotary positions of x.
            seen: (B, 1, 1, X + L), True for what may be attended to: all but padding.
        """
        image_parts, text_parts = self.image.modulation(c, 3), self.text.modulation(c, 3)
        of_image = self.image.attention.project(self.image.before(x, image_parts), rope)
        of_text = self.text.attention.project(self.text.before(text, text_parts))
        q, k, v = (torch.cat(both, dim=2) for both in zip(of_image, of_text, strict=True))  # (B, H, X + L, d)
        out = F.scaled_dot_product_attention(q, k, v, seen)
        to_image, to_text = out.split((x.shape[1], text.shape[1]), dim=2)
        x = self.image.after(x, self.image.attention.merge(to_image), image_parts)
        return x, self.text.after(text, self.text.attention.merge(to_text), text_parts)


class LastJointBlock(nn.Module):
    """Runs the last block: the image attends to the text, which stays as it is, for nothing would read it."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float, qk_norm: QKNorm) -> None:
        super().__init__()
        self.image = Block(width, num_heads, mlp_ratio, qk_norm)
        self.text_norm = layer_norm(width)
        self.text_modulation = Modulation(width, 2)
        self.text_kv = Linear(width, 2 * width)
        _, self.text_k_norm = qk_norm_pair(qk_norm, width, num_heads)

    def forward(self, x: Tensor, text: Tensor, c: Tensor, rope: Rotary | None, seen: Tensor) -> tuple[Tensor, Tensor]:
        """Returns both streams after the block, as :meth:`JointBlock.forward` does."""
        parts, (shift, scale), attention = self.image.modulation(c, 3), self.text_modulation(c, 3), self.image.attention
        q, k, v = attention.project(self.image.before(x, parts), rope)
        text_k, text_v = self.text_kv(modulate(self.text_norm(text), shift, scale)).chunk(2, dim=-1)
        k = torch.cat((k, attention.heads(text_k, self.text_k_norm)), dim=2)  # (B, H, X + L, d)
        v = torch.cat((v, attention.heads(text_v)), dim=2)
        out = F.scaled_dot_product_attention(q, k, v, seen)
        return self.image.after(x, attention.merge(out), parts), text


class MMDiT(DiT):
    """Predicts the velocity of x at time t for text y, at a budget of latents.

    Args:
        config: what to build. Weights are drawn from torch's global generator.

    Attributes:
        empty_prompt: embedding of the empty prompt (empty_length, text_width); zeros until :meth:`set_empty_prompt`.
    """

    config: MMDiTConfig
    empty_prompt: Tensor

    def build_stack(self) -> None:
        config = self.config
        kinds = [JointBlock] * (config.depth - 1) + [LastJointBlock]
        self.blocks = nn.ModuleList(
            kind(config.width, config.num_heads, config.mlp_ratio, config.qk_norm_kind) for kind in kinds
        )
        self.text_embed = Linear(config.text_width, config.width)
        self.pooled_embed = Linear(config.text_width, config.width)
        self.register_buffer("empty_prompt", torch.zeros(config.empty_length, config.text_width))

    def run_blocks(self, first: int, end: int, stream: Stream, c: Tensor, rope: Rotary | None) -> Stream:
        """Runs blocks first..end - 1 on both streams, which attend to all of the image and all words of the text."""
        assert stream.text is not None
        x, (words, mask) = stream.tokens, stream.text
        seen = F.pad(mask, (x.shape[1], 0), value=True)[:, None, None]  # (B, 1, 1, X + L)
        for i in range(first, end):
            x, words = self.blocks[i](x, words, c, rope, seen)
        return Stream(x, Text(words, mask))

    def condition(self, t: Tensor, y: Text) -> Tensor:
        return self.embed_time(t) + self.pooled_embed(mean_of(y))

    def embed_text(self, y: Text) -> Text:
        return Text(residual(self.text_embed(y.tokens)), y.mask)

    def check_input(self, x: Tensor, t: Tensor, y: Text | None) -> Triple:
        text, size = self.check_text(y), self.check_size(x, None, self.patch)
        check_batch(x.shape[0], t, text)
        return size

    # -------------------------------------------------------------------------------------------- text

    @property
    def takes_text(self) -> bool:
        return True

    @property
    def conditional(self) -> bool:
        return True

    def check_text(self, y: Text | None) -> Text:
        """Checks the shapes of text (never its values) and returns it.

        Raises:
            ElitError: it is missing, or of other shapes than the model takes.
        """
        width = self.config.text_width
        if not isinstance(y, Text):
            raise ElitError(f"the model needs text: Text(tokens (batch, length, {width}), mask (batch, length))")
        if y.tokens.dim() != 3 or y.tokens.shape[2] != width or y.mask.shape != y.tokens.shape[:2]:
            raise ElitError(
                f"text has tokens of shape {tuple(y.tokens.shape)} and a mask of shape {tuple(y.mask.shape)}; the "
                f"model takes (batch, length, {width}) and (batch, length)"
            )
        return y

    def as_condition(self, given: object) -> Text:
        text = self.check_text(given)  # type: ignore[arg-type]
        return Text(text.tokens.to(self.device, self.dtype), text.mask.to(self.device, torch.bool))

    def null_condition(self, y: Text) -> Text:  # type: ignore[override]
        """Returns the empty prompt for each of y, padded to their length.

        Raises:
            ElitError: y is shorter than the empty prompt.
        """
        batch, length = y.mask.shape
        spare = length - self.config.empty_length
        if spare < 0:
            raise ElitError(f"text of {length} tokens is shorter than the empty prompt; pad it to {length - spare}")
        tokens = F.pad(self.empty_prompt, (0, 0, 0, spare)).to(y.tokens).expand(batch, -1, -1)
        return Text(tokens, (torch.arange(length, device=y.mask.device) < length - spare).expand(batch, -1))

    def set_empty_prompt(self, text: Text) -> None:
        """Stores the embedding of the empty prompt, which the encoder of the other prompts must have made.

        Args:
            text: of one prompt; its padding is left out.

        Raises:
            ElitError: it has not ``empty_length`` tokens.
        """
        tokens = text.tokens[0, text.mask[0]]
        if tokens.shape != self.empty_prompt.shape:
            raise ElitError(
                f"the empty prompt has shape {tuple(tokens.shape)}; for it build the model with "
                f"empty_length={len(tokens)} and text_width={tokens.shape[1]}"
            )
        self.empty_prompt.copy_(tokens)


def mean_of(text: Text) -> Tensor:
    """Returns the mean of the tokens of each text, without padding: (B, D_text)."""
    weight = text.mask[..., None].to(text.tokens)
    return (text.tokens * weight).sum(1) / weight.sum(1).clamp(min=1)
