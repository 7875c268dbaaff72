"""From image files to samples through the command line, as a user goes."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from elit.commands.prepare import prepare_convert, prepare_encode
from tests.helpers.pictures import write_pictures
from tests.helpers.small_autoencoder import save_autoencoder

ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}  # bits may depend on the threads
TINY = '{"width": 32, "depth": 3, "num_heads": 2, "head_depth": 1, "tail_depth": 1, "group_size": 2}'


def elit(*arguments: object, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *launcher, "elit", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    return done


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


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
    done = elit("train", "--data", root / "images", "--flips", "true", "--out", root / "pixels", *settings)
    assert "on 501 images" in done.stdout


def test_a_launch_shares_the_shards(root: Path) -> None:
    """Two processes write what one does, byte for byte."""
    launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m")
    options = ("--autoencoder", root / "autoencoder", "--shard-size", 80, "--workers", 0)
    elit("prepare", "encode", root / "images", root / "two", *options, launcher=launcher)
    encode(root, root / "one", shard_size=80)
    assert contents(root / "two") == contents(root / "one")


def convert(root: Path, out: Path) -> None:
    prepare_convert(str(root / "source"), out, 32, workers=1)


def encode(root: Path, out: Path, shard_size: int = 8) -> None:
    with torch_threads(1):  # as the processes have
        prepare_encode(str(root / "images"), out, str(root / "autoencoder"), shard_size=shard_size, workers=0)


@pytest.mark.parametrize(
    ("prepare", "arguments", "files"),
    [
        (convert, "convert {root}/source {out} --resolution 32 --workers 1", "*/img*.png"),
        (
            encode,
            "encode {root}/images {out} --autoencoder {root}/autoencoder --shard-size 8 --workers 0",
            "shard-*.safetensors",
        ),
    ],
)
def test_killed_preparation_continues_to_the_same_bytes(
    root: Path, tmp_path: Path, prepare: Callable[[Path, Path], None], arguments: str, files: str
) -> None:
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "elit", "prepare", *arguments.format(root=root, out=out).split()]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=ENVIRONMENT)
    while len(list(out.glob(files))) < 20 and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    before = {path: path.stat().st_mtime_ns for path in out.glob(files)}
    prepare(root, out)
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())  # what was there stayed
    prepare(root, tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")
