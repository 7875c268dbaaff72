import shutil
from pathlib import Path

import pytest
import torch

from elit import ElitError
from elit.data.autoencoder import commit_of, decode, load_autoencoder, posterior, scaled, scaling, unscaled
from elit.digest import weights_digest


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


def test_posterior_and_its_scaling(saved: Path) -> None:
    autoencoder = load_autoencoder(saved)
    images = torch.rand(3, 3, 12, 12) * 2 - 1
    mean, std = posterior(images, autoencoder)
    both, log_variance = autoencoder.quant_conv(autoencoder.encoder(images)).chunk(2, dim=1)
    torch.testing.assert_close(mean, both)
    torch.testing.assert_close(std, (log_variance / 2).exp())
    assert scaling(autoencoder.config) == (0.5, 0.0)
    autoencoder.register_to_config(shift_factor=0.25)
    assert scaling(autoencoder.config) == (0.5, 0.25)


def test_an_autoencoder_of_channels_and_frames(tmp_path: Path) -> None:
    """That of Qwen-Image: pictures are clips of one frame, and each channel has a scale and a shift of its own."""
    from diffusers import AutoencoderKLQwenImage

    torch.manual_seed(0)
    shift, std = [0.1, -0.2, 0.3, 0.0], [1.0, 2.0, 0.5, 1.5]
    sizes = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 1], "num_res_blocks": 1, "temperal_downsample": [False]}
    AutoencoderKLQwenImage(**sizes, latents_mean=shift, latents_std=std).save_pretrained(tmp_path)
    autoencoder = load_autoencoder(tmp_path, 4)
    images = torch.rand(3, 3, 16, 16) * 2 - 1
    mean, deviation = posterior(images, autoencoder)
    of_clips = autoencoder.encode(images[:, :, None]).latent_dist
    assert torch.equal(mean, of_clips.mean[:, :, 0]) and torch.equal(deviation, of_clips.std[:, :, 0])
    assert mean.shape == (3, 4, 8, 8)
    seen = scaled(mean, scaling(autoencoder.config))
    torch.testing.assert_close(seen[:, 1], (mean[:, 1] + 0.2) / 2)
    torch.testing.assert_close(unscaled(seen, scaling(autoencoder.config)), mean)
    expected = torch.cat([autoencoder.decode(each[None, :, None]).sample[:, :, 0] for each in mean])
    torch.testing.assert_close(decode(seen, autoencoder, batch_size=2), expected)  # float32, other batch
    with pytest.raises(ElitError, match="has 4 latent channels; the model has 16"):
        load_autoencoder(tmp_path, 16)


def test_an_autoencoder_is_known_by_its_weights(saved: Path, tmp_path: Path) -> None:
    autoencoder = load_autoencoder(saved)
    autoencoder.save_pretrained(tmp_path)
    assert weights_digest(load_autoencoder(tmp_path)) == weights_digest(autoencoder)
    next(autoencoder.parameters()).data[0] += 1e-3
    assert weights_digest(load_autoencoder(tmp_path)) != weights_digest(autoencoder)


def test_commit_of_an_autoencoder_of_the_hub(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit, repository = "0123456789" * 4, tmp_path / "models--some--vae"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(saved, repository / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert commit_of("some/vae") == commit
    assert commit_of("some/vae", "main") == commit
    assert commit_of("some/other") is None
    assert commit_of(saved) is None
