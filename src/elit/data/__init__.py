"""Data sets. `open_data` finds one by name."""

from collections.abc import Callable

from elit.data.captions import captioned_digits
from elit.data.clips import ClipFolder
from elit.data.dataset import Data, ImageData
from elit.data.digits import digits, digits8
from elit.data.moving import moving_digits
from elit.data.order import batch_indices, sample_indices
from elit.errors import ElitError

EMBEDDED: dict[str, Callable[[bool], Data]] = {
    "digits": digits,
    "digits8": digits8,
    "moving-digits": moving_digits,
    "captioned-digits": captioned_digits,
}


def open_data(name: str, held_out: bool = False) -> Data:
    """An embedded data set: its training part, or the part held out.

    Raises:
        ElitError: none has this name.
    """
    if name not in EMBEDDED:
        raise ElitError(f"no data set is named {name!r}; there are {', '.join(EMBEDDED)}")
    return EMBEDDED[name](held_out)


__all__ = [
    "EMBEDDED",
    "ClipFolder",
    "Data",
    "ImageData",
    "batch_indices",
    "captioned_digits",
    "digits",
    "digits8",
    "moving_digits",
    "open_data",
    "sample_indices",
]
