"""Captions and clips that are encoded once give training what encoding them in every step gives, without the encoders;
and of videos only the frames of a clip are decoded."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from elit import ElitError
from elit.commands.prepare import prepare_encode
from elit.conditions import Text
from elit.data import Captioned, ClipFolder, LatentShards, clips, open_data
from elit.data.clips import read_video, write_video
from elit.models import MMDiT
from elit.training import ElasticConfig, ModelChoice, OptimizerConfig, TrainConfig, Trainer
from tests.helpers.pictures import smooth
from tests.helpers.small_autoencoder import save_autoencoder
from tests.helpers.small_text_encoder import save_text_encoder

PROMPTS = ["a three", "a handwritten four", "a three", "four", "a handwritten a three"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with captioned images, an autoencoder and a text encoder."""
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    (root / "images").mkdir()
    lines = []
    for i, prompt in enumerate(PROMPTS):
        smooth(rng, 32, 32).save(root / "images" / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": prompt}) + "\n")
    (root / "images/metadata.jsonl").write_text("".join(lines))
    save_autoencoder(root / "autoencoder")
    save_text_encoder(root / "text")
    return root


def encode(root: Path, out: Path, **options: Any) -> LatentShards:
    settings: dict[str, Any] = {"workers": 0, "shard_size": 2, "batch_size": 2, "text_encoder": str(root / "text")}
    prepare_encode(str(root / "images"), out, str(root / "autoencoder"), **(settings | options))
    data = open_data(str(out))
    assert isinstance(data, LatentShards)
    return data


@pytest.mark.parametrize("flips", [False, True])
def test_stored_captions_are_those_of_the_encoder(photos: Path, tmp_path: Path, flips: bool) -> None:
    stored = encode(photos, tmp_path / "latents", flips=flips)
    prepare_encode(
        str(photos / "images"), tmp_path / "plain", str(photos / "autoencoder"), flips=flips, workers=0, shard_size=2
    )
    on_the_fly = open_data(str(tmp_path / "plain"), text_encoder=str(photos / "text"))
    assert isinstance(on_the_fly, Captioned)
    indices = torch.arange(len(stored)).flip(0)
    (x, text), (expected_x, expected) = stored.batch(indices, 3), on_the_fly.batch(indices, 3)
    # float32; the autoencoder and the text encoder meet them in batches of other sizes
    torch.testing.assert_close(x, expected_x, rtol=0, atol=1e-5)
    assert isinstance(text, Text)
    assert torch.equal(text.mask, expected.mask)
    torch.testing.assert_close(text.tokens[text.mask], expected.tokens[expected.mask], rtol=0, atol=1e-5)
    empty = stored.empty_prompt
    assert empty is not None
    torch.testing.assert_close(empty.tokens, on_the_fly.empty_prompt.tokens, rtol=0, atol=1e-5)
    assert json.loads((tmp_path / "latents/index.json").read_text())["text_encoder"] == str(photos / "text")


def test_training_needs_no_text_encoder(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(photos, tmp_path / "latents", dtype="float16")
    fields = {"width": 16, "depth": 3, "num_heads": 2, "head_depth": 1, "tail_depth": 1, "group_size": 2}
    config = TrainConfig(
        out=str(tmp_path / "run"), data=str(tmp_path / "latents"), model=ModelChoice("ELIT-MMDiT-S/2", fields), steps=3,
        elit=ElasticConfig(), batch_size=4, label_dropout=0.5, optimizer=OptimizerConfig(warmup_steps=1),
        precision="fp32",
    )  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr("elit.data.open_encoder", lambda source: pytest.fail("a text encoder was opened"))
        trainer = Trainer(config)
    assert [report.step for report in trainer] == [1, 2, 3]
    assert isinstance(trainer.model, MMDiT)
    assert data.empty_prompt is not None
    assert torch.equal(trainer.model.empty_prompt, data.empty_prompt.tokens[0])
    with pytest.raises(ElitError, match=r"text_encoder is t5, and .*latents holds captions that .*text has embedded"):
        open_data(str(tmp_path / "latents"), text_encoder="t5")


def test_a_text_encoder_without_captions_is_refused(photos: Path, tmp_path: Path) -> None:
    shutil.copytree(photos / "images", tmp_path / "images")
    (tmp_path / "images/metadata.jsonl").unlink()
    with pytest.raises(ElitError, match=r"text_encoder is words, and .*images has no captions"):
        prepare_encode(str(tmp_path / "images"), tmp_path / "out", str(photos / "autoencoder"), text_encoder="words")
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------ clips


def greys(count: int) -> list[Image.Image]:
    """Frames of one grey each, in a texture that codecs find hard: frame i is about 4 i."""
    rng = np.random.default_rng(1)
    noise = rng.integers(-5, 6, (count, 48, 64, 3))
    return [Image.fromarray((4 * i + 8 + noise[i]).astype(np.uint8)) for i in range(count)]


@pytest.mark.parametrize("suffix", [".gif", ".mp4", ".webm"])
def test_chosen_frames_are_those_of_the_whole_video(suffix: str, tmp_path: Path) -> None:
    if suffix != ".gif":
        pytest.importorskip("av")
    path = tmp_path / f"video{suffix}"
    if suffix == ".webm":
        write_webm(greys(20), path)
    else:
        write_video(greys(20), path)
    whole = read_video(path)
    assert len(whole) == 20
    for choice in (range(0, 20, 7), range(9, 15, 2), range(19, 20)):
        chosen = read_video(path, lambda count, choice=choice: choice)  # type: ignore[misc]
        assert [np.asarray(frame).tolist() for frame in chosen] == [np.asarray(whole[i]).tolist() for i in choice]


def write_webm(frames: list[Image.Image], path: Path) -> None:
    import av

    with av.open(str(path), "w") as file:
        stream = file.add_stream("libvpx", rate=8, options={"auto-alt-ref": "0"})
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = *frames[0].size, "yuv420p", 6
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_image(frame)))
        file.mux(stream.encode())


def test_frames_outside_of_a_clip_are_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("av")
    import av

    path = tmp_path / "video.mp4"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=8, options={"bf": "0"})
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 64, 48, "yuv420p", 10
        for frame in greys(60):
            file.mux(stream.encode(av.VideoFrame.from_image(frame)))
        file.mux(stream.encode())
    looked_at: list[int] = []
    decode_until = clips._decode_until

    class Counting:
        def __init__(self, video: Any) -> None:
            self.video = video

        def decode(self, stream: Any) -> Any:
            for frame in self.video.decode(stream):
                looked_at.append(frame.pts)
                yield frame

    monkeypatch.setattr(clips, "_decode_until", lambda video, *rest: decode_until(Counting(video), *rest))
    data = ClipFolder(tmp_path, frames=4, size=(24, 32))
    clip = data.item(0)
    assert clip.shape == (3, 4, 24, 32)
    assert len(looked_at) <= 10 + 4  # from the key frame before the clip to its end, of 60
    whole = read_video(path)[28:32]
    assert clip.float().mean().item() == pytest.approx(np.stack([np.asarray(frame) for frame in whole]).mean(), abs=1)


def test_clips_are_encoded_once(tmp_path: Path) -> None:
    """By a small autoencoder of video with random weights, in the real format."""
    from diffusers import AutoencoderKLCogVideoX

    torch.manual_seed(0)
    kinds = {"down_block_types": ("CogVideoXDownBlock3D",) * 2, "up_block_types": ("CogVideoXUpBlock3D",) * 2}
    AutoencoderKLCogVideoX(
        **kinds, block_out_channels=(8, 8), norm_num_groups=2, latent_channels=4, layers_per_block=1,
        temporal_compression_ratio=2, sample_height=16, sample_width=16,
    ).save_pretrained(tmp_path / "vae")  # fmt: skip
    for kind in ("run", "walk"):
        (tmp_path / "videos" / kind).mkdir(parents=True)
        for i in range(2):
            write_video(greys(9)[i:], tmp_path / "videos" / kind / f"{i}.gif")
    name = f"{tmp_path / 'videos'}@5x16x16"
    prepare_encode(name, tmp_path / "latents", str(tmp_path / "vae"), workers=0, shard_size=3, batch_size=2)
    stored, on_the_fly = open_data(str(tmp_path / "latents")), open_data(f"{name}@{tmp_path / 'vae'}")
    assert (stored.shape, stored.num_classes, len(stored)) == (on_the_fly.shape, 2, 4)
    indices = torch.tensor([3, 0, 2])
    for found, wanted in zip(stored.batch(indices, 1), on_the_fly.batch(indices, 1), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)  # float32, another batch
    with pytest.raises(ElitError, match=r"was made with resolution = \[5, 16, 16\], not \[4, 16, 16\]"):
        prepare_encode(name.replace("@5", "@4"), tmp_path / "latents", str(tmp_path / "vae"), workers=0, shard_size=3)
