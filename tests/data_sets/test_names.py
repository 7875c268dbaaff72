"""What ``--data`` names beside labelled images: captions of one's own and clips, also through the command line."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from elit import ElitError, load
from elit.cli import main
from elit.commands.prepare import prepare_convert, prepare_encode
from elit.data import Captioned, ClipFolder, EncodedFolder, ImageFolder, LatentShards, open_data
from elit.data.captions import WordVectors
from elit.data.clips import write_video
from elit.data.text import TextEncoder
from elit.models import MMDiT
from tests.helpers.small_autoencoder import save_autoencoder
from tests.helpers.small_text_encoder import save_text_encoder

CAPTIONS = ["a handwritten three", "a four", "a handwritten three", "", "four", "a three"]
TINY = {"width": 16, "depth": 3, "num_heads": 2, "head_depth": 1, "tail_depth": 1, "group_size": 2}


def picture(rng: np.random.Generator, width: int = 8, height: int = 8) -> Image.Image:
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def write_captions(folder: Path, captions: dict[str, str]) -> None:
    rows = [{"file_name": name, "text": caption, "license": "mine"} for name, caption in captions.items()]
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in reversed(rows)) + "\n\n")


def captioned_folder(folder: Path, side: int = 8) -> str:
    """Six images of two subfolders, with :data:`CAPTIONS` in the order of their names."""
    rng = np.random.default_rng()
    names = [f"{'ab'[i // 3]}/{i}.png" for i in range(6)]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture(rng, side, side).save(folder / name)
    write_captions(folder, dict(zip(names, CAPTIONS, strict=True)))
    return str(folder)


def captions_in(data: object) -> list[str]:
    assert isinstance(data, Captioned)
    return list(data.captions)


# ------------------------------------------------------------------------------------------------ captions


def test_a_folder_with_captions(tmp_path: Path) -> None:
    name = captioned_folder(tmp_path / "own")
    data = open_data(name)
    assert (len(data), data.num_classes, data.shape) == (6, 0, (3, 8, 8))
    assert captions_in(data) == CAPTIONS
    indices = torch.tensor([4, 0, 2])
    x, text = data.batch(indices)
    assert torch.equal(x, ImageFolder(name).batch(indices)[0])
    expected = WordVectors()([CAPTIONS[i] for i in indices])
    assert torch.equal(text.tokens, expected.tokens)
    assert torch.equal(text.mask, expected.mask)


def test_captions_are_embedded_by_the_encoder_that_is_named(tmp_path: Path) -> None:
    save_text_encoder(tmp_path / "encoder")
    encoder = TextEncoder(tmp_path / "encoder")
    for data in (open_data(name, text_encoder=str(tmp_path / "encoder"))
                 for name in (captioned_folder(tmp_path / "own"), "captioned-digits")):  # fmt: skip
        _, text = data.batch(torch.tensor([1, 0]))
        expected = encoder(captions_in(data)[1::-1])
        # float32; the encoder meets the same prompts in another order
        torch.testing.assert_close(text.tokens, expected.tokens, rtol=0, atol=1e-5)
        assert torch.equal(text.mask, expected.mask)
    with pytest.raises(ElitError, match="text_encoder is t5, and digits8 has no captions"):
        open_data("digits8", text_encoder="t5")


def test_captions_stay_with_images_and_latents(tmp_path: Path) -> None:
    """Through conversion, which skips what it cannot read, and through encoding, also with mirror images."""
    source = captioned_folder(tmp_path / "own", side=30)
    (tmp_path / "own" / "a" / "1.png").write_text("no image")
    prepare_convert(source, tmp_path / "images", 16, workers=1)
    kept = CAPTIONS[:1] + CAPTIONS[2:]
    assert captions_in(open_data(str(tmp_path / "images"))) == kept
    save_autoencoder(tmp_path / "autoencoder")
    for flips, latents in ((False, tmp_path / "plain"), (True, tmp_path / "flipped")):
        prepare_encode(str(tmp_path / "images"), latents, str(tmp_path / "autoencoder"), flips=flips, workers=0)
        data = open_data(str(latents))
        assert captions_in(data) == [caption for caption in kept for _ in range(1 + flips)]
        assert isinstance(data, Captioned)
        assert isinstance(data.data, LatentShards)
    direct = open_data(f"{tmp_path / 'images'}@{tmp_path / 'autoencoder'}")
    assert captions_in(direct) == kept
    indices = torch.tensor([2, 4])
    noisy, again = (direct.batch(indices, 3)[0] for _ in range(2))
    assert torch.equal(noisy, again)
    assert (noisy - direct.batch(indices)[0]).abs().max() > 1e-4  # a draw of the posterior, not its mean


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("{", "line 1 of .* must be like"),
        ('{"file_name": "a.png", "text": "a"}\n\n{"file_name": "b.png"}', "line 3 of .* must be like .*'text'"),
        ('{"file_name": "a.png", "text": "a"}\n[]', "line 2 of .* must be like"),
        ('{"file_name": "a.png", "text": null}', "line 1 of .*the text is None"),
        ('{"file_name": "a.png", "text": "a"}', "has no caption for b.png; add it, or remove the image"),
        ("".join(f'{{"file_name": "{name}.png", "text": "x"}}\n' for name in "abc"), "has a caption for c.png, and"),
    ],
)
def test_wrong_captions(tmp_path: Path, lines: str, words: str) -> None:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    (tmp_path / "metadata.jsonl").write_text(lines)
    with pytest.raises(ElitError, match=words):
        open_data(str(tmp_path))


# ------------------------------------------------------------------------------------------------ clips


def clip_folder(folder: Path, count: int = 4) -> str:
    """Videos of 5 frames in two classes."""
    rng = np.random.default_rng()
    for i in range(count):
        file = folder / ("run", "walk")[i % 2] / f"{i}.gif"
        file.parent.mkdir(parents=True, exist_ok=True)
        write_video([picture(rng, 12, 10) for _ in range(5)], file)
    return str(folder)


def test_clips_have_their_shape_in_the_name(tmp_path: Path) -> None:
    name = clip_folder(tmp_path / "videos")
    for view, stride in (("3x8x12", 1), ("3x8x12/2", 2)):
        data, expected = open_data(f"{name}@{view}"), ClipFolder(name, 3, (8, 12), stride)
        assert (len(data), data.num_classes, data.shape) == (4, 2, (3, 3, 8, 12))
        for ours, theirs in zip(data.batch(torch.arange(4)), expected.batch(torch.arange(4)), strict=True):
            assert torch.equal(ours, theirs)
    clip_folder(tmp_path / "videos-held-out", 2)
    assert len(open_data(f"{name}@3x8x12", held_out=True)) == 2


def test_clips_with_captions(tmp_path: Path) -> None:
    name = clip_folder(tmp_path / "videos", 3)
    write_captions(tmp_path / "videos", {"run/0.gif": "a", "run/2.gif": "b", "walk/1.gif": "c"})
    data = open_data(f"{name}@3x8x12")
    assert (captions_in(data), data.num_classes) == (["a", "b", "c"], 0)


def test_clips_are_encoded(tmp_path: Path) -> None:
    from diffusers import AutoencoderKLCogVideoX

    name = clip_folder(tmp_path / "videos", 2)
    torch.manual_seed(0)
    AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 2, up_block_types=("CogVideoXUpBlock3D",) * 2,
        block_out_channels=(8, 8), norm_num_groups=2, latent_channels=4, layers_per_block=1,
        temporal_compression_ratio=2, sample_height=16, sample_width=16,
    ).save_pretrained(tmp_path / "autoencoder")  # fmt: skip
    data = open_data(f"{name}@5x8x8@{tmp_path / 'autoencoder'}")
    assert isinstance(data, EncodedFolder)
    assert (data.shape, data.num_classes) == ((4, 3, 4, 4), 2)  # 5 frames are 1 and 2 times 2
    x, labels = data.batch(torch.tensor([1, 0]), 0)
    assert x.shape == (2, 4, 3, 4, 4)
    assert labels.tolist() == [1, 0]


def test_names_that_are_no_clips(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "a.mp4").write_bytes(b"")
    with pytest.raises(ElitError, match=r"holds no images.*of a folder of videos, .*videos@8x64x64 are clips of 8"):
        open_data(str(tmp_path / "videos"))
    with pytest.raises(ElitError, match="must be at least 1, not 0, 1 and"):
        open_data(f"{tmp_path / 'videos'}@0x64x64")
    with pytest.raises(ElitError, match="cannot be read as a video"):
        open_data(f"{tmp_path / 'videos'}@2x8x8").batch(torch.tensor([0]))


# ------------------------------------------------------------------------------------------------ the command line


def train(out: Path, name: str, *more: str, **fields: object) -> int:
    model = ("--model.name", name, "--model.fields", json.dumps(TINY | fields))
    every = ("--validation.every", "2", "--validation.images", "2", "--validation.sampling-steps", "2")
    steps = ("--steps", "2", "--batch-size", "4", "--precision", "fp32", "--validation.budgets", "[0.25, 1]")
    return main(["train", "--out", str(out), *model, *steps, *every, *more])


def test_train_and_sample_with_captions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, encoder, run = captioned_folder(tmp_path / "own"), tmp_path / "encoder", tmp_path / "run"
    captioned_folder(tmp_path / "own-held-out")
    save_text_encoder(encoder)
    options = ("--data", data, "--text-encoder", str(encoder))
    assert train(run, "ELIT-MMDiT-S/2", *options) == 0, capsys.readouterr().err
    assert Image.open(run / "samples" / "step-00000002.png").size[0] > 100
    model = load(run)
    assert isinstance(model, MMDiT)
    assert torch.equal(model.empty_prompt, TextEncoder(encoder)([""]).tokens[0])
    prompts = ("--prompts", '["a three", "a four"]', "--num-images", "2", "--guidance", "cfg", "--steps", "2")
    out = tmp_path / "x.png"
    assert main(["sample", "--model", str(run), "--out", str(out), "--text-encoder", str(encoder), *prompts]) == 0
    assert out.exists()
    assert train(tmp_path / "other", "ELIT-DiT-S/2", *options) == 2
    assert "the data have captions; take a model of text like ELIT-MMDiT-B/2" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", [".gif", ".mp4"])
def test_train_on_clips_and_sample(suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if suffix == ".mp4":
        pytest.importorskip("av")
        pytest.importorskip("imageio")
    name, run, out = clip_folder(tmp_path / "videos"), tmp_path / "run", tmp_path / f"clips{suffix}"
    clip_folder(tmp_path / "videos-held-out", 2)
    fields = {"patch_size": [1, 2, 2], "group_size": [2, 2, 2]}
    assert train(run, "ELIT-DiT-S/2", "--data", f"{name}@4x8x8", **fields) == 0, capsys.readouterr().err
    assert Image.open(run / "samples" / "step-00000002.gif").n_frames == 4  # type: ignore[attr-defined]
    sampled = main(["sample", "--model", str(run), "--out", str(out), "--num-images", "2", "--steps", "2"])
    assert sampled == 0, capsys.readouterr().err
    (tmp_path / "again").mkdir()
    out.rename(tmp_path / "again" / out.name)  # what was sampled is itself a folder of clips
    assert open_data(f"{tmp_path / 'again'}@4x16x16").batch(torch.tensor([0]))[0].shape == (1, 3, 4, 16, 16)
