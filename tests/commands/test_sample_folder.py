"""Images in a folder: the same bytes whoever draws them, however often it is stopped."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from elit import ElitError, create
from elit.cli import main
from elit.commands.bulk import label_of
from elit.models import DiT
from tests.helpers.commands import draw
from tests.helpers.models import randomize

COUNT, BATCH = 43, 8
FOLDER = Path(__file__).parents[2] / "configs/sample"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    net = create(
        "ELIT-DiT-S/1", input_size=8, in_channels=1, num_classes=10, width=32, num_heads=2, depth=3, head_depth=1,
        tail_depth=1, group_size=4,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("model") / "model"
    assert isinstance(net, DiT)
    randomize(net).save_pretrained(folder)
    return folder


def command(model: Path, out: Path, processes: int = 1) -> list[str]:
    start = [sys.executable, "-m"]
    if processes > 1:
        start += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    return [
        *(*start, "elit", "sample", "--model", str(model), "--out", str(out), "--num-images", str(COUNT)),
        *("--batch-size", str(BATCH), "--steps", "5", "--budget", "0.5", "--format", "both", "--labels", "random"),
    ]


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != ".lock"}


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("whole") / "samples"
    assert main(command(model, out)[3:]) == 0
    return contents(out)


def test_a_folder(whole: dict[str, bytes], tmp_path: Path) -> None:
    assert len(whole) == COUNT + 2
    for name in ("samples.npz", "000007.png"):
        (tmp_path / name).write_bytes(whole[name])
    archive = np.load(tmp_path / "samples.npz")
    assert archive["arr_0"].shape == (COUNT, 8, 8, 3)
    assert archive["arr_0"].dtype == np.uint8
    assert archive["arr_1"].tolist() == [label_of(i, "random", 10, 0) for i in range(COUNT)]
    image = Image.open(tmp_path / "000007.png")
    assert (np.asarray(image.convert("RGB")) == archive["arr_0"][7]).all()
    about = json.loads(image.info["elit"])
    assert (about["index"], about["label"], about["budget"]) == (7, archive["arr_1"][7], 0.5)
    assert json.loads(whole["settings.json"])["batch_size"] == BATCH


def test_two_processes_killed_three_times(model: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "samples"
    for wanted in (1, 12, 27):
        processes = [
            subprocess.Popen(
                command(model, out),
                env=os.environ | {"RANK": str(rank), "WORLD_SIZE": "2"},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            for rank in (0, 1)
        ]
        deadline = time.monotonic() + 60
        while len(list(out.glob("??????.png"))) < wanted and time.monotonic() < deadline:
            time.sleep(0.002)
        for process in processes:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
    for half in (".000003.png.abcd.png", ".settings.json.abcd.json"):  # what a kill leaves
        (out / half).write_bytes(b"half")
    before = {p: p.stat().st_mtime_ns for p in out.glob("??????.png")}
    subprocess.run(command(model, out, processes=2), check=True, capture_output=True)
    assert contents(out) == whole
    assert all(p.stat().st_mtime_ns == written for p, written in before.items())  # nothing is drawn twice


def test_a_share_that_died_is_finished_by_another_number_of_processes(
    model: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "samples"
    env = os.environ | {"RANK": "1", "WORLD_SIZE": "3"}
    alone = subprocess.run(command(model, out), check=True, capture_output=True, env=env)
    assert b"images in" not in alone.stdout  # not complete
    assert main(command(model, out)[3:]) == 0
    assert contents(out) == whole


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A command whose images are larger than its settings."""
    net = create("ELIT-DiT-S/8", input_size=32, in_channels=3, num_classes=3, width=32, num_heads=2, depth=3,
                 head_depth=1, tail_depth=1, group_size=2)  # fmt: skip
    folder = tmp_path_factory.mktemp("large") / "model"
    randomize(net).save_pretrained(folder)  # type: ignore[operator]
    return [
        sys.executable,
        "-m",
        "elit",
        "sample",
        "--model",
        str(folder),
        "--steps",
        "2",
        "--batch-size",
        "8",
        "--out",
    ]


def test_a_full_disk_is_one_sentence_and_leaves_nothing_half_written(large: list[str], tmp_path: Path) -> None:
    def small_disk() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))  # bytes of a file

    out = tmp_path / "samples"
    done = subprocess.run([*large, out, "--num-images", "40"], preexec_fn=small_disk, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1] == f"elit: cannot write {out}/000000.png: File too large"
    assert "Traceback" not in done.stderr
    assert contents(out).keys() == {"settings.json"}


@pytest.mark.parametrize(
    ("sent", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "ended")]
)
def test_a_signal_ends_it_cleanly(sent: signal.Signals, code: int, word: str, large: list[str], tmp_path: Path) -> None:
    out = tmp_path / "samples"
    process = subprocess.Popen([*large, out, "--num-images", "5000"], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while len(list(out.glob("??????.png"))) < 10 and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(sent)
    _, told = process.communicate(timeout=60)
    assert process.returncode == code
    assert told.splitlines()[-1] == f"elit: {word}"
    assert "Traceback" not in told
    written = contents(out)
    assert 10 <= len(written) < 5000
    assert not [name for name in written if name.startswith(".")]
    for name in written.keys() - {"settings.json"}:
        with Image.open(out / name) as image:
            image.load()


def test_images_do_not_depend_on_how_many_there_are(model: Path, tmp_path: Path) -> None:
    def run(count: int) -> Path:
        return draw(model, tmp_path / "x", count, steps=3, batch_size=4, format="npz")

    run(5)
    assert sorted(p.name for p in (tmp_path / "x").iterdir()) == [".lock", "samples.npz", "settings.json"]
    few = np.load(tmp_path / "x" / "samples.npz")["arr_0"]
    written = (tmp_path / "x" / "samples.npz").stat().st_mtime_ns
    run(5)
    assert (tmp_path / "x" / "samples.npz").stat().st_mtime_ns == written
    run(11)
    many = np.load(tmp_path / "x" / "samples.npz")["arr_0"]
    assert many.shape[0] == 11
    assert (many[:5] == few).all()


def test_a_list_of_labels_can_grow(model: Path, tmp_path: Path) -> None:
    labels = [3, 1, 4, 1, 5, 9, 2]

    def run(folder: str, given: list[int]) -> np.ndarray:
        draw(model, tmp_path / folder, len(given), labels=given, steps=2, batch_size=4, format="npz")
        archive = np.load(tmp_path / folder / "samples.npz")
        assert archive["arr_1"].tolist() == given
        return archive["arr_0"]

    few = run("grown", labels[:3])
    with pytest.raises(ElitError, match=r"holds images with labels \[3, 1, 4\], not \[3, 2, 4, 1\]"):
        run("grown", [3, 2, 4, 1])
    many = run("grown", labels)
    assert (many[:3] == few).all()
    assert (many == run("at once", labels)).all()


def test_labels() -> None:
    assert [label_of(i, "balanced", 3, 0) for i in range(5)] == [0, 1, 2, 0, 1]
    assert [label_of(i, [4, 2], 9, 0) for i in range(3)] == [4, 2, 4]
    drawn = torch.tensor([label_of(i, "random", 10, 0) for i in range(2000)])
    assert drawn.bincount(minlength=10).min() > 150
    assert drawn.tolist() != [label_of(i, "random", 10, 1) for i in range(2000)]


PRESETS = {  # the kind of model that each is for
    "dfm-sit": "DFM-SiT-XL/2",
    "elit-sit-ccfg": "ELIT-SiT-XL/2",
    "elit-sit-full": "ELIT-SiT-XL/2",
    "elit-sit-quarter": "ELIT-SiT-XL/2",
    "paper": "ELIT-DiT-XL/2",
    "paper-ccfg": "ELIT-DiT-XL/2",
    "sit-no-guidance": "SiT-XL/2",
}


def test_every_preset_is_tried() -> None:
    assert {preset.stem for preset in FOLDER.glob("*.yaml")} == PRESETS.keys()


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_run_on_a_small_model_of_their_kind(preset: str, tmp_path: Path) -> None:
    split = {"head_depth": 1, "tail_depth": 1, "group_size": 4} if "ELIT" in PRESETS[preset] else {}
    net: Any = create(
        PRESETS[preset], input_size=16, in_channels=3, num_classes=3, width=32, num_heads=2, depth=3, **split
    )
    randomize(net).save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    options = ["--model", str(tmp_path / "model"), "--out", str(out), "--num-images", "2", "--batch-size", "2"]
    assert main(["sample", "--config", str(FOLDER / f"{preset}.yaml"), *options]) == 0
    assert np.load(out / "samples.npz")["arr_0"].shape == (2, 16, 16, 3)
    settings = json.loads((out / "settings.json").read_text())
    stated = yaml.safe_load((FOLDER / f"{preset}.yaml").read_text())
    assert settings["steps"] == stated["steps"]
    if stated["guidance"] == "ccfg":
        found = settings["guidance"]
        assert (found["kind"], found["scale"], found["budget"]) == ("ccfg", stated["guidance_scale"], 1 / 16)


def test_refusals(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "samples"
    draw(model, out, 2, steps=2, batch_size=2)
    with pytest.raises(ElitError, match="holds images with steps 2, not 3; take the same settings"):
        draw(model, out, 2, steps=3, batch_size=2)
    with pytest.raises(ElitError, match="batch_size 2, not 4"):
        draw(model, out, 2, steps=2, batch_size=4)
    with pytest.raises(ElitError, match="label 10 does not exist"):
        draw(model, tmp_path / "new", 2, labels=[1, 10], steps=2)
    with pytest.raises(ElitError, match="threads is 0"):
        draw(model, tmp_path / "new", 2, steps=2, threads=0)
    with pytest.raises(ElitError, match="there is no device 'abacus'"):
        draw(model, tmp_path / "new", 2, steps=2, device="abacus")
    assert not (tmp_path / "new").exists()
    with pytest.raises(ElitError, match="budget lists 2 values for 3 sampling steps"):
        draw(model, tmp_path / "again", 2, steps=3, budget="0.5,1")
    draw(model, tmp_path / "again", 2, steps=2, budget="0.5,1", batch_size=2)  # the folder is free
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(ElitError, match=r"is not empty and has no settings\.json"):
        draw(model, tmp_path / "other", 2, steps=2)
    (out / "settings.json").write_text("{")
    with pytest.raises(ElitError, match="is damaged"):
        draw(model, out, 2, steps=2, batch_size=2)
