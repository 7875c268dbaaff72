"""Samples as pictures."""

from pathlib import Path

import numpy as np
import pytest
import torch

import elit
from elit import ElitError
from elit.data.autoencoder import decode, load_autoencoder
from elit.data.pixels import to_uint8
from tests.helpers.small_autoencoder import save_autoencoder


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_pixels_are_rounded_and_clipped(channels: int, mode: str) -> None:
    samples = torch.linspace(-1.2, 1.2, 2 * channels * 4 * 5).view(2, channels, 4, 5)
    first, second = elit.to_pil(samples)
    assert (first.mode, first.size) == (mode, (5, 4))
    expected = np.round((np.clip(samples[1].numpy(), -1, 1) + 1) * 127.5).transpose(1, 2, 0)
    assert np.array_equal(np.asarray(second).reshape(4, 5, channels), expected)


def test_latents_are_decoded_by_name_or_by_the_autoencoder_itself(tmp_path: Path) -> None:
    save_autoencoder(tmp_path)
    latents = torch.randn(2, 4, 3, 3)
    autoencoder = load_autoencoder(tmp_path)
    pixels = to_uint8(decode(latents, autoencoder)).numpy()
    assert pixels.std() > 1
    for given in (tmp_path, str(tmp_path), autoencoder):
        images = elit.to_pil(latents, given)
        assert [image.size for image in images] == [(12, 12)] * 2
        assert np.array_equal(np.stack([np.asarray(image) for image in images]), pixels)


def test_what_cannot_be_a_picture(tmp_path: Path) -> None:
    with pytest.raises(ElitError, match="4 channels, so they are latents; name the autoencoder"):
        elit.to_pil(torch.zeros(1, 4, 8, 8))
    with pytest.raises(ElitError, match=r"shape \(1, 3, 2, 8, 8\); to_pil takes images"):
        elit.to_pil(torch.zeros(1, 3, 2, 8, 8))
    save_autoencoder(tmp_path)
    with pytest.raises(ElitError, match="has 4 latent channels; the model has 16"):
        elit.to_pil(torch.zeros(1, 16, 8, 8), tmp_path)
