"""Autoencoders of diffusers: latents to images."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from elit.errors import ElitError


def load_autoencoder(source: str | Path) -> Any:
    """A diffusers ``AutoencoderKL`` from a local folder or a Hub id.

    Raises:
        ElitError: diffusers is not installed, or nothing usable is there.
    """
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise ElitError("decoding latents needs diffusers: pip install 'elit-diffusion[latents]'") from error
    try:
        return AutoencoderKL.from_pretrained(source).eval().requires_grad_(False)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ElitError(f"there is no autoencoder at {source}; give a folder or a Hub id ({reason})") from error


@torch.inference_mode()
def decode(latents: Tensor, source: str | Path, batch_size: int = 8) -> Tensor:
    """Scaled latents (B, C, h, w), as models see them -> images (B, 3, H, W) in [-1, 1].

    Raises:
        ElitError: see :func:`load_autoencoder`, or the channels do not fit.
    """
    autoencoder = load_autoencoder(source).to(latents.device)
    config = autoencoder.config
    if config.latent_channels != latents.shape[1]:
        raise ElitError(f"{source} decodes {config.latent_channels} channels; the model makes {latents.shape[1]}")
    shift = getattr(config, "shift_factor", None) or 0.0
    parts = (latents / config.scaling_factor + shift).split(batch_size)
    return torch.cat([autoencoder.decode(part.to(autoencoder.dtype)).sample for part in parts])
