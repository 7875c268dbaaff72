"""Autoencoders of diffusers: images to latents and back."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from elit.errors import ElitError


def load_autoencoder(source: str | Path, channels: int | None = None, revision: str | None = None) -> Any:
    """An autoencoder of diffusers (``AutoencoderKL``, or for video ``AutoencoderKLCogVideoX``).

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
    """The commit of an autoencoder that was loaded from the Hub; None of a local folder."""
    from huggingface_hub import try_to_load_from_cache

    if Path(source).exists():
        return None
    file = try_to_load_from_cache(str(source), "config.json", revision=revision)
    return Path(file).parent.name if isinstance(file, str) else None  # the cache is snapshots/COMMIT/config.json


def scaling(autoencoder: Any) -> tuple[float, float]:
    """Its scale and shift: models see ``(latents - shift) * scale``."""
    config = autoencoder.config
    return config.scaling_factor, getattr(config, "shift_factor", None) or 0.0


def weights_hash(autoencoder: Any) -> str:
    """SHA-256 over its weights: the same autoencoder under any name."""
    digest = hashlib.sha256()
    for name, value in sorted(autoencoder.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


@torch.inference_mode()
def posterior(images: Tensor, autoencoder: Any) -> tuple[Tensor, Tensor]:
    """Images (B, 3, H, W) in [-1, 1] -> mean and standard deviation (B, C, h, w) of their latents, not scaled."""
    latents = autoencoder.encode(images.to(autoencoder.device, autoencoder.dtype)).latent_dist
    return latents.mean, latents.std


@torch.inference_mode()
def decode(latents: Tensor, autoencoder: Any, batch_size: int = 8) -> Tensor:
    """Scaled latents (B, C, h, w), as models see them -> images (B, 3, H, W) in [-1, 1], on the latents' device.

    Of video, latents (B, C, t, h, w) -> clips (B, 3, T, H, W).
    """
    scale, shift = scaling(autoencoder.to(latents.device))
    parts = (latents / scale + shift).split(batch_size)
    return torch.cat([autoencoder.decode(part.to(autoencoder.dtype)).sample for part in parts])
