"""`elit sample` for models that are not of labelled images: clips, prompts, and stages."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from elit import ElitError, load
from elit.cli import main
from elit.data.captions import WordVectors
from elit.data.pixels import to_uint8
from elit.flow import StageSchedule, sample
from elit.interface import InterfaceConfig
from elit.models import DFM, DFMConfig, MMDiT, MMDiTConfig
from tests.helpers.commands import draw
from tests.helpers.models import TINY, randomize, tiny


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
    out = draw(clips, tmp_path / "clips.gif", num_images=4, steps=2)
    with Image.open(out) as video:
        assert video.n_frames == 2
    with pytest.raises(ElitError, match=r"makes clips: take \.gif or \.mp4"):
        draw(clips, tmp_path / "clips.png", num_images=4, steps=2)


def test_prompts_become_images(of_text: str, tmp_path: Path) -> None:
    prompts = ["a handwritten three", "a handwritten four"]
    both = Image.open(draw(of_text, tmp_path / "both.png", 2, prompts=prompts, steps=2, guidance="cfg"))
    same = Image.open(draw(of_text, tmp_path / "same.png", 2, prompts=prompts[:1], steps=2, guidance="cfg"))
    assert both.size == same.size
    assert both.tobytes() != same.tobytes()
    with pytest.raises(ElitError, match=r"makes images: take \.png"):
        draw(of_text, tmp_path / "both.gif", 2, prompts=prompts, steps=2)


def test_prompts_of_a_folder_can_grow(of_text: str, tmp_path: Path) -> None:
    prompts = ["a small three", "a large four", "a five", "six", "a seven or eight"]
    out = tmp_path / "folder"

    def run(count: int, given: list[str], folder: Path = out) -> dict[str, bytes]:
        draw(of_text, folder, count, prompts=given, steps=2, batch_size=2)
        return {path.name: path.read_bytes() for path in folder.glob("*.png")}

    few = run(3, prompts[:3])
    with Image.open(out / "000001.png") as image:
        about = json.loads(image.info["elit"])
    assert (about["prompt"], about["index"], about["label"]) == ("a large four", 1, None)
    assert "prompts" not in about  # of 50,000 images, each would hold all
    with pytest.raises(ElitError, match="holds images with prompts"):
        run(5, ["another", *prompts[1:]])
    with pytest.raises(ElitError, match="holds images with prompts"):
        run(5, prompts[:1])  # one for all
    many = run(5, prompts)
    assert few.items() <= many.items()
    assert run(3, prompts[:3]) == many  # fewer are there already
    assert json.loads((out / "settings.json").read_text())["prompts"] == prompts
    given = WordVectors()(prompts[2:4])
    expected = to_uint8(sample(load(of_text), given, seeds=[2, 3], steps=2)).numpy()
    with Image.open(out / "000003.png") as image:
        found = np.asarray(image).astype(int)
    assert np.abs(found - expected[1]).max() <= 1  # another number of rows: rounding


def test_one_prompt_for_all_of_a_folder(of_text: str, tmp_path: Path) -> None:
    draw(of_text, tmp_path / "one", 2, prompts=["a three"], steps=2, batch_size=2)
    draw(of_text, tmp_path / "one", 4, prompts=["a three"], steps=2, batch_size=2)
    draw(of_text, tmp_path / "each", 4, prompts=["a three"] * 4, steps=2, batch_size=2)
    assert len({path.read_bytes() for path in (tmp_path / "one").glob("*.png")}) == 4  # other seeds
    for path in (tmp_path / "one").glob("*.png"):
        with Image.open(path) as one, Image.open(tmp_path / "each" / path.name) as same:
            assert one.tobytes() == same.tobytes()


def test_stages_of_a_multi_scale_model(tmp_path: Path) -> None:
    model = randomize(DFM(DFMConfig(**(TINY.__dict__ | {"interface": None, "positions": "sincos"}), stages=2))).eval()
    model.save_pretrained(tmp_path / "dfm")
    schedules: list[tuple[int | list[int], list[float] | None, StageSchedule]] = [
        (5, None, StageSchedule([3, 2], [0.1])),
        ([1, 3], None, StageSchedule([1, 3], [0.1])),
        ([1, 3], [0.4], StageSchedule([1, 3], [0.4])),
        (4, [0.3], StageSchedule([2, 2], [0.3])),
    ]
    for i, (steps, thresholds, schedule) in enumerate(schedules):
        out = tmp_path / f"{i}"
        draw(tmp_path / "dfm", out, 2, steps=steps, stage_thresholds=thresholds, batch_size=2, format="npz")
        expected = to_uint8(sample(model, [0, 1], seeds=[0, 1], steps=schedule)).numpy()
        assert np.abs(np.load(out / "samples.npz")["arr_0"].astype(int) - expected).max() <= 1  # threads may differ
    with pytest.raises(ElitError, match="a stage schedule has one threshold less than stages, not 2 for 2"):
        draw(tmp_path / "dfm", tmp_path / "x", 2, steps=[1, 1], stage_thresholds=[0.1, 0.1])
    with pytest.raises(ElitError, match="the schedule has 3 stages; the model has 2"):
        draw(tmp_path / "dfm", tmp_path / "x", 2, steps=[1, 1, 1])


def test_prompts_that_do_not_fit(of_text: str, clips: str, tmp_path: Path) -> None:
    with pytest.raises(ElitError, match="2 prompts for 3 images: give one, or one per image, and no labels"):
        draw(of_text, tmp_path / "x.png", 3, prompts=["a", "b"])
    with pytest.raises(ElitError, match="give text"):
        draw(of_text, tmp_path / "x.png", 1, steps=2)
    with pytest.raises(ElitError, match="the model is conditioned by labels, not by text"):
        draw(clips, tmp_path / "x.gif", 1, prompts=["a"], steps=2)


def test_an_error_of_the_network_is_not_one_of_the_file(
    clips: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lose_connection(*_: object, **__: object) -> None:
        raise ConnectionResetError("Connection reset by peer")

    monkeypatch.setattr("elit.commands.sample.sample", lose_connection)
    assert main(["sample", "--model", clips, "--out", str(tmp_path / "clips.gif")]) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1] == "elit: Connection reset by peer"
    assert not list(tmp_path.glob("*.gif"))
