"""Video models at the paper's Kinetics settings, clips as data and as files, and the autoencoder of CogVideoX."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import elit
from elit import ElitError
from elit.analysis import on_meta
from elit.commands.images import to_frames
from elit.data import ClipFolder, moving_digits
from elit.data.autoencoder import decode, load_autoencoder
from elit.data.clips import read_video, write_video
from elit.data.moving import bounce
from elit.interface import InterfaceConfig
from elit.models import DiT, config_for
from tests.helpers.models import TINY, inputs, randomize
from tests.helpers.models import tiny as tiny_dit

KINETICS: dict[str, Any] = {"input_size": (8, 32, 32), "in_channels": 16, "num_classes": 700}


@pytest.mark.parametrize("name", ["DiT-XL/2", "ELIT-DiT-XL/2", "ELIT-UViT-B/2", "ELIT-HDiT-B/2"])
def test_kinetics_models_have_windows_of_2x4x4(name: str) -> None:
    model = on_meta(config_for(name, **KINETICS))
    assert model.config.grid_size == (8, 16, 16)
    if model.interface is not None:
        assert model.interface.grid.window == (2, 4, 4)
        assert model.interface.grid.num_windows == 64
        assert model.num_latents == model.levels[-1] == 32


def test_a_kinetics_model_runs() -> None:
    model = randomize(DiT(config_for("ELIT-DiT-S/2", **KINETICS, width=32, num_heads=2, depth=5))).eval()
    x, t, y = inputs(model, 1)
    assert x.shape == (1, 16, 8, 32, 32)
    full, less = model(x, t, y), model(x, t, y, 1 / 16)
    assert full.shape == x.shape
    assert (full - less).abs().max() > 1e-3


def test_a_model_of_video_samples_clips() -> None:
    model = tiny_dit(input_size=(2, 8, 8), patch_size=(1, 2, 2), interface=InterfaceConfig((2, 2, 2)))
    guidance = elit.Guidance("ccfg", scale=2.0)
    clips = elit.sample(model, [1, 2, 3], seeds=[5, 6, 7], steps=2, guidance=guidance)
    assert clips.shape == (3, 3, 2, 8, 8)
    alone = elit.sample(model, [2], seeds=[6], steps=2, guidance=guidance)
    torch.testing.assert_close(alone, clips[1:2], rtol=0, atol=1e-5)  # float32, another batch


def test_a_model_of_images_refuses_video() -> None:
    model = DiT(TINY)
    with pytest.raises(ElitError, match="is video, and the model is one of images"):
        model(torch.randn(1, 3, 2, 8, 8), torch.rand(1), torch.zeros(1, dtype=torch.long))


# ------------------------------------------------------------------------------------------------ data


def test_moving_digits_move_as_wholes() -> None:
    data = moving_digits(held_out=True)
    clips, labels = data.batch(torch.arange(40))
    assert data.shape == (1, 8, 16, 16)
    assert clips.shape == (40, 1, 8, 16, 16)
    assert labels.tolist()[::2] == labels.tolist()[1::2]  # two paths of each digit
    ink = (clips + 1).sum((1, 3, 4))
    torch.testing.assert_close(ink, ink[:, :1].expand(-1, 8))  # the whole digit, in every frame
    rows, columns = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    centre = torch.stack([((clips[:, 0] + 1) * axis).sum((2, 3)) / ink for axis in (rows, columns)], dim=-1)
    moved = (centre[:, 1:] - centre[:, :-1]).abs()  # float32 sums of some hundred values
    assert ((moved < 1e-3) | ((moved - 1).abs() < 1e-3)).all()
    assert (moved.sum((1, 2)) > 3).all()


def test_positions_bounce() -> None:
    assert bounce(torch.arange(-3, 9), 4).tolist() == [3, 2, 1, 0, 1, 2, 3, 4, 3, 2, 1, 0]


def colours(count: int, height: int = 20, width: int = 30) -> list[Image.Image]:
    """Frames of one grey each: frame i is 10 i."""
    return [Image.new("RGB", (width, height), (10 * i,) * 3) for i in range(count)]


def save_frames(folder: Path, count: int) -> None:
    folder.mkdir(parents=True)
    for i, image in enumerate(colours(count)):
        image.save(folder / f"{i:03d}.png")


def test_a_folder_of_clips_takes_the_middle_frames(tmp_path: Path) -> None:
    save_frames(tmp_path / "walk" / "a", 9)
    save_frames(tmp_path / "run" / "b", 7)
    write_video(colours(8), tmp_path / "run" / "c.gif")
    data = ClipFolder(tmp_path, frames=3, size=(8, 12), stride=2)
    assert data.classes == ["run", "walk"]
    assert (data.num_classes, len(data), data.shape) == (2, 3, (3, 3, 8, 12))
    clips, labels = data.batch(torch.tensor([2, 0, 1]))
    assert labels.tolist() == [1, 0, 0]
    assert clips.shape == (3, 3, 3, 8, 12)
    greys = ((clips + 1) * 127.5).mean((1, 3, 4)).round().tolist()
    assert greys == [[20, 40, 60], [10, 30, 50], [10, 30, 50]]


def test_clips_without_classes(tmp_path: Path) -> None:
    save_frames(tmp_path / "a", 2)
    data = ClipFolder(tmp_path, frames=2, size=4)
    assert (data.num_classes, data.shape) == (0, (3, 2, 4, 4))
    assert data.batch(torch.tensor([0]))[1].tolist() == [0]


def test_clips_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(ElitError, match="holds no videos"):
        ClipFolder(tmp_path, frames=2, size=4)
    with pytest.raises(ElitError, match="there is no folder"):
        ClipFolder(tmp_path / "nothing", frames=2, size=4)
    save_frames(tmp_path / "a", 2)
    with pytest.raises(ElitError, match="must be at least 1"):
        ClipFolder(tmp_path, frames=0, size=4)
    with pytest.raises(ElitError, match="a has 2 frames, and a clip of 3 needs 5"):
        ClipFolder(tmp_path, frames=3, size=4, stride=2).batch(torch.tensor([0]))
    (tmp_path / "a" / "000.png").write_text("no picture")
    with pytest.raises(ElitError, match="cannot be read as a video"):
        ClipFolder(tmp_path, frames=2, size=4).batch(torch.tensor([0]))


@pytest.mark.parametrize("suffix", [".gif", ".mp4"])
def test_videos_on_disk_and_back(suffix: str, tmp_path: Path) -> None:
    if suffix == ".mp4":
        pytest.importorskip("av")
        pytest.importorskip("imageio")
    path = tmp_path / f"clip{suffix}"
    write_video(colours(5, 33, 47), path)
    frames = read_video(path)
    assert len(frames) == 5
    means = [float(np.asarray(frame).mean()) for frame in frames]
    # a palette is exact; the codec of mp4 rounds greys by a few of 255
    np.testing.assert_allclose(means, [0, 10, 20, 30, 40], atol=0 if suffix == ".gif" else 4)


def test_frames_of_a_video_show_all_clips() -> None:
    clips = torch.full((4, 1, 3, 8, 8), -1.0)
    clips[:, :, 1] = 1.0
    dark, light, _ = to_frames(clips)
    assert np.asarray(dark).mean() < np.asarray(light).mean()
    assert dark.size == light.size


# ------------------------------------------------------------------------------------------------ the autoencoder


def test_latents_of_video_are_decoded(tmp_path: Path) -> None:
    """A small autoencoder of CogVideoX with random weights, in the real format: 4x in time, here 2x in space."""
    from diffusers import AutoencoderKLCogVideoX

    torch.manual_seed(0)
    kinds = {
        "down_block_types": ("CogVideoXDownBlock3D",) * 2,
        "up_block_types": ("CogVideoXUpBlock3D",) * 2,
    }
    net = AutoencoderKLCogVideoX(
        **kinds, block_out_channels=(8, 8), norm_num_groups=2, latent_channels=4, layers_per_block=1,
        temporal_compression_ratio=2, sample_height=16, sample_width=16,
    )  # fmt: skip
    net.save_pretrained(tmp_path / "pipeline" / "vae")
    loaded = load_autoencoder(tmp_path / "pipeline" / "vae", 4)
    latents = torch.randn(3, 4, 2, 8, 8)
    clips = decode(latents, loaded, batch_size=2)
    assert clips.shape[:2] == (3, 3)
    assert clips.shape[-2:] == (16, 16)
    assert clips.shape[2] > 2
    expected = net.eval().decode(latents / net.config.scaling_factor).sample
    torch.testing.assert_close(clips, expected, rtol=0, atol=1e-4)  # float32, another batch
