"""Data sets, which `open_data` opens by name or path."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from elit.data.captions import Captioned, captioned_digits
from elit.data.clips import ClipFolder
from elit.data.dataset import Data, ImageData, StagedData
from elit.data.digits import digits, digits8
from elit.data.flipped import Flipped
from elit.data.folder import ImageFolder
from elit.data.latents import INDEX, PUBLISHED, EncodedFolder, LatentData, LatentShards, PublishedLatents
from elit.data.moving import moving_digits
from elit.data.order import sample_indices
from elit.data.remote import local_copy
from elit.data.scenes import scenes
from elit.data.text import WORDS, open_encoder
from elit.errors import ElitError

EMBEDDED: dict[str, Callable[[bool], Data]] = {
    "scenes": scenes,
    "digits": digits,
    "digits8": digits8,
    "moving-digits": moving_digits,
    "captioned-digits": captioned_digits,
}
HELD_OUT = "-held-out"
CLIPS = re.compile(r"(\d+)x(\d+)x(\d+)(?:/(\d+))?")  # FRAMESxHEIGHTxWIDTH, or with /STRIDE


def open_data(name: str, held_out: bool = False, text_encoder: str = WORDS, flips: bool = False) -> Data:
    """Opens a data set: its training part, or the part held out.

    Args:
        name: an embedded data set; or a folder or URL of latent shards, of the published layout, or of images (also a
            zip). ``VIDEOS@8x64x96`` is a folder of videos as clips of 8 frames, 64 pixels high and 96 wide, and
            ``VIDEOS@8x64x96/2`` takes every second frame. ``IMAGES@AUTOENCODER`` and ``VIDEOS@8x64x96@AUTOENCODER``
            encode on the fly with a diffusers autoencoder.
        held_out: the held-out part; of a folder, the folder beside it whose name has ``-held-out`` added.
        text_encoder: of captions, see :func:`~elit.data.text.open_encoder`.
        flips: mirror half of the images at random.

    Raises:
        ElitError: there is no such data set, or it is damaged; a text encoder without captions, or another than stored
            captions were embedded by; or flips of latents.
    """
    data = EMBEDDED[name](held_out) if name in EMBEDDED else _open_folder(name, held_out)
    stored = data.text_encoder if isinstance(data, LatentShards) else None
    if stored is not None and text_encoder not in (WORDS, stored):
        raise ElitError(
            f"text_encoder is {text_encoder}, and {name} holds captions that {stored} has embedded; leave text_encoder "
            "out, or encode the captions again"
        )
    captions: Sequence[str] | None = getattr(data, "captions", None)  # of folders, and where they are embedded
    if captions is None and text_encoder != WORDS:
        raise ElitError(f"text_encoder is {text_encoder}, and {name} has no captions")
    samples: Data = data.data if isinstance(data, Captioned) else data
    if flips and isinstance(samples, LatentData):
        raise ElitError(f"{name} holds latents, which cannot be mirrored; encode them with elit prepare encode --flips")
    samples = Flipped(samples) if flips else samples
    return (
        samples if captions is None or stored is not None else Captioned(samples, captions, open_encoder(text_encoder))
    )


def _open_folder(name: str, held_out: bool) -> Data:
    place, _, view = (name, "", "") if Path(name).exists() else name.partition("@")
    if held_out:
        place = place.rstrip("/") + HELD_OUT
    root = local_copy(place)
    if not root.exists():
        raise ElitError(f"no data set is named {place!r}, nor is it a folder; there are {', '.join(EMBEDDED)}")
    if not view:
        return _open_plain(root)
    shape, _, autoencoder = view.partition("@")
    if not CLIPS.fullmatch(shape):
        return EncodedFolder(ImageFolder(root), view)
    clips = _open_clips(root, shape)
    return EncodedFolder(clips, autoencoder) if autoencoder else clips


def open_pixels(name: str) -> ImageFolder | ClipFolder:
    """Opens what an autoencoder can encode: a folder, zip or URL of images, or ``VIDEOS@8x64x96``.

    Raises:
        ElitError: it is neither.
    """
    place, _, view = (name, "", "") if Path(name).exists() else name.rpartition("@")
    if place and CLIPS.fullmatch(view):
        return _open_clips(local_copy(place), view)
    return ImageFolder(local_copy(name))


def _open_clips(root: Path, shape: str) -> ClipFolder:
    found = CLIPS.fullmatch(shape)
    assert found is not None
    frames, height, width, stride = (int(number or 1) for number in found.groups())
    return ClipFolder(root, frames, (height, width), stride)


def _open_plain(root: Path) -> Data:
    if (root / INDEX).exists() or any(root.glob("shard-*.safetensors")):
        return LatentShards(root)
    if (root / PUBLISHED).is_dir():
        return PublishedLatents(root)
    return ImageFolder(root)


__all__ = [
    "EMBEDDED",
    "Captioned",
    "ClipFolder",
    "Data",
    "EncodedFolder",
    "Flipped",
    "ImageData",
    "ImageFolder",
    "LatentShards",
    "PublishedLatents",
    "StagedData",
    "captioned_digits",
    "digits",
    "digits8",
    "moving_digits",
    "open_data",
    "open_pixels",
    "sample_indices",
    "scenes",
]
