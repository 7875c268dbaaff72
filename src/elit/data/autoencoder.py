"""Autoencoders of diffusers: images to latents and back."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from elit.errors import ElitError


def load_autoencoder(source: str | Path, channels: int | None = None, revision: str | None = None) -> Any:
    """Loads an autoencoder of diffusers (``AutoencoderKL``, or for video ``AutoencoderKLCogVideoX``).

    Args:
        source: a local folder, a Hub id, or OWNER/NAME/FOLDER for one that is part of a pipeline, such as
            ``THUDM/CogVideoX-2b/vae``.
        channels: of the latents that it must take; None for any.
        revision: branch, tag or commit on the Hub.

    Raises:
        ElitError: diffusers is not installed, nothing usable is there, or the channels do not fit.
    """
    try:
        from diffusers import AutoModel  # of the class that the files name, one of diffusers' own
    except ImportError as error:
        raise ElitError("latents need diffusers: pip install 'elit-diffusion[latents]'") from error
    owner, _, rest = str(source).partition("/")
    name, _, folder = ("", "", None) if Path(source).is_dir() else rest.partition("/")
    repository = f"{owner}/{name}" if folder else str(source)
    try:
        autoencoder = AutoModel.from_pretrained(repository, subfolder=folder or None, revision=revision)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ElitError(f"there is no autoencoder at {source}; give a folder or a Hub id ({reason})") from error
    found = autoencoder.config.get("latent_channels")
    if found is None or channels not in (None, found):
        raise ElitError(f"{source} has {found} latent channels; the model has {channels}")
    return autoencoder.eval().requires_grad_(False)


def commit_of(source: str | Path, revision: str | None = None) -> str | None:
    """Returns the commit of an autoencoder that was loaded from the Hub, and None for a local folder."""
    from huggingface_hub import try_to_load_from_cache

    if Path(source).exists():
        return None
    file = try_to_load_from_cache(str(source), "config.json", revision=revision)
    return Path(file).parent.name if isinstance(file, str) else None  # the cache is snapshots/COMMIT/config.json


def scaling(autoencoder: Any) -> tuple[float, float]:
    """Returns scale and shift of an autoencoder: models see ``(latents - shift) * scale``."""
    config = autoencoder.config
    return config.scaling_factor, getattr(config, "shift_factor", None) or 0.0


@torch.inference_mode()
def posterior(images: Tensor, autoencoder: Any) -> tuple[Tensor, Tensor]:
    """Encodes images (B, 3, H, W) in [-1, 1] to mean and standard deviation (B, C, h, w) of latents, not scaled."""
    latents = autoencoder.encode(images.to(autoencoder.device, autoencoder.dtype)).latent_dist
    return latents.mean, latents.std


@torch.inference_mode()
def decode(latents: Tensor, autoencoder: Any, batch_size: int = 8) -> Tensor:
    """Decodes latents (B, C, h, w), scaled as models see them, to images (B, 3, H, W) in [-1, 1] on the same device.

    Latents of video (B, C, t, h, w) become clips (B, 3, T, H, W).
    """
    scale, shift = scaling(autoencoder.to(latents.device))
    parts = (latents / scale + shift).split(batch_size)
    return torch.cat([autoencoder.decode(part.to(autoencoder.dtype)).sample for part in parts])
