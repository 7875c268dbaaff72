"""The identity of weights."""

import hashlib

import torch
from torch import nn


def weights_digest(*modules: nn.Module | None, digits: int = 16) -> str:
    """Returns the first digits of the SHA-256 of the names and values of all weights.

    The same weights have the same digest under any file name and on any device.

    Args:
        modules: in this order; None is skipped.
        digits: how many of the 64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for module in modules:
        for name, value in sorted(module.state_dict().items()) if module is not None else ():
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:digits]
