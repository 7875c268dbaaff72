"""Random numbers as functions of a seed and of what they are for, never of what was drawn before.

Everything random in the library begins with :func:`generator` or :func:`normals`. They draw with numpy on the processor
and the numbers go to a device afterwards, so they are the same on every device by construction. Their generator,
Philox, is keyed by 128 bits of a SHA-256 digest: the chance that two of a billion images share their noise is about
1e-21. (torch's generator on the processor keeps 32 bits of its seed: two of 50,000 images would share their noise with
a chance of 1 in 4.)
"""

import hashlib
import operator
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

Part = int | str


def derive_seed(*parts: Part) -> int:
    """Returns the 128-bit seed that belongs to some parts: ``derive_seed(seed, "noise", step)``."""
    plain = tuple(part if isinstance(part, str) else int(operator.index(part)) for part in parts)
    return int.from_bytes(hashlib.sha256(repr(plain).encode()).digest()[:16], "big")


def generator(*parts: Part) -> np.random.Generator:
    """Returns a new generator of random numbers that is keyed by :func:`derive_seed` of the parts."""
    return np.random.Generator(np.random.Philox(key=derive_seed(*parts)))


def normal(rng: np.random.Generator, shape: int | Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """Draws standard normal numbers of a shape, float32."""
    return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32)).to(device)


def normals(keys: Iterable[Sequence[Part]], shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """Draws standard normal numbers (len(keys), \\*shape), float32, each row from a generator of its own parts."""
    rows = [generator(*parts).standard_normal(shape, dtype=np.float32) for parts in keys]
    return torch.from_numpy(np.stack(rows)).to(device)


def uniform(rng: np.random.Generator, shape: int | Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """Draws numbers of a shape that are uniform in [0, 1), float32."""
    return torch.from_numpy(rng.random(shape, dtype=np.float32)).to(device)


def integers(rng: np.random.Generator, end: int, shape: int | Sequence[int]) -> Tensor:
    """Draws whole numbers of a shape that are uniform in 0, ..., end - 1, int64."""
    return torch.from_numpy(rng.integers(end, size=shape))


def permutation(rng: np.random.Generator, count: int) -> Tensor:
    """Draws an order of 0, ..., count - 1: (count,), int64."""
    return torch.from_numpy(rng.permutation(count))


@contextmanager
def torch_seeded(*parts: Part) -> Iterator[None]:
    """Seeds torch's own generator for the length of a ``with`` block, for what torch draws by itself: new weights.

    It holds for tensors on the processor, and keeps 32 bits of the seed there: enough for the weights of a run, too few
    for anything that is drawn many times.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(*parts) >> 65)  # torch takes 63 bits
        yield
