"""`elit sample` for models that are not of labelled images: clips, and prompts."""

from pathlib import Path

import pytest
from PIL import Image

from conftest import TINY, randomize, tiny
from elit import ElitError
from elit.app.sample import sample_images
from elit.interface import InterfaceConfig
from elit.models import MMDiT, MMDiTConfig


@pytest.fixture
def clips(tmp_path: Path) -> str:
    model = tiny(input_size=(2, 8, 8), patch_size=(1, 2, 2), interface=InterfaceConfig((2, 2, 2)))
    model.save_pretrained(tmp_path / "clips")
    return str(tmp_path / "clips")


@pytest.fixture
def of_text(tmp_path: Path) -> str:
    model = MMDiT(MMDiTConfig(**(TINY.__dict__ | {"num_classes": 0, "text_width": 32})))
    randomize(model).save_pretrained(tmp_path / "text")
    return str(tmp_path / "text")


def test_clips_become_a_video(clips: str, tmp_path: Path) -> None:
    out = sample_images(clips, tmp_path / "clips.gif", num_images=4, steps=2)
    with Image.open(out) as video:
        assert video.n_frames == 2
    with pytest.raises(ElitError, match=r"makes clips: take \.gif or \.mp4"):
        sample_images(clips, tmp_path / "clips.png", num_images=4, steps=2)


def test_prompts_become_images(of_text: str, tmp_path: Path) -> None:
    prompts = ["a handwritten three", "a handwritten four"]
    both = Image.open(sample_images(of_text, tmp_path / "both.png", 2, prompts=prompts, steps=2, guidance="cfg"))
    same = Image.open(sample_images(of_text, tmp_path / "same.png", 2, prompts=prompts[:1], steps=2, guidance="cfg"))
    assert both.size == same.size
    assert both.tobytes() != same.tobytes()
    with pytest.raises(ElitError, match=r"makes images: take \.png"):
        sample_images(of_text, tmp_path / "both.gif", 2, prompts=prompts, steps=2)


def test_prompts_that_do_not_fit(of_text: str, clips: str, tmp_path: Path) -> None:
    with pytest.raises(ElitError, match="2 prompts for 3 images: give one, or one per image, and no labels"):
        sample_images(of_text, tmp_path / "x.png", 3, prompts=["a", "b"])
    with pytest.raises(ElitError, match="give text"):
        sample_images(of_text, tmp_path / "x.png", 1, steps=2)
    with pytest.raises(ElitError, match="the model is conditioned by labels, not by text"):
        sample_images(clips, tmp_path / "x.gif", 1, prompts=["a"], steps=2)
