"""Random numbers as functions of a seed and of what they are for, never of what was drawn before."""

import hashlib

import torch


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on every part: ``derive_seed(seed, "noise", step)``."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(*parts: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator seeded by :func:`derive_seed` of the parts."""
    return torch.Generator(device).manual_seed(derive_seed(*parts))


def drawn_seed(generator: torch.Generator) -> int:
    """A seed that a generator on the CPU draws: what is derived from it needs no order."""
    return int(torch.randint(2**62, (), generator=generator))
