"""The elastic versions of each family of transformers in diffusers: what is special about it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers import (
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    WanTransformer3DModel,
)
from diffusers.models.attention import BasicTransformerBlock, JointTransformerBlock
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformerBlock
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed, WanTransformerBlock
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from elit.conditions import Condition, Text
from elit.data.text import WAN_TOKENS
from elit.errors import ElitError
from elit.integrations.elastic import Call, ElasticBlock, ElasticMixin, taken
from elit.interface.grid import Triple
from elit.interface.retrofit import Start

__all__ = ["ModelMixin", "elastic_version"]  # pipelines load a class of a module that has its base among its names

CONTROLNET = "residuals of a ControlNet belong to all tokens, and the core has latents"
SKIPPED = "Read and Write belong to blocks that would be skipped"
MASKED = "a mask over all tokens does not fit latents"
PIXELS_PER_LATENT = 8  # of the autoencoder of PixArt


# ------------------------------------------------------------------------------------------------ DiT


class ElasticDiTTransformerBlock(ElasticBlock, BasicTransformerBlock):
    """A block of DiT, in an elastic model."""

    norm1: Any

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        class_labels: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
    ) -> Tensor:
        call, arguments = taken(cross_attention_kwargs)
        dtype = hidden_states.dtype
        condition = self.norm1.emb(timestep, class_labels, hidden_dtype=dtype) if self.reads else None
        hidden_states = call.before(self, hidden_states, condition)
        hidden_states = super().forward(
            hidden_states, timestep=timestep, cross_attention_kwargs=arguments, class_labels=class_labels
        )
        return call.after(self, hidden_states)


class ElasticDiTTransformer2DModel(ElasticMixin, DiTTransformer2DModel):
    """An elastic ``DiTTransformer2DModel``."""

    base = DiTTransformer2DModel
    block_versions: ClassVar = {BasicTransformerBlock: ElasticDiTTransformerBlock}
    attention_arguments = "cross_attention_kwargs"
    joint_guidance = ("cond", "uncond")
    predicts = "noise"
    condition = "classes"

    @classmethod
    def shards_of(cls, transformer: Any) -> list[nn.Module]:
        """Returns all blocks but the first, whose embedder the forward uses, too."""
        return super().shards_of(transformer)[1:]

    def inputs(self, x: Tensor, timestep: Tensor, y: Condition) -> dict[str, Any]:
        """Returns what a forward is given, with labels y (B,)."""
        return {"hidden_states": x, "timestep": timestep, "class_labels": y}


# ------------------------------------------------------------------------------------------------ Stable Diffusion 3


class ElasticJointTransformerBlock(ElasticBlock, JointTransformerBlock):
    """A block of Stable Diffusion 3, in an elastic model: the image goes through latents, the text stays whole."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor | None, Tensor]:
        call, arguments = taken(joint_attention_kwargs)
        hidden_states = call.before(self, hidden_states, temb)
        text, hidden_states = super().forward(hidden_states, encoder_hidden_states, temb, arguments)
        return text, call.after(self, hidden_states)


class ElasticSD3Transformer2DModel(ElasticMixin, SD3Transformer2DModel):
    """An elastic ``SD3Transformer2DModel``, of Stable Diffusion 3 and 3.5."""

    base = SD3Transformer2DModel
    block_versions: ClassVar = {JointTransformerBlock: ElasticJointTransformerBlock}
    attention_arguments = "joint_attention_kwargs"
    joint_guidance = ("uncond", "cond")
    refused: ClassVar = {"block_controlnet_hidden_states": CONTROLNET, "skip_layers": SKIPPED}
    condition = "pooled captions"
    text_width = "joint_attention_dim"

    def inputs(self, x: Tensor, timestep: Tensor, y: Condition) -> dict[str, Any]:
        """Returns what a forward is given, with text y whose first token is the vector for the whole prompt."""
        assert isinstance(y, Text)
        return {
            "hidden_states": x,
            "encoder_hidden_states": y.tokens[:, 1:],
            "pooled_projections": y.tokens[:, 0, : self.config.pooled_projection_dim],
            "timestep": timestep,
        }


# ------------------------------------------------------------------------------------------------ PixArt


class ElasticPixArtTransformerBlock(ElasticBlock, BasicTransformerBlock):
    """A block of PixArt, in an elastic model: latents attend to the text as tokens did."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        class_labels: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
    ) -> Tensor:
        call, arguments = taken(cross_attention_kwargs)
        assert timestep is not None  # the six parts of the modulation (B, 6 * D), made of the time
        condition = timestep.unflatten(1, (6, -1)).mean(1) if self.reads else None
        hidden_states = call.before(self, hidden_states, condition)
        hidden_states = super().forward(
            hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            timestep=timestep,
            cross_attention_kwargs=arguments,
        )
        return call.after(self, hidden_states)


class ElasticPixArtTransformer2DModel(ElasticMixin, PixArtTransformer2DModel):
    """An elastic ``PixArtTransformer2DModel``."""

    use_additional_conditions: bool

    base = PixArtTransformer2DModel
    block_versions: ClassVar = {BasicTransformerBlock: ElasticPixArtTransformerBlock}
    attention_arguments = "cross_attention_kwargs"
    joint_guidance = ("uncond", "cond")
    refused: ClassVar = {"attention_mask": MASKED}
    predicts = "noise"
    condition = "captions"
    text_width = "caption_channels"

    def inputs(self, x: Tensor, timestep: Tensor, y: Condition) -> dict[str, Any]:
        """Returns what a forward is given, with text y; larger models are also told the size of the picture."""
        assert isinstance(y, Text)
        size: dict[str, Any] = {"resolution": None, "aspect_ratio": None}
        if self.use_additional_conditions:
            height, width = (PIXELS_PER_LATENT * side for side in x.shape[-2:])
            size["resolution"] = x.new_tensor([[height, width]]).expand(len(x), -1)
            size["aspect_ratio"] = x.new_tensor([[height / width]]).expand(len(x), -1)
        return {
            "hidden_states": x,
            "encoder_hidden_states": y.tokens,
            "encoder_attention_mask": y.mask,
            "timestep": timestep,
            "added_cond_kwargs": size,
        }


# ------------------------------------------------------------------------------------------------ FLUX

PACKED = 2  # latents a side that pipelines of FLUX and Qwen-Image pack into one token


def packed(x: Tensor) -> Tensor:
    """Packs latents (B, C, H, W) into tokens (B, H/2 * W/2, 4C)."""
    return F.pixel_unshuffle(x, PACKED).flatten(2).transpose(1, 2)


def unpacked(tokens: Tensor, height: int, width: int) -> Tensor:
    """Undoes :func:`packed`."""
    grid = tokens.transpose(1, 2).unflatten(2, (height // PACKED, width // PACKED))
    return F.pixel_shuffle(grid, PACKED)


class PackedMixin:
    """A family whose pipelines pack latents into tokens."""

    @classmethod
    def data_of(cls, config: Mapping[str, Any]) -> tuple[int, tuple[int, ...]]:
        return config["in_channels"] // PACKED**2, (PACKED, PACKED)

    def prediction(self, output: Tensor, x: Tensor) -> Tensor:
        return unpacked(output, *x.shape[-2:])


class ElasticFluxBlock(ElasticBlock):
    """A block of FLUX in an elastic model. Subclasses are also the block of diffusers whose forward it calls."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        call, arguments = taken(joint_attention_kwargs)
        rotary = flux_positions(call, self, image_rotary_emb, encoder_hidden_states)
        hidden_states = call.before(self, hidden_states, temb)
        text, hidden_states = super().forward(hidden_states, encoder_hidden_states, temb, rotary, arguments)
        return text, call.after(self, hidden_states)


class ElasticFluxTransformerBlock(ElasticFluxBlock, FluxTransformerBlock):
    """A block of FLUX with two streams, in an elastic model."""


class ElasticFluxSingleTransformerBlock(ElasticFluxBlock, FluxSingleTransformerBlock):
    """A block of FLUX with one stream, in an elastic model."""


def flux_positions(
    call: Call, block: ElasticBlock, rotary: tuple[Tensor, Tensor] | None, text: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns the positions of text and image tokens, in the core those of the text and the latents."""
    assert rotary is not None
    length = text.shape[1]
    cos, sin = (call.kept(block, table, prefix=length) for table in rotary)
    return cos, sin


class ElasticFluxTransformer2DModel(PackedMixin, ElasticMixin, FluxTransformer2DModel):
    """An elastic ``FluxTransformer2DModel``. Its core may begin and end in either kind of blocks."""

    base = FluxTransformer2DModel
    stacks = ("transformer_blocks", "single_transformer_blocks")
    block_versions: ClassVar = {
        FluxTransformerBlock: ElasticFluxTransformerBlock,
        FluxSingleTransformerBlock: ElasticFluxSingleTransformerBlock,
    }
    attention_arguments = "joint_attention_kwargs"
    timesteps = 1.0
    refused: ClassVar = {"controlnet_block_samples": CONTROLNET, "controlnet_single_block_samples": CONTROLNET}
    condition = "pooled captions"
    text_width = "joint_attention_dim"

    def inputs(self, x: Tensor, timestep: Tensor, y: Condition) -> dict[str, Any]:
        """Returns what a forward is given, with text y whose first token is the vector for the whole prompt."""
        assert isinstance(y, Text)
        height, width = (side // PACKED for side in x.shape[-2:])
        return {
            "hidden_states": packed(x),
            "encoder_hidden_states": y.tokens[:, 1:],
            "pooled_projections": y.tokens[:, 0, : self.config.pooled_projection_dim],
            "timestep": timestep,
            "img_ids": flux_grid(height, width, x.device),
            "txt_ids": x.new_zeros(y.tokens.shape[1] - 1, 3),
        }

    def grid_size(self, given: dict[str, Any]) -> Triple:
        """Returns the tokens (1, H, W) that the positions of the image tell."""
        ids = given["img_ids"]
        size = _KNOWN_GRIDS.get(ids)
        if size is None:
            _, height, width = (int(last) + 1 for last in (ids[0] if ids.dim() == 3 else ids)[-1])
            size = _KNOWN_GRIDS[ids] = (1, height, width)
        tokens = given["hidden_states"].shape[1]
        if tokens != size[1] * size[2]:
            raise ElitError(
                f"an elastic {self.base.__name__} takes one picture, and {tokens} tokens are not those of "
                f"{size[1]}x{size[2]}: pictures to edit have no place in its windows"
            )
        return size


@lru_cache(maxsize=64)
def flux_grid(height: int, width: int, device: torch.device) -> Tensor:
    """Returns the positions (H * W, 3) of image tokens, the same tensor each time: rows and columns after a zero."""
    rows, columns = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in (height, width)), indexing="ij")
    return torch.stack((torch.zeros_like(rows), rows, columns), dim=-1).flatten(0, 1).to(device)


_KNOWN_GRIDS: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Grids of positions that were looked at: looking waits for the device, and a pipeline gives the same ones again."""


# ------------------------------------------------------------------------------------------------ Qwen-Image


class ElasticQwenImageTransformerBlock(ElasticBlock, QwenImageTransformerBlock):
    """A block of Qwen-Image, in an elastic model."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_mask: Tensor | None,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        modulate_index: list[int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        call, arguments = taken(joint_attention_kwargs)
        assert image_rotary_emb is not None
        of_image, of_text = image_rotary_emb
        rotary = call.kept(self, of_image), of_text
        hidden_states = call.before(self, hidden_states, temb)
        text, hidden_states = super().forward(
            hidden_states, encoder_hidden_states, encoder_hidden_states_mask, temb, rotary, arguments
        )
        return text, call.after(self, hidden_states)


class ElasticQwenImageTransformer2DModel(PackedMixin, ElasticMixin, QwenImageTransformer2DModel):
    """An elastic ``QwenImageTransformer2DModel``."""

    base = QwenImageTransformer2DModel
    block_versions: ClassVar = {QwenImageTransformerBlock: ElasticQwenImageTransformerBlock}
    attention_arguments = "attention_kwargs"
    timesteps = 1.0
    refused: ClassVar = {"controlnet_block_samples": CONTROLNET}
    condition = "captions"
    text_width = "joint_attention_dim"
    idle = ("attn.to_add_out", "txt_mlp")  # of the text that comes out

    def inputs(self, x: Tensor, timestep: Tensor, y: Condition) -> dict[str, Any]:
        """Returns what a forward is given, with text y."""
        assert isinstance(y, Text)
        height, width = (side // PACKED for side in x.shape[-2:])
        return {
            "hidden_states": packed(x),
            "encoder_hidden_states": y.tokens,
            "encoder_hidden_states_mask": y.mask,
            "timestep": timestep,
            "img_shapes": [[(1, height, width)]] * len(x),
        }

    def become_elastic(self, *args: Any, **settings: Any) -> None:
        """Refuses the versions that edit pictures, and those that are told their guidance."""
        if self.config.guidance_embeds:
            raise ElitError("a QwenImageTransformer2DModel with guidance_embeds cannot be run: diffusers refuses it")
        if self.config.zero_cond_t or self.config.use_layer3d_rope:
            raise ElitError(
                "a QwenImageTransformer2DModel that edits pictures or makes layers cannot be made elastic: its image "
                "stream holds more than one picture"
            )
        super().become_elastic(*args, **settings)

    def grid_size(self, given: dict[str, Any]) -> Triple:
        """Returns the tokens (1, H, W) of the picture."""
        shapes = given["img_shapes"][0]
        pictures = shapes if isinstance(shapes, list) else [shapes]
        if len(pictures) > 1:
            raise ElitError(
                f"an elastic {self.base.__name__} takes one picture, not {len(pictures)}: pictures to edit have no "
                "place in its windows"
            )
        frames, height, width = pictures[0]
        return frames, height, width


# ------------------------------------------------------------------------------------------------ Wan


class ElasticWanTransformerBlock(ElasticBlock, WanTransformerBlock):
    """A block of Wan, in an elastic model. The call comes with the positions, for Wan hands on nothing else."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        rotary_emb: tuple[Tensor, Tensor, Call],
    ) -> Tensor:
        cos, sin, call = rotary_emb
        rotary = call.kept(self, cos, dim=1), call.kept(self, sin, dim=1)
        condition = temb.mean(1) if self.reads else None  # of six parts (B, 6, D), made of the time
        hidden_states = call.before(self, hidden_states, condition)
        return call.after(self, super().forward(hidden_states, encoder_hidden_states, temb, rotary))


class ElasticWanRotaryPosEmbed(WanRotaryPosEmbed):
    """The positions of Wan, with the call that is under way beside them."""

    call: Call | None = None

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Call | None]:
        return *super().forward(hidden_states), self.call


class ElasticWanTransformer3DModel(ElasticMixin, WanTransformer3DModel):
    """An elastic ``WanTransformer3DModel``."""

    base = WanTransformer3DModel
    stacks = ("blocks",)
    block_versions: ClassVar = {WanTransformerBlock: ElasticWanTransformerBlock}
    attention_arguments = "attention_kwargs"
    default_window = (1, 2, 4)
    condition = "captions"
    text_width = "text_dim"

    @classmethod
    def data_of(cls, config: Mapping[str, Any]) -> tuple[int, tuple[int, ...]]:
        return config["in_channels"], tuple(config["patch_size"])

    def inputs(self, x: Tensor, timestep: Tensor, y: Condition) -> dict[str, Any]:
        """Returns what a forward is given, with text y, which its pipeline fills up with zeros and does not mask."""
        assert isinstance(y, Text)
        tokens = (y.tokens * y.mask[:, :, None])[:, :WAN_TOKENS]
        text = F.pad(tokens, (0, 0, 0, WAN_TOKENS - tokens.shape[1]))
        return {"hidden_states": x, "encoder_hidden_states": text, "timestep": timestep}

    def become_elastic(self, *args: Any, **settings: Any) -> None:
        """Lets the positions carry the call."""
        super().become_elastic(*args, **settings)
        self.rope.__class__ = ElasticWanRotaryPosEmbed

    @contextmanager
    def carried(self, call: Call, kwargs: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Lays a call down where the forward finds it with the positions: one thread at a time runs a model."""
        self.rope.call = call
        try:
            yield kwargs
        finally:
            self.rope.call = None

    def grid_size(self, given: dict[str, Any]) -> Triple:
        """Returns the tokens (T, H, W) of the video."""
        if given["timestep"].dim() == 2:
            raise ElitError(
                f"an elastic {self.base.__name__} takes one time for all tokens: Wan 2.2 TI2V gives each its own, and "
                "latents have none"
            )
        time, height, width = (
            n // side for n, side in zip(given["hidden_states"].shape[-3:], self.config.patch_size, strict=True)
        )
        return time, height, width


# ------------------------------------------------------------------------------------------------ all of them

FAMILIES: dict[type, type[ElasticMixin]] = {
    each.base: each
    for each in (
        ElasticDiTTransformer2DModel,
        ElasticPixArtTransformer2DModel,
        ElasticSD3Transformer2DModel,
        ElasticFluxTransformer2DModel,
        ElasticQwenImageTransformer2DModel,
        ElasticWanTransformer3DModel,
    )
}

REASONS = {"SanaTransformer2DModel": "its blocks mix neighbouring tokens by convolutions, which latents do not have"}


def refusal(name: str) -> str:
    """Says that a class of transformers cannot be made elastic, why, and which ones can."""
    known = ", ".join(sorted(each.__name__ for each in FAMILIES))
    reason = REASONS.get(name)
    return f"{name} cannot be made elastic{f': {reason}' if reason else ''}; take one of {known}"


def elastic_version(
    transformer: Any,
    read_after: int | None,
    write_after: int | None,
    group_size: int | tuple[int, ...] | None,
    min_latents: int | None,
    start: Start,
) -> Any:
    """Does what :func:`elit.elastify` says."""
    kind = type(transformer)
    if isinstance(transformer, ElasticMixin):
        raise ElitError(f"this {kind.__name__} is elastic already")
    if kind not in FAMILIES:
        raise ElitError(refusal(kind.__name__))
    if any("forward" in vars(module) for module in transformer.modules()):  # a hook of diffusers or accelerate
        raise ElitError(
            f"this {kind.__name__} has hooks, of offload or a cache; make it elastic first, then enable them"
        )
    return FAMILIES[kind].made_of(
        transformer,
        read_after=read_after,
        write_after=write_after,
        group_size=group_size,
        min_latents=min_latents,
        start=start,
    )
