"""Small random transformers of diffusers of every family that can be made elastic, and inputs of their forwards."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

WIDTH = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 4}
TEXT = 24


class Family(NamedTuple):
    """A class of transformers: a small one, and inputs for a batch."""

    name: str
    make: Callable[[], Any]
    inputs: Callable[[int], dict[str, Any]]


def times(batch: int) -> torch.Tensor:
    return torch.full((batch,), 500)


def dit() -> Any:
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(**WIDTH, in_channels=4, out_channels=8, sample_size=16)


def dit_inputs(batch: int) -> dict[str, Any]:
    labels = torch.arange(batch)
    return {"hidden_states": torch.randn(batch, 4, 16, 16), "timestep": times(batch), "class_labels": labels}


def pixart() -> Any:
    from diffusers import PixArtTransformer2DModel

    return PixArtTransformer2DModel(
        **WIDTH, in_channels=4, cross_attention_dim=32, sample_size=16, caption_channels=TEXT
    )


def pixart_inputs(batch: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, 4, 16, 16),
        "encoder_hidden_states": torch.randn(batch, 5, TEXT),
        "encoder_attention_mask": torch.ones(batch, 5),
        "timestep": times(batch),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def sd3() -> Any:
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        **WIDTH, sample_size=16, in_channels=4, out_channels=4, joint_attention_dim=32, caption_projection_dim=32,
        pooled_projection_dim=32, pos_embed_max_size=24, dual_attention_layers=(0, 1), qk_norm="rms_norm",
    )  # fmt: skip


def sd3_inputs(batch: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, 4, 16, 16),
        "encoder_hidden_states": torch.randn(batch, 5, 32),
        "pooled_projections": torch.randn(batch, 32),
        "timestep": times(batch),
    }


def flux() -> Any:
    from diffusers import FluxTransformer2DModel

    layers = WIDTH | {"num_layers": 2, "num_single_layers": 3}
    width = {"joint_attention_dim": TEXT, "pooled_projection_dim": 16, "axes_dims_rope": (4, 6, 6)}
    return FluxTransformer2DModel(**layers, **width, in_channels=16)


def flux_inputs(batch: int) -> dict[str, Any]:
    rows, columns = torch.meshgrid(torch.arange(8.0), torch.arange(12.0), indexing="ij")
    return {
        "hidden_states": torch.randn(batch, 96, 16),
        "encoder_hidden_states": torch.randn(batch, 5, TEXT),
        "pooled_projections": torch.randn(batch, 16),
        "timestep": times(batch) / 1000,
        "img_ids": torch.stack((torch.zeros(8, 12), rows, columns), dim=-1).flatten(0, 1),
        "txt_ids": torch.zeros(5, 3),
    }


def qwen() -> Any:
    from diffusers import QwenImageTransformer2DModel

    width = {"joint_attention_dim": TEXT, "axes_dims_rope": (4, 6, 6)}
    return QwenImageTransformer2DModel(**WIDTH, **width, in_channels=16, out_channels=4)


def qwen_inputs(batch: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, 96, 16),
        "encoder_hidden_states": torch.randn(batch, 5, TEXT),
        "encoder_hidden_states_mask": torch.ones(batch, 5),
        "timestep": times(batch) / 1000,
        "img_shapes": [[(1, 8, 12)]] * batch,
    }


def wan() -> Any:
    from diffusers import WanTransformer3DModel

    sizes = {"in_channels": 4, "out_channels": 4, "text_dim": TEXT, "freq_dim": 32, "ffn_dim": 64}
    return WanTransformer3DModel(**WIDTH, **sizes, rope_max_seq_len=32)


def wan_inputs(batch: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, 4, 3, 16, 24),
        "encoder_hidden_states": torch.randn(batch, 5, TEXT),
        "timestep": times(batch),
    }


FAMILIES = [
    Family("DiT", dit, dit_inputs),
    Family("PixArt", pixart, pixart_inputs),
    Family("SD3", sd3, sd3_inputs),
    Family("FLUX", flux, flux_inputs),
    Family("Qwen-Image", qwen, qwen_inputs),
    Family("Wan", wan, wan_inputs),
]


def make_base(family: Family) -> Any:
    """A small model with random weights, none of them zero."""
    torch.manual_seed(0)
    model = family.make().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


def randomize_interface(elastic: Any) -> Any:
    """Opens Read and Write: what training would do to them."""
    torch.manual_seed(1)
    for parameter in elastic.elit.parameters():
        nn.init.normal_(parameter, std=0.1)
    return elastic


def predict(model: Any, inputs: dict[str, Any], **how: Any) -> torch.Tensor:
    return model(**inputs, **how, return_dict=False)[0]
