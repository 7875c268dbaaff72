"""Small random pipelines of diffusers, in the real format: text encoders, autoencoder, scheduler and transformer."""

import json
from pathlib import Path
from typing import Any

import torch

from tests.helpers.small_retrofits import FAMILIES, TEXT, make_base
from tests.helpers.small_text_encoder import save_tokenizer

PROMPT = {"prompt": ["a three", "four"], "negative_prompt": ["", ""]}


def base_of(name: str) -> Any:
    return make_base(next(family for family in FAMILIES if family.name == name))


def autoencoder(channels: int = 4) -> Any:
    """Three levels: a quarter of the resolution."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    return AutoencoderKL(
        **kinds, block_out_channels=(8, 8, 8), norm_num_groups=4, latent_channels=channels, shift_factor=0.0
    ).eval()


def t5(folder: Path, width: int) -> dict[str, Any]:
    from transformers import AutoTokenizer, T5Config, T5EncoderModel

    torch.manual_seed(0)
    save_tokenizer(folder)
    config = T5Config(vocab_size=32, d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return {"text_encoder": T5EncoderModel(config).eval(), "tokenizer": AutoTokenizer.from_pretrained(folder)}


def clip(folder: Path, width: int, projects: bool) -> dict[str, Any]:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    torch.manual_seed(0)
    folder.mkdir(parents=True)
    letters = [*"aefhortu", *(f"{letter}</w>" for letter in "aefhortu"), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({letter: i for i, letter in enumerate(letters)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    config = CLIPTextConfig(
        vocab_size=32, hidden_size=width, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        projection_dim=width, bos_token_id=16, eos_token_id=17, pad_token_id=17,
    )  # fmt: skip
    model = CLIPTextModelWithProjection(config) if projects else CLIPTextModel(config)
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)
    return {"text_encoder": model.eval(), "tokenizer": tokenizer}


def dit_pipeline(folder: Path) -> tuple[Any, dict[str, Any]]:
    from diffusers import DDIMScheduler, DiTPipeline

    pipe = DiTPipeline(base_of("DiT"), autoencoder(), DDIMScheduler())
    return pipe, {"class_labels": [1, 2], "guidance_scale": 2.0}


def pixart_pipeline(folder: Path) -> tuple[Any, dict[str, Any]]:
    from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline

    text = t5(folder / "t5", TEXT)
    parts = {"vae": autoencoder(), "transformer": base_of("PixArt"), "scheduler": DPMSolverMultistepScheduler()}
    size = {"height": 64, "width": 64, "use_resolution_binning": False, "clean_caption": False}
    return PixArtAlphaPipeline(**text, **parts), {**PROMPT, **size, "max_sequence_length": 8}


def sd3_pipeline(folder: Path) -> tuple[Any, dict[str, Any]]:
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    first, second = clip(folder / "clip", 16, True), clip(folder / "clip2", 16, True)
    third = t5(folder / "t5", 32)
    text = first | {f"{name}_2": part for name, part in second.items()}
    text |= {f"{name}_3": part for name, part in third.items()}
    parts = {"vae": autoencoder(), "transformer": base_of("SD3"), "scheduler": FlowMatchEulerDiscreteScheduler()}
    return StableDiffusion3Pipeline(**text, **parts), {**PROMPT, "height": 64, "width": 64, "max_sequence_length": 8}


def flux_pipeline(folder: Path) -> tuple[Any, dict[str, Any]]:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    text = clip(folder / "clip", 16, False)
    text |= {f"{name}_2": part for name, part in t5(folder / "t5", TEXT).items()}
    parts = {"vae": autoencoder(), "transformer": base_of("FLUX"), "scheduler": FlowMatchEulerDiscreteScheduler()}
    how = {"height": 64, "width": 96, "true_cfg_scale": 2.0, "max_sequence_length": 8}
    return FluxPipeline(**text, **parts), {**PROMPT, **how}


def qwen_vl() -> dict[str, Any]:
    """A language model with eyes, and a tokenizer of bytes."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

    torch.manual_seed(0)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocab = {token: i for i, token in enumerate([*sorted(ByteLevel.alphabet()), *special])}
    shared = {"hidden_size": 16, "intermediate_size": 32}
    text = shared | {
        "vocab_size": 320, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
        "hidden_size": TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 2, 2]},
    }  # fmt: skip
    eyes = shared | {"depth": 1, "num_heads": 2, "out_hidden_size": TEXT, "fullatt_block_indexes": [0]}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=eyes)
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[])
    return {"text_encoder": Qwen2_5_VLForConditionalGeneration(config).eval(), "tokenizer": tokenizer}


def qwen_pipeline(folder: Path) -> tuple[Any, dict[str, Any]]:
    from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImagePipeline

    torch.manual_seed(0)
    vae = AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 1, 1], num_res_blocks=1, temperal_downsample=[False, False],
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.0, 2.0, 0.5, 1.5],
    ).eval()  # fmt: skip
    parts = {"vae": vae, "transformer": base_of("Qwen-Image"), "scheduler": FlowMatchEulerDiscreteScheduler()}
    return QwenImagePipeline(**parts, **qwen_vl()), {**PROMPT, "height": 64, "width": 96, "true_cfg_scale": 2.0}


def wan_pipeline(folder: Path) -> tuple[Any, dict[str, Any]]:
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(0)
    text = t5(folder / "t5", TEXT)
    config = UMT5Config(vocab_size=32, d_model=TEXT, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    text["text_encoder"] = UMT5EncoderModel(config).eval()
    vae = AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.0, 2.0, 0.5, 1.5],
    ).eval()  # fmt: skip
    parts = {"vae": vae, "transformer": base_of("Wan"), "scheduler": FlowMatchEulerDiscreteScheduler()}
    how = {"height": 64, "width": 64, "num_frames": 5, "max_sequence_length": 8, "guidance_scale": 2.0}
    return WanPipeline(**text, **parts), {**PROMPT, **how, "output_type": "np"}


PIPELINES = {
    "DiT": dit_pipeline,
    "PixArt": pixart_pipeline,
    "SD3": sd3_pipeline,
    "FLUX": flux_pipeline,
    "Qwen-Image": qwen_pipeline,
    "Wan": wan_pipeline,
}
