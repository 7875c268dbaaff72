"""Images that are scored are those that training sees, and features are kept by what they depend on."""

import os
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from elit.data import ImageFolder
from elit.data.pixels import from_uint8, to_uint8
from elit.evaluation import CachedFeatures, Extractor, open_image_set

SIZE = 8


def of_mode(mode: str, seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    if mode == "I;16":
        return Image.fromarray(rng.integers(2**16, size=(SIZE, SIZE), dtype=np.uint16))
    if mode == "P with transparency":
        image = Image.fromarray(rng.integers(256, size=(SIZE, SIZE, 3), dtype=np.uint8)).quantize(16)
        image.info["transparency"] = 3
        return image
    shape = (SIZE, SIZE, len(mode)) if len(mode) > 1 else (SIZE, SIZE)
    return Image.fromarray(rng.integers(256, size=shape, dtype=np.uint8), mode)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of every mode, and one that a camera has turned."""
    for seed, mode in enumerate(["RGB", "RGBA", "LA", "L", "I;16", "P with transparency"]):
        of_mode(mode, seed).save(tmp_path / f"{seed}.png")
    turned = Image.Exif()
    turned[0x0112] = 6  # orientation: a quarter turn
    of_mode("RGB", 6).save(tmp_path / "6.png", exif=turned)
    return tmp_path


def test_evaluation_decodes_files_as_training_does(folder: Path) -> None:
    seen = ImageFolder(folder).pixels(torch.arange(7)).permute(0, 2, 3, 1)
    assert torch.equal(open_image_set(folder).read(0, 7), seen)


def test_what_is_transparent_is_white_and_16_bits_are_reduced(folder: Path) -> None:
    scored = open_image_set(folder).read(0, 7).numpy().astype(int)
    rgba = np.asarray(of_mode("RGBA", 1)).astype(float)
    over_white = rgba[..., :3] * rgba[..., 3:] / 255 + 255 - rgba[..., 3:]
    assert abs(scored[1] - over_white).max() <= 1
    assert (scored[4] == np.asarray(of_mode("I;16", 4))[..., None] >> 8).all()
    assert (scored[6] == np.rot90(np.asarray(of_mode("RGB", 6)), -1)).all()


def test_bytes_and_numbers_are_inverse_and_rounded_to_the_nearest() -> None:
    every = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1)
    assert torch.equal(to_uint8(from_uint8(every).permute(0, 3, 1, 2)), every)
    x = torch.linspace(-1.5, 1.5, 1001).view(1, 1, 7, 143)
    expected = [min(255, max(0, int((v + 1) * 127.5 + 0.5))) for v in x.flatten().double().tolist()]
    assert abs(to_uint8(x).flatten().int() - torch.tensor(expected)).max() <= 1
    assert (to_uint8(x).flatten().int() == torch.tensor(expected)).float().mean() > 0.99  # ties go to even


def test_features_of_other_devices_and_weights_are_kept_apart(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ELIT_CACHE", str(tmp_path / "cache"))

    def network(pixels: Tensor) -> dict[str, Tensor]:
        return {"x": pixels.float().flatten(1)}

    images = open_image_set(folder)
    extractor = Extractor("x", "0", "cpu", "none", {"fx": "x"}, None, None, network)
    features = CachedFeatures(images, extractor)
    features.compute()
    assert CachedFeatures(images, replace(extractor)).missing() == []
    for change in ({"device": "cuda"}, {"weights": "1"}, {"resize": "other"}):
        assert CachedFeatures(images, replace(extractor, **change)).missing() == [0], change
    assert extractor.protocol()["device"] == "cpu"
    assert extractor.protocol()["precision"] == "float32"


def test_files_are_hashed_once_until_one_changes(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also by other processes and later runs; the archive of a folder likewise."""
    monkeypatch.setenv("ELIT_CACHE", str(tmp_path / "cache"))
    reads: list[str] = []

    def counted(root: Path, name: str) -> bytes:
        reads.append(name)
        return (root / name).read_bytes()

    monkeypatch.setattr("elit.evaluation.image_set.read_bytes", counted)
    open_image_set(folder)
    reads.clear()
    assert open_image_set(folder).content == open_image_set(folder).content
    assert len(reads) == 2 * (7 + 1)  # just written: it may have changed since, so all are hashed again
    for path in folder.glob("*.png"):
        os.utime(path, (1_000_000_000, 1_000_000_000))
    first = open_image_set(folder)
    reads.clear()
    assert open_image_set(folder).content == first.content
    assert reads == ["0.png"]  # for the size of the images
    of_mode("RGB", 77).save(folder / "3.png")
    assert open_image_set(folder).content != first.content


def test_images_are_decoded_while_features_are_computed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ELIT_CACHE", str(tmp_path / "cache"))
    second = threading.Event()

    def read(start: int, stop: int) -> Tensor:
        if start:
            second.set()
        return torch.full((stop - start, SIZE, SIZE, 3), start, dtype=torch.uint8)

    def network(pixels: Tensor) -> dict[str, Tensor]:
        assert second.wait(timeout=10), "the second batch is not read before the first is done"
        return {"x": pixels.float().flatten(1)}

    images = replace(open_image_set(folder), count=70, read=read)
    features = CachedFeatures(images, Extractor("x", "0", "cpu", "none", {"fx": "x"}, None, None, network))
    features.compute()
    assert features.read("x")[:, 0].tolist() == [0] * 32 + [32] * 32 + [64] * 6
