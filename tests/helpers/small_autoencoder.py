"""A small autoencoder in the real format."""

from pathlib import Path

import torch


def save_autoencoder(folder: Path, **changes: float) -> None:
    """A small autoencoder (a quarter of the resolution) with random weights, in the real format."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    options = {"block_out_channels": (8, 8, 8), "norm_num_groups": 4, "latent_channels": 4} | changes
    AutoencoderKL(**kinds, **options).save_pretrained(folder)
