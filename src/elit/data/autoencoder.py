"""Autoencoders of diffusers: latents to images."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from elit.errors import ElitError


def load_autoencoder(source: str | Path, channels: int) -> Any:
    """An autoencoder of diffusers (``AutoencoderKL``, or for video ``AutoencoderKLCogVideoX``).

    Args:
        source: a local folder, a Hub id, or OWNER/NAME/FOLDER for one that is part of a pipeline, such as
            ``THUDM/CogVideoX-2b/vae``.
        channels: of the latents that it must take.

    Raises:
        ElitError: diffusers is not installed, nothing usable is there, or the channels do not fit.
    """
    try:
        from diffusers import AutoModel  # of the class that the files name, one of diffusers' own
    except ImportError as error:
        raise ElitError("decoding latents needs diffusers: pip install 'elit-diffusion[latents]'") from error
    owner, _, rest = str(source).partition("/")
    name, _, folder = ("", "", None) if Path(source).is_dir() else rest.partition("/")
    repository = f"{owner}/{name}" if folder else str(source)
    try:
        autoencoder = AutoModel.from_pretrained(repository, subfolder=folder).eval().requires_grad_(False)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ElitError(f"there is no autoencoder at {source}; give a folder or a Hub id ({reason})") from error
    found = autoencoder.config.get("latent_channels")
    if found != channels:
        raise ElitError(f"{source} has {found} latent channels; the model has {channels}")
    return autoencoder


@torch.inference_mode()
def decode(latents: Tensor, autoencoder: Any, batch_size: int = 8) -> Tensor:
    """Scaled latents (B, C, h, w), as models see them -> images (B, 3, H, W) in [-1, 1], on the latents' device.

    Of video, latents (B, C, t, h, w) -> clips (B, 3, T, H, W).
    """
    config = autoencoder.to(latents.device).config
    shift = getattr(config, "shift_factor", None) or 0.0
    parts = (latents / config.scaling_factor + shift).split(batch_size)
    return torch.cat([autoencoder.decode(part.to(autoencoder.dtype)).sample for part in parts])
