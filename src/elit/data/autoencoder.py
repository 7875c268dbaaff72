"""Autoencoders of diffusers: latents to images."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from elit.errors import ElitError


def load_autoencoder(source: str | Path, channels: int) -> Any:
    """A diffusers ``AutoencoderKL`` from a local folder or a Hub id.

    Args:
        channels: of the latents that it must take.

    Raises:
        ElitError: diffusers is not installed, nothing usable is there, or the channels do not fit.
    """
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise ElitError("decoding latents needs diffusers: pip install 'elit-diffusion[latents]'") from error
    try:
        autoencoder = AutoencoderKL.from_pretrained(source).eval().requires_grad_(False)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ElitError(f"there is no autoencoder at {source}; give a folder or a Hub id ({reason})") from error
    if autoencoder.config.latent_channels != channels:
        raise ElitError(f"{source} has {autoencoder.config.latent_channels} latent channels; the model has {channels}")
    return autoencoder


@torch.inference_mode()
def decode(latents: Tensor, autoencoder: Any, batch_size: int = 8) -> Tensor:
    """Scaled latents (B, C, h, w), as models see them -> images (B, 3, H, W) in [-1, 1], on the latents' device."""
    config = autoencoder.to(latents.device).config
    shift = getattr(config, "shift_factor", None) or 0.0
    parts = (latents / config.scaling_factor + shift).split(batch_size)
    return torch.cat([autoencoder.decode(part.to(autoencoder.dtype)).sample for part in parts])
