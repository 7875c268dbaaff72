"""Data sets. `open_data` finds one by name."""

from collections.abc import Callable

from elit.data.dataset import Data, ImageData
from elit.data.digits import digits, digits8
from elit.data.order import batch_indices, sample_indices
from elit.errors import ElitError

EMBEDDED: dict[str, Callable[[bool], ImageData]] = {"digits": digits, "digits8": digits8}


def open_data(name: str, held_out: bool = False) -> Data:
    """An embedded data set: its training part, or the part held out.

    Raises:
        ElitError: none has this name.
    """
    if name not in EMBEDDED:
        raise ElitError(f"no data set is named {name!r}; there are {', '.join(EMBEDDED)}")
    return EMBEDDED[name](held_out)


__all__ = ["EMBEDDED", "Data", "ImageData", "batch_indices", "digits", "digits8", "open_data", "sample_indices"]
