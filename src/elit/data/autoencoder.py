"""Autoencoders of diffusers: images to latents and back."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from elit.errors import ElitError, first_line

Scaling: TypeAlias = tuple[float, float] | tuple[list[float], list[float]]
"""Scale and shift of latents: models see ``(latents - shift) * scale``. Lists have a number for each channel."""


def load_autoencoder(source: str | Path, channels: int | None = None, revision: str | None = None) -> Any:
    """Loads an autoencoder of diffusers: ``AutoencoderKL``, ``AutoencoderKLQwenImage``, or for video
    ``AutoencoderKLWan`` and ``AutoencoderKLCogVideoX``.

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
        reason = first_line(error)
        raise ElitError(f"there is no autoencoder at {source}; give a folder or a Hub id ({reason})") from error
    config = autoencoder.config if isinstance(autoencoder.config, Mapping) else {}  # of transformers, it is none
    found = config.get("latent_channels", config.get("z_dim"))
    if found is None or not _has_scaling(config):
        raise ElitError(
            f"{source} holds a {type(autoencoder).__name__}, which is no autoencoder whose scaling is known"
        )
    if channels not in (None, found):
        raise ElitError(f"{source} has {found} latent channels; the model has {channels}")
    return autoencoder.eval().requires_grad_(False)


def commit_of(source: str | Path, revision: str | None = None) -> str | None:
    """Returns the commit of an autoencoder that was loaded from the Hub, and None for a local folder."""
    from huggingface_hub import try_to_load_from_cache

    if Path(source).exists():
        return None
    file = try_to_load_from_cache(str(source), "config.json", revision=revision)
    return Path(file).parent.name if isinstance(file, str) else None  # the cache is snapshots/COMMIT/config.json


def scaling(config: Mapping[str, Any]) -> Scaling:
    """Returns scale and shift of the latents of an autoencoder, given its configuration."""
    if is_causal_video(config):
        return [1 / std for std in config["latents_std"]], list(config["latents_mean"])
    return config["scaling_factor"], config.get("shift_factor") or 0.0


def _has_scaling(config: Mapping[str, Any]) -> bool:
    if not is_causal_video(config):
        return isinstance(config.get("scaling_factor"), int | float)
    mean, std = (config.get(name) or () for name in ("latents_mean", "latents_std"))
    return len(mean) == len(std) == config["z_dim"] and all(std)


def is_causal_video(config: Mapping[str, Any]) -> bool:
    """Tells whether an autoencoder is one of video such as Wan's and Qwen-Image's, which encodes a picture as a clip of
    one frame and scales each channel by itself."""
    return "z_dim" in config


def scaled(latents: Tensor, scaling: Scaling) -> Tensor:
    """Returns latents (B, C, ...) as models see them."""
    scale, shift = (_per_channel(value, latents) for value in scaling)
    return (latents - shift) * scale


def unscaled(latents: Tensor, scaling: Scaling) -> Tensor:
    """Returns latents (B, C, ...) as the autoencoder sees them: undoes :func:`scaled`."""
    scale, shift = (_per_channel(value, latents) for value in scaling)
    return latents / scale + shift


def _per_channel(value: float | list[float], latents: Tensor) -> float | Tensor:
    """Returns numbers for channels in a shape that multiplies latents (B, C, ...); one for all as it is."""
    if isinstance(value, list):
        return torch.tensor(value, dtype=latents.dtype, device=latents.device).view(-1, *(1,) * (latents.dim() - 2))
    return value


@torch.inference_mode()
def posterior(images: Tensor, autoencoder: Any) -> tuple[Tensor, Tensor]:
    """Encodes images (B, 3, H, W) in [-1, 1] to mean and standard deviation (B, C, h, w) of latents, not scaled; clips
    (B, 3, T, H, W) to those of video (B, C, t, h, w)."""
    images = images.to(autoencoder.device, autoencoder.dtype)
    as_clips = is_causal_video(autoencoder.config) and images.dim() == 4
    encoded = autoencoder.encode(images.unsqueeze(2) if as_clips else images)
    if not hasattr(encoded, "latent_dist"):
        raise ElitError(f"{type(autoencoder).__name__} gives latents without their distribution; take the full one")
    latents = encoded.latent_dist
    return (latents.mean.squeeze(2), latents.std.squeeze(2)) if as_clips else (latents.mean, latents.std)


def latent_shape(shape: Sequence[int], autoencoder: Any) -> tuple[int, ...]:
    """Returns the shape of the latents of one sample, an image (3, H, W) or a clip (3, T, H, W).

    Raises:
        ElitError: the autoencoder cannot encode such samples, or would drop frames.
    """
    kind, config = type(autoencoder).__name__, autoencoder.config
    if is_causal_video(config) and len(shape) == 4:
        of_latent = 2 ** sum(config["temperal_downsample"])  # frames, but one for the first latent
        dropped = (shape[1] - 1) % of_latent
        if dropped:
            longer = shape[1] - dropped + of_latent
            raise ElitError(
                f"clips have {shape[1]} frames, of which {kind} drops the last {dropped}; take {longer} frames"
            )
    try:
        return tuple(posterior(torch.zeros(1, *shape), autoencoder)[0].shape[1:])
    except ElitError:
        raise
    except (ValueError, TypeError, RuntimeError) as error:
        reason = first_line(error)
        raise ElitError(f"{kind} cannot encode samples of shape {tuple(shape)} ({reason})") from error


@torch.inference_mode()
def decode(latents: Tensor, autoencoder: Any, batch_size: int = 8) -> Tensor:
    """Decodes latents (B, C, h, w), scaled as models see them, to images (B, 3, H, W) in [-1, 1] on the same device.

    Latents of video (B, C, t, h, w) become clips (B, 3, T, H, W).
    """
    autoencoder = autoencoder.to(latents.device)
    return torch.cat([decode_batch(part, autoencoder) for part in latents.split(batch_size)])


def decode_batch(latents: Tensor, autoencoder: Any) -> Tensor:
    """Does what :func:`decode` says, all at once; gradients flow, and graphs can be traced."""
    latents = unscaled(latents, scaling(autoencoder.config)).to(autoencoder.dtype)
    if is_causal_video(autoencoder.config) and latents.dim() == 4:
        return autoencoder.decode(latents.unsqueeze(2)).sample.squeeze(2)
    return autoencoder.decode(latents).sample
