"""What weights are, in 16 digits."""

import hashlib

import torch
from torch import nn


def weights_digest(*modules: nn.Module | None) -> str:
    """The first 16 digits of the SHA-256 of the names and values of all weights."""
    digest = hashlib.sha256()
    for module in modules:
        for name, value in (module.state_dict() if module is not None else {}).items():
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
