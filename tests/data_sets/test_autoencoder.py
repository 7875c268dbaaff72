from pathlib import Path

import pytest
import torch

from elit import ElitError
from elit.data.autoencoder import decode, load_autoencoder


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small autoencoder with random weights, in the real format."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("autoencoder")
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    net = AutoencoderKL(**kinds, block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, scaling_factor=0.5)
    net.save_pretrained(folder)
    return folder


def test_decode_undoes_the_scaling_in_parts(saved: Path) -> None:
    latents = torch.randn(5, 4, 6, 6)
    autoencoder = load_autoencoder(saved, 4)
    images = decode(latents, autoencoder, batch_size=2)
    assert images.shape == (5, 3, 12, 12)
    expected = torch.cat([autoencoder.decode(z[None] / 0.5).sample for z in latents])
    torch.testing.assert_close(images, expected)  # float32, other batch


def test_autoencoders_that_do_not_fit(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ElitError, match="has 4 latent channels; the model has 16"):
        load_autoencoder(saved, 16)
    with pytest.raises(ElitError, match="there is no autoencoder at"):
        load_autoencoder(tmp_path, 4)
