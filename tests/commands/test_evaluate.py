"""`elit evaluate` from files to scores."""

import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from elit import ElitError
from elit.cli import main
from elit.commands.evaluate import (
    ReferenceOptions,
    ScoreOptions,
    evaluate_compare,
    evaluate_reference,
    evaluate_samples,
)
from elit.data import digits8
from elit.data.pixels import to_uint8
from elit.evaluation.classifier import Classifier, classify
from elit.evaluation.frechet import frechet_distance, moments
from elit.evaluation.metrics import precision_recall
from elit.tensors import load_weights, read_tensors, write_tensors

COUNT = 1300  # three shards
NAME = "frechet_distance"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same images as a folder, a zip and two .npz, and the weights of a classifier."""
    folder = tmp_path_factory.mktemp("files")
    draws = torch.Generator().manual_seed(0)
    pixels = to_uint8(digits8().images[:COUNT] + 0.2 * torch.randn(COUNT, 1, 8, 8, generator=draws)).numpy()
    (folder / "images").mkdir()
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        for i, image in enumerate(pixels):
            path = folder / "images" / f"{i:06d}.png"
            Image.fromarray(image[..., 0]).save(path)
            archive.write(path, path.name)
    np.savez(folder / "stored.npz", pixels.repeat(3, -1))
    np.savez_compressed(folder / "packed.npz", arr_0=pixels.repeat(3, -1))
    write_tensors(folder / "weights.safetensors", Classifier(1, 10).state_dict())
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ELIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def scores(files: Path, samples: object, out: Path, reference: object = "digits8:held-out") -> dict[str, object]:
    found = evaluate_samples(
        ScoreOptions(
            samples=str(samples),
            reference=str(reference),
            extractor="digits8",
            weights=str(files / "weights.safetensors"),
            out=out,
        )
    )
    assert found is not None
    assert json.loads(out.read_text()) == found
    return found


def test_every_kind_of_samples_gives_the_same_scores(files: Path, tmp_path: Path) -> None:
    found = [
        scores(files, files / name, tmp_path / f"{name}.json")["scores"]
        for name in ("images", "images.zip", "stored.npz", "packed.npz")
    ]
    assert all(each == found[0] for each in found)
    network = Classifier(1, 10)
    load_weights(network, read_tensors(files / "weights.safetensors"), "weights")
    ours = torch.from_numpy(np.load(files / "stored.npz")["arr_0"])[..., :1].permute(0, 3, 1, 2) / 127.5 - 1
    theirs = to_uint8(digits8(held_out=True).images).permute(0, 3, 1, 2) / 127.5 - 1
    a, b = (classify(network, images)[1] for images in (ours, theirs))
    assert isinstance(found[0], dict)
    assert found[0][NAME] == pytest.approx(frechet_distance(moments(a), moments(b)), rel=1e-4)  # float32 kernels
    expected = precision_recall(a, b)
    assert (found[0]["precision"], found[0]["recall"]) == pytest.approx(expected, abs=0.01)


def test_statistics_serve_as_well_as_images(files: Path, tmp_path: Path) -> None:
    weights = str(files / "weights.safetensors")
    evaluate_reference(ReferenceOptions("digits8:held-out", tmp_path / "ref.npz", extractor="digits8", weights=weights))
    first = scores(files, files / "images", tmp_path / "a.json")
    second = scores(files, files / "images", tmp_path / "b.json", tmp_path / "ref.npz")
    assert first["scores"][NAME] == second["scores"][NAME]  # type: ignore[index]
    assert set(second["scores"]) == {NAME, "inception_score"}  # type: ignore[call-overload]
    assert "they need images" in second["warnings"][0]  # type: ignore[index]
    assert evaluate_compare([tmp_path / "a.json", tmp_path / "b.json"]) == []
    with np.load(tmp_path / "ref.npz") as archive:
        assert archive["sigma"].shape == (64, 64)


def test_two_processes_killed_three_times(files: Path, cache: Path, tmp_path: Path) -> None:
    whole = scores(files, "digits", tmp_path / "whole.json")  # 26 shards, and one of the reference
    shutil.rmtree(cache)
    out = tmp_path / "scores.json"
    command = [
        *("elit", "evaluate", "--samples", "digits", "--reference", "digits8:held-out", "--extractor", "digits8"),
        *("--weights", str(files / "weights.safetensors"), "--out", str(out)),
    ]
    for shards in (1, 9, 17):
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", *command],
                env=os.environ | {"RANK": str(rank), "WORLD_SIZE": "2"},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            for rank in (0, 1)
        ]
        while len(list(cache.rglob("0*.safetensors"))) < shards and None in [p.poll() for p in processes]:
            time.sleep(0.001)
        for process in processes:
            process.kill()
            process.wait()
        assert not out.exists()
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    subprocess.run([*start, *command], check=True, capture_output=True)
    assert json.loads(out.read_text()) == whole


def test_protocol_and_warning(files: Path, tmp_path: Path) -> None:
    few = tmp_path / "few"
    few.mkdir()
    for i in range(10):
        (few / f"{i}.png").write_bytes((files / "images" / f"{i:06d}.png").read_bytes())
    (few / "settings.json").write_text('{"budget": 0.25}')
    found = scores(files, few, tmp_path / "few.json")
    assert "biased: 10 samples are too few for 64 features" in found["warnings"][0]  # type: ignore[index]
    protocol = found["protocol"]
    assert isinstance(protocol, dict)
    assert protocol["sampling"] == {"budget": 0.25}
    assert protocol["samples"] == 10
    assert len(protocol["weights"]) == len(protocol["reference"]) == 16
    scores(files, files / "images", tmp_path / "many.json", "digits8")
    results = [str(tmp_path / "few.json"), str(tmp_path / "many.json")]
    reasons = evaluate_compare([Path(r) for r in results])
    assert len(reasons) == 2
    assert "not comparable: the reference differs" in reasons[0]
    assert "the number of samples differs (10 and 1300)" in reasons[1]
    assert main(["evaluate", "compare", *results]) == 0


def test_wrong_inputs(files: Path, tmp_path: Path) -> None:
    def refused(samples: object, words: str, reference: object = "digits8") -> None:
        with pytest.raises(ElitError, match=words):
            scores(files, samples, tmp_path / "x.json", reference)

    refused(tmp_path / "nothing", "there is nothing at")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "holds no images")
    (tmp_path / "text.zip").write_text("text")
    refused(tmp_path / "text.zip", "is neither a folder nor a zip file that can be read")
    (tmp_path / "text.npz").write_text("text")
    refused(tmp_path / "text.npz", "is damaged or no .npz")
    refused(files / "images", "is damaged or no .npz", tmp_path / "text.npz")
    np.savez(tmp_path / "floats.npz", np.zeros((2, 4, 4, 3)))
    refused(tmp_path / "floats.npz", "it must be bytes")
    np.savez(tmp_path / "other.npz", names=np.zeros(3))
    refused(tmp_path / "other.npz", "it has no arr_0")
    refused(files / "images", "is no reference", tmp_path / "other.npz")
    np.savez(tmp_path / "adm.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    refused(files / "images", "taken for Inception's only", tmp_path / "adm.npz")
    np.savez(tmp_path / "foreign.npz", mu=np.zeros(3), protocol=np.array("{"))
    refused(files / "images", "has a damaged protocol", tmp_path / "foreign.npz")
    sizes = tmp_path / "sizes"
    sizes.mkdir()
    for size in (4, 5):
        Image.new("RGB", (size, size)).save(sizes / f"{size}.png")
    refused(sizes, "differ in size: 4.png is 4x4 and 5.png is 5x5")
    (sizes / "5.png").write_bytes(b"no image")
    refused(sizes, r"sizes/5\.png is a damaged image")
    for name, words in (
        ("stored.npz", "changed.npz is damaged"),
        ("images.zip", r"changed.zip/\d+.png cannot be read"),
    ):
        content = bytearray((files / name).read_bytes())
        content[len(content) // 2] ^= 1  # a bit that the checksum of the archive knows of
        changed = (tmp_path / "changed").with_suffix(Path(name).suffix)
        changed.write_bytes(content)
        refused(changed, words)
    np.savez(tmp_path / "none.npz", np.zeros((0, 4, 4, 3), np.uint8))
    refused(tmp_path / "none.npz", "holds no images: arr_0 is empty")
    assert not (tmp_path / "x.json").exists()
    with pytest.raises(ElitError, match="at least two results"):
        evaluate_compare([tmp_path / "x.json"])
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ElitError, match="is no result of elit evaluate"):
        evaluate_compare([tmp_path / "list.json"] * 2)
    with pytest.raises(ElitError, match=r"must be a \.npz file"):
        ReferenceOptions("digits8", tmp_path / "x.json")
