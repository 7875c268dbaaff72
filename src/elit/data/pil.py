"""`to_pil`: from what a model samples to pictures that can be shown and saved."""

from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from elit.data.autoencoder import decode, load_autoencoder
from elit.data.pixels import to_uint8
from elit.errors import ElitError


def to_pil(samples: Tensor, autoencoder: Any = None) -> list[Image.Image]:
    """Turns samples of a model into a list of PIL images, after decoding them where they are latents.

    Args:
        samples: (B, C, H, W), as :func:`elit.sample` returns them: latents, or pixels in [-1, 1] of one or three
            channels.
        autoencoder: decodes latents: the Hub id or folder of an autoencoder of diffusers, or for repeated calls the
            autoencoder itself (:func:`~elit.data.autoencoder.load_autoencoder`); None for pixels. It runs on the
            device of the samples.

    Raises:
        ElitError: the samples are clips, or latents without an autoencoder; or the autoencoder cannot be loaded or
            takes another number of channels.
    """
    if samples.dim() != 4:
        raise ElitError(f"samples have shape {tuple(samples.shape)}; to_pil takes images, (batch, channels, H, W)")
    if autoencoder is not None:
        if isinstance(autoencoder, str | Path):
            autoencoder = load_autoencoder(autoencoder, samples.shape[1])
        samples = decode(samples, autoencoder)
    elif samples.shape[1] not in (1, 3):
        raise ElitError(
            f"samples have {samples.shape[1]} channels, so they are latents; name the autoencoder that decodes them, "
            "such as stabilityai/sd-vae-ft-ema"
        )
    return [Image.fromarray(pixels.squeeze(-1).numpy()) for pixels in to_uint8(samples)]
