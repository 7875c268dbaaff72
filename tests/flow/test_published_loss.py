"""The training loss of the published code, on the stand-in model ``v(x, t) = 0.5 x + t``."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from elit.flow import flow_matching_loss, path_named

NUMBERS = load_file(Path(__file__).parents[1] / "data" / "published" / "training_loss.safetensors")


@pytest.mark.parametrize("times", ["uniform", "lognormal"])
@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_loss(path: str, times: str) -> None:
    t, noise, loss = (NUMBERS[f"{path}.{times}.{name}"] for name in ("t", "noise", "loss"))
    found = flow_matching_loss(lambda x, t: 0.5 * x + t.view(-1, 1, 1, 1), NUMBERS["x"], t, noise, path_named(path))
    assert (found - loss).abs().max() <= 1e-6 * loss.abs().max()
    assert torch.allclose(found, loss, rtol=1e-6)
