"""Data sets. `open_data` finds one by name or place."""

from collections.abc import Callable
from pathlib import Path

from elit.data.captions import captioned_digits
from elit.data.clips import ClipFolder
from elit.data.dataset import Data, ImageData
from elit.data.digits import digits, digits8
from elit.data.flipped import Flipped
from elit.data.folder import ImageFolder
from elit.data.latents import INDEX, PUBLISHED, EncodedFolder, LatentData, LatentShards, PublishedLatents
from elit.data.moving import moving_digits
from elit.data.order import batch_indices, sample_indices
from elit.data.remote import local_copy
from elit.errors import ElitError

EMBEDDED: dict[str, Callable[[bool], Data]] = {
    "digits": digits,
    "digits8": digits8,
    "moving-digits": moving_digits,
    "captioned-digits": captioned_digits,
}
HELD_OUT = "-held-out"


def open_data(name: str, held_out: bool = False, flips: bool = False) -> Data:
    """A data set: its training part, or the part held out.

    Args:
        name: an embedded data set; or a folder or URL of latent shards, of the published layout, or of images (also a
            zip). ``IMAGES@AUTOENCODER`` encodes images on the fly with a diffusers autoencoder.
        held_out: the held-out part; of a folder, the folder beside it whose name has ``-held-out`` added.
        flips: mirror half of the images at random.

    Raises:
        ElitError: there is no such data set, it is damaged, or flips are asked of latents.
    """
    data = _open(name, held_out)
    if flips and isinstance(data, LatentData):
        raise ElitError(f"{name} holds latents, which cannot be mirrored; encode them with elit prepare encode --flips")
    return Flipped(data) if flips else data


def _open(name: str, held_out: bool) -> Data:
    if name in EMBEDDED:
        return EMBEDDED[name](held_out)
    place, _, autoencoder = (name, "", "") if Path(name).exists() else name.partition("@")
    if held_out:
        place = place.rstrip("/") + HELD_OUT
    root = local_copy(place)
    if not root.exists():
        raise ElitError(f"no data set is named {place!r}, nor is it a folder; there are {', '.join(EMBEDDED)}")
    if autoencoder:
        return EncodedFolder(root, autoencoder)
    if (root / INDEX).exists() or any(root.glob("shard-*.safetensors")):
        return LatentShards(root)
    if (root / PUBLISHED).is_dir():
        return PublishedLatents(root)
    return ImageFolder(root)


__all__ = [
    "EMBEDDED",
    "ClipFolder",
    "Data",
    "EncodedFolder",
    "Flipped",
    "ImageData",
    "ImageFolder",
    "LatentShards",
    "PublishedLatents",
    "batch_indices",
    "captioned_digits",
    "digits",
    "digits8",
    "moving_digits",
    "open_data",
    "sample_indices",
]
