"""From image files to samples through the command line, as a user goes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import save_autoencoder
from PIL import Image
from pictures import write_pictures

TINY = '{"width": 32, "depth": 3, "num_heads": 2, "head_depth": 1, "tail_depth": 1, "group_size": 2}'


def elit(*arguments: object, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *launcher, "elit", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    return done


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """504 files, converted, and an autoencoder."""
    root = tmp_path_factory.mktemp("pipeline")
    corrupt = write_pictures(root / "source", 504)
    done = elit("prepare", "convert", root / "source", root / "images", "--resolution", 32, "--workers", 2)
    assert "501 images of 32x32, 3 classes" in done.stdout
    assert all(name in done.stdout for name in corrupt)
    save_autoencoder(root / "autoencoder")
    return root


def test_from_files_to_samples(root: Path) -> None:
    images = sorted((root / "images").rglob("*.png"))
    assert len(images) == 501
    assert all(Image.open(image).size == (32, 32) and Image.open(image).mode == "RGB" for image in images)
    options = ("--autoencoder", root / "autoencoder", "--shard-size", 100, "--flips", "--workers", 1)
    done = elit("prepare", "encode", root / "images", root / "latents", *options)
    assert "501 images in 6 shards" in done.stdout
    index = json.loads((root / "latents" / "index.json").read_text())
    assert (index["count"], index["resolution"], index["shape"], index["num_classes"]) == (1002, 32, [4, 8, 8], 3)

    settings = ("--model.fields", TINY, "--steps", 20, "--batch-size", 16, "--optimizer.warmup-steps", 5)
    done = elit("train", "--data", root / "latents", "--out", root / "run", *settings)
    assert "on 1,002 images" in done.stdout
    losses = [json.loads(line)["loss"] for line in (root / "run" / "log.jsonl").read_text().splitlines()]
    assert np.isfinite(losses).all()
    picture = root / "samples.png"
    options = ("--autoencoder", root / "autoencoder", "--num-images", 4, "--steps", 3, "--budget", 0.25)
    elit("sample", "--model", root / "run", "--out", picture, *options)
    assert np.asarray(Image.open(picture)).std() > 0


def test_pixels_need_no_autoencoder(root: Path) -> None:
    settings = ("--model.fields", TINY, "--model.name", "ELIT-DiT-S/4", "--steps", 2, "--batch-size", 4)
    done = elit("train", "--data", root / "images", "--out", root / "pixels", *settings)
    assert "on 501 images" in done.stdout
    elit("sample", "--model", root / "pixels", "--num-images", 1, "--steps", 2, "--out", root / "pixels.png")


def test_a_launch_shares_the_shards(root: Path) -> None:
    """Two processes write what one does, byte for byte."""
    options = ("--autoencoder", root / "autoencoder", "--shard-size", 80, "--workers", 0)
    launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m")
    elit("prepare", "encode", root / "images", root / "two", *options, launcher=launcher)
    elit("prepare", "encode", root / "images", root / "one", *options)
    assert contents(root / "two") == contents(root / "one")


@pytest.mark.parametrize(
    ("verb", "source", "options", "file"),
    [
        ("convert", "source", ("--resolution", 32, "--workers", 1), "*/img*.png"),
        ("encode", "images", ("--shard-size", 8, "--workers", 0, "--autoencoder", "{}/autoencoder"), "shard-*"),
    ],
)
def test_killed_preparation_continues_to_the_same_bytes(
    root: Path, tmp_path: Path, verb: str, source: str, options: tuple[object, ...], file: str
) -> None:
    options = tuple(str(option).format(root) for option in options)
    command = [sys.executable, "-m", "elit", "prepare", verb, str(root / source)]
    for wanted in (5, 25):  # files that are there at the kill
        process = subprocess.Popen([*command, str(tmp_path / "killed"), *options], stderr=subprocess.DEVNULL)
        while len(list((tmp_path / "killed").glob(file))) < wanted and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").glob(file)}
    elit("prepare", verb, root / source, tmp_path / "killed", *options)
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())  # what was there stayed
    elit("prepare", verb, root / source, tmp_path / "whole", *options)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
