"""Sources, conversion and readers."""

import io
import json
import shutil
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file, save_file

from elit import ElitError
from elit.commands.prepare import prepare_convert, prepare_encode, prepare_verify
from elit.data import Data, EncodedFolder, ImageFolder, LatentShards, PublishedLatents, open_data, sample_indices
from elit.data.sources import find_images
from tests.helpers.pictures import write_pictures
from tests.helpers.small_autoencoder import save_autoencoder

INDICES = torch.tensor([50, 3, 20, 19, 41, 0])


class Prepared(NamedTuple):
    """A small data set at every stage."""

    source: Path
    corrupt: list[str]
    images: Path
    autoencoder: Path
    latents: Path


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """60 files, three of them corrupt -> 57 images of 32x32 -> latents in three shards."""
    root = tmp_path_factory.mktemp("prepared")
    corrupt = write_pictures(root / "source", 60)
    prepare_convert(str(root / "source"), root / "images", 32, workers=1)
    save_autoencoder(root / "autoencoder")
    options = {"shard_size": 20, "batch_size": 8, "workers": 0}
    prepare_encode(str(root / "images"), root / "latents", str(root / "autoencoder"), **options)
    return Prepared(root / "source", corrupt, root / "images", root / "autoencoder", root / "latents")


def labels_file(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "dataset.json").read_text())


def zipped(folder: Path, target: Path) -> Path:
    with zipfile.ZipFile(target, "w") as archive:
        for file in sorted(folder.rglob("*"), reverse=True):
            archive.write(file, file.relative_to(folder))
    return target


def files(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# ------------------------------------------------------------------------------------------------ sources and convert


def test_class_folders_are_labels_by_name(prepared: Prepared) -> None:
    source = find_images(prepared.source)
    assert (len(source), source.num_classes, source.classes) == (60, 3, ["n00", "n01", "n02"])
    assert list(source.names) == sorted(source.names)
    assert source.labels is not None
    assert all(name.startswith(f"n{label:02d}/") for name, label in zip(source.names, source.labels, strict=True))


def test_converted_folder(prepared: Prepared) -> None:
    report = json.loads((prepared.images / "report.json").read_text())
    assert report["images"] == 57
    assert [skipped["name"] for skipped in report["skipped"]] == sorted(prepared.corrupt)
    source, content = find_images(prepared.source), labels_file(prepared.images)
    assert content["classes"] == ["n00", "n01", "n02"]
    assert source.labels is not None
    kept = [i for i, name in enumerate(source.names) if name not in prepared.corrupt]
    assert content["labels"] == [[f"00000/img{i:08d}.png", source.labels[i]] for i in kept]
    assert {path.name for path in prepared.images.iterdir()} == {"00000", "dataset.json", "prepare.json", "report.json"}


def test_zip_folder_and_dataset_json_give_the_same(prepared: Prepared, tmp_path: Path) -> None:
    """Of the converted images, which keep their size: class folders zipped, and the EDM layout in a folder and zip."""
    prepare_convert(str(zipped(prepared.source, tmp_path / "classes.zip")), tmp_path / "a", 32, workers=1)
    assert files(tmp_path / "a") == files(prepared.images)
    prepare_convert(str(prepared.images), tmp_path / "b", 32, workers=1)
    prepare_convert(str(zipped(prepared.images, tmp_path / "edm.zip")), tmp_path / "c", 32, workers=2)
    assert files(tmp_path / "b") == files(tmp_path / "c")
    old, new = ImageFolder(prepared.images), ImageFolder(tmp_path / "b")
    for before, after in zip(old.batch(INDICES), new.batch(INDICES), strict=True):
        assert torch.equal(before, after)
    first, second = ImageFolder(tmp_path / "edm.zip").batch(INDICES)
    assert torch.equal(first, old.batch(INDICES)[0])
    assert torch.equal(second, old.batch(INDICES)[1])


def test_loose_images_are_unlabelled(prepared: Prepared, tmp_path: Path) -> None:
    for i, file in enumerate(sorted((prepared.images / "00000").iterdir())[:5]):
        shutil.copy(file, tmp_path / f"{i}.png")
    prepare_convert(str(tmp_path), tmp_path / "out", 16, "center-crop", workers=1)
    data = open_data(str(tmp_path / "out"))
    assert (data.num_classes, data.shape, len(data)) == (0, (3, 16, 16), 5)
    assert labels_file(tmp_path / "out") == {"labels": None}


def test_images_that_their_zip_has_damaged_are_reported(prepared: Prepared, tmp_path: Path) -> None:
    archive = zipped(prepared.images / "00000", tmp_path / "images.zip")
    content = bytearray(archive.read_bytes())
    content[len(content) // 2] ^= 1
    archive.write_bytes(content)
    prepare_convert(str(archive), tmp_path / "out", 32, workers=1)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["images"] == 56
    assert "Bad CRC-32" in report["skipped"][0]["reason"]


def test_strict_stops_at_a_corrupt_image(prepared: Prepared, tmp_path: Path) -> None:
    with pytest.raises(ElitError, match=r"cannot be read \(.*\); repair or remove it") as error:
        prepare_convert(str(prepared.source), tmp_path / "out", 32, workers=1, strict=True)
    assert min(prepared.corrupt) in str(error.value)
    assert not (tmp_path / "out" / "dataset.json").exists()
    with pytest.raises(ElitError, match="was not converted to its end; run elit prepare convert again"):
        open_data(str(tmp_path / "out"))  # its numbered folders are no classes


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "must be"),
        ('{"label": []}', "must be"),
        ('{"labels": [["a.png"]]}', "must be"),
        ('{"labels": [["a.png", 0]]}', "has no label for b.png; add it, or remove the image"),
        ('{"labels": [["a.png", 0], ["b.png", 1], ["c.png", 1]]}', "has a label for c.png, and there is no such file"),
        ('{"labels": [["a.png", 0], ["b.png", -1]]}', "gives b.png the label -1"),
        ('{"labels": [["a.png", 0], ["b.png", 0.5]]}', "gives b.png the label 0.5"),
        ('{"labels": [["a.png", 0], ["b.png", 2]], "classes": ["x"]}', "uses label 2 and names 1 classes"),
    ],
)
def test_wrong_labels(tmp_path: Path, content: str, words: str) -> None:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    (tmp_path / "dataset.json").write_text(content)
    with pytest.raises(ElitError, match=words):
        find_images(tmp_path)


def test_wrong_sources_and_options(prepared: Prepared, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.zip").write_text("no zip")
    mixed = tmp_path / "mixed"
    shutil.copytree(prepared.images / "00000", mixed / "class")
    shutil.copy(next((mixed / "class").iterdir()), mixed / "loose.png")
    for source, words in (
        (tmp_path / "nothing", "there is no folder or zip file"),
        (tmp_path / "empty", "holds no images"),
        (tmp_path / "text.zip", "neither a folder nor a zip file that can be read"),
        (mixed, "loose.png lies in no class folder and others do"),
    ):
        with pytest.raises(ElitError, match=words):
            prepare_convert(str(source), tmp_path / "out", 32, workers=1)
    with pytest.raises(ElitError, match="there is no transform 'crop'; there are center-crop, "):
        prepare_convert(str(prepared.source), tmp_path / "out", 32, "crop")
    with pytest.raises(ElitError, match="resolution and workers must be at least 1, not 0 and 1"):
        prepare_convert(str(prepared.source), tmp_path / "out", 0, workers=1)
    with pytest.raises(ElitError, match="was begun with another resolution"):
        prepare_convert(str(prepared.source), prepared.images, 16, workers=1)
    with pytest.raises(ElitError, match=r"text.zip is a file; choose a new or empty folder"):
        prepare_convert(str(prepared.source), tmp_path / "text.zip", 32, workers=1)
    with pytest.raises(ElitError, match="holds other files"):
        prepare_convert(str(prepared.source), tmp_path, 32, workers=1)
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------ latents


def reference(prepared: Prepared, flip: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and std of every image, one at a time, straight from diffusers and Pillow."""
    autoencoder = AutoencoderKL.from_pretrained(prepared.autoencoder)
    moments = []
    for name, _ in labels_file(prepared.images)["labels"]:
        pixels = np.asarray(Image.open(prepared.images / name), dtype=np.float32)[:, :: -1 if flip else 1]
        image = torch.tensor(pixels / 127.5 - 1).permute(2, 0, 1)[None]
        with torch.inference_mode():
            moments.append(autoencoder.encode(image).latent_dist)
    return torch.cat([m.mean for m in moments]), torch.cat([m.std for m in moments])


def test_shards_hold_the_posteriors(prepared: Prepared) -> None:
    mean, std = reference(prepared)
    index = json.loads((prepared.latents / "index.json").read_text())
    assert [shard["count"] for shard in index["shards"]] == [20, 20, 17]
    assert (index["resolution"], index["shape"], index["count"]) == (32, [4, 8, 8], 57)
    assert (index["scaling_factor"], index["shift_factor"], index["dtype"]) == (0.18215, 0.0, "float32")
    shards = [load_file(prepared.latents / shard["file"]) for shard in index["shards"]]
    # float32, batches of other sizes
    torch.testing.assert_close(torch.cat([shard["mean"] for shard in shards]), mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.cat([shard["std"] for shard in shards]), std, rtol=1e-4, atol=1e-5)
    assert torch.cat([s["labels"] for s in shards]).tolist() == [y for _, y in labels_file(prepared.images)["labels"]]


def test_flips_follow_their_images(prepared: Prepared, tmp_path: Path) -> None:
    options: Any = {"shard_size": 20, "workers": 0, "flips": True, "dtype": "float16"}
    prepare_encode(str(prepared.images), tmp_path / "out", str(prepared.autoencoder), **options)
    data = LatentShards(tmp_path / "out")
    assert len(data) == 114
    found, _ = data.moments(torch.arange(114))
    for start in (0, 1):
        mean, _ = reference(prepared, flip=bool(start))
        torch.testing.assert_close(found[start::2], mean, rtol=2**-10, atol=1e-4)  # half precision
    assert torch.equal(data.labels[::2], data.labels[1::2])


def test_draws_depend_on_the_seed_and_the_index_alone(prepared: Prepared) -> None:
    data = LatentShards(prepared.latents)
    mean, std = data.moments(INDICES)
    assert torch.equal(data.batch(INDICES)[0], mean * 0.18215)
    x, y = data.batch(INDICES, 7)
    assert torch.equal(x, data.batch(INDICES, 7)[0])
    assert not torch.equal(x, data.batch(INDICES, 8)[0])
    halves = [data.batch(part, 7) for part in INDICES.split(2)]  # as processes share a batch
    assert torch.equal(x, torch.cat([half[0] for half in halves]))
    assert torch.equal(y, torch.cat([half[1] for half in halves]))
    draws = torch.stack([(data.batch(INDICES, i)[0] / 0.18215 - mean) / std for i in range(200)])
    assert draws.numel() == 200 * 6 * 256
    assert abs(float(draws.mean())) < 5 / draws.numel() ** 0.5  # five standard errors
    assert abs(float(draws.var()) - 1) < 5 * (2 / draws.numel()) ** 0.5


def publish(prepared: Prepared, root: Path, labels: Path, names: str) -> None:
    """The same data set in the published layout, written by hand; labels name the arrays or the images."""
    shutil.copytree(prepared.images, root / "images")
    (root / "images" / "dataset.json").unlink()
    moments = LatentShards(prepared.latents).moments(torch.arange(57))
    rows = labels_file(prepared.images)["labels"]
    renamed = []
    for i, (name, label) in enumerate(rows):
        file = root / "vae-sd" / name.replace("img", "img-mean-std-").replace(".png", ".npy")
        file.parent.mkdir(parents=True, exist_ok=True)
        np.save(file, torch.cat([kind[i] for kind in moments]).numpy())
        renamed.append([file.relative_to(root / "vae-sd").as_posix() if names == "arrays" else name, label])
    (root / labels / "dataset.json").write_text(json.dumps({"labels": renamed}))


@pytest.mark.parametrize(("labels", "names"), [("vae-sd", "arrays"), (".", "images"), ("images", "images")])
def test_the_published_layout_gives_the_same_batches(
    prepared: Prepared, tmp_path: Path, labels: str, names: str
) -> None:
    publish(prepared, tmp_path, Path(labels), names)
    theirs, ours = open_data(str(tmp_path)), open_data(str(prepared.latents))
    assert isinstance(theirs, PublishedLatents)
    assert (theirs.shape, theirs.num_classes, len(theirs)) == (ours.shape, ours.num_classes, len(ours))
    for step in range(4):
        for a, b in zip(batch(theirs, step), batch(ours, step), strict=True):
            assert torch.equal(a, b)


def batch(data: Data, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As the trainer asks for it."""
    return data.batch(sample_indices(0, 16 * step, 16, len(data)), step)


def test_encoding_on_the_fly_gives_the_same_batches(prepared: Prepared) -> None:
    stored = open_data(str(prepared.latents))
    direct = open_data(f"{prepared.images}@{prepared.autoencoder}")
    assert isinstance(direct, EncodedFolder)
    assert (direct.shape, direct.num_classes, len(direct)) == (stored.shape, stored.num_classes, len(stored))
    for a, b in zip(batch(direct, 1), batch(stored, 1), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)  # float32, batches of other sizes


def test_published_arrays_that_do_not_fit(prepared: Prepared, tmp_path: Path) -> None:
    publish(prepared, tmp_path, Path("vae-sd"), "arrays")
    arrays = sorted((tmp_path / "vae-sd" / "00000").iterdir())
    np.save(arrays[1], np.zeros((8, 4, 4), np.float32))
    arrays[2].write_bytes(b"broken")
    data = open_data(str(tmp_path))
    with pytest.raises(ElitError, match=r"has the shape \(8, 4, 4\)"):
        data.batch(torch.tensor([1]))
    with pytest.raises(ElitError, match="cannot be read"):
        data.batch(torch.tensor([2]))
    (tmp_path / "vae-sd" / "dataset.json").unlink()
    with pytest.raises(ElitError, match=r"has no dataset.json; it belongs in"):
        open_data(str(tmp_path))


def test_damaged_shards_and_other_settings(prepared: Prepared, tmp_path: Path) -> None:
    shutil.copytree(prepared.latents, tmp_path / "latents")
    options: Any = {"shard_size": 20, "batch_size": 8, "workers": 0}
    with pytest.raises(ElitError, match="was made with shard_size = 20, not 10; choose another folder"):
        prepare_encode(
            str(prepared.images), tmp_path / "latents", str(prepared.autoencoder), **options | {"shard_size": 10}
        )
    last = tmp_path / "latents" / "shard-00002.safetensors"
    whole = last.read_bytes()
    last.write_bytes(whole[:-10])
    with pytest.raises(ElitError, match=r"shard-00002.safetensors is missing or damaged"):
        open_data(str(tmp_path / "latents"))
    with pytest.raises(ElitError, match="delete it to have it made again"):
        prepare_encode(str(prepared.images), tmp_path / "latents", str(prepared.autoencoder), **options)
    last.unlink()
    prepare_encode(str(prepared.images), tmp_path / "latents", str(prepared.autoencoder), **options)
    assert last.read_bytes() == whole
    (tmp_path / "latents" / "index.json").write_text("{}")
    with pytest.raises(ElitError, match="is no index of latents: it lacks num_classes"):
        open_data(str(tmp_path / "latents"))
    (tmp_path / "latents" / "index.json").unlink()
    with pytest.raises(ElitError, match="is missing or damaged; run elit prepare encode to its end"):
        open_data(str(tmp_path / "latents"))


def test_checksums_find_what_was_damaged_on_the_way(
    prepared: Prepared, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "latents"
    shutil.copytree(prepared.latents, root)
    prepare_verify(str(root))
    assert "3 shards" in capsys.readouterr().out
    first, last = (root / f"shard-0000{i}.safetensors" for i in (0, 2))
    content = bytearray(first.read_bytes())
    content[-3] ^= 1  # one bit: nobody would notice
    first.write_bytes(content)
    last.unlink()
    with pytest.raises(ElitError, match=r"2 of 3 shards of .* missing: shard-00000.safetensors, shard-00002.safet"):
        prepare_verify(str(root))
    with pytest.raises(ElitError, match=r"index.json is missing or damaged"):
        prepare_verify(str(prepared.images))


def test_shards_that_are_not_those_of_the_index(prepared: Prepared, tmp_path: Path) -> None:
    root = tmp_path / "latents"
    shutil.copytree(prepared.latents, root)
    last = root / "shard-00002.safetensors"
    save_file({name: tensor[:-1].contiguous() for name, tensor in load_file(last).items()}, last)
    with pytest.raises(ElitError, match=r"shard-00002.safetensors holds 16 images and the index has 17"):
        open_data(str(root))
    index = json.loads((root / "index.json").read_text())
    del index["shards"][1]["sha256"]
    (root / "index.json").write_text(json.dumps(index))
    with pytest.raises(ElitError, match="a shard needs file, count and sha256"):
        open_data(str(root))


def test_flips_are_of_the_step_and_the_image(prepared: Prepared) -> None:
    plain, flipped = ImageFolder(prepared.images), open_data(str(prepared.images), flips=True)
    assert (flipped.shape, flipped.num_classes, len(flipped)) == (plain.shape, plain.num_classes, len(plain))
    indices = torch.arange(57)
    expected, labels = plain.batch(indices)
    assert torch.equal(flipped.batch(indices)[0], expected)  # nothing by chance without a seed
    mirrored = 0
    for step in range(8):
        x, y = flipped.batch(indices, step)
        halves = [flipped.batch(part, step)[0] for part in indices.split(20)]
        assert torch.equal(x, torch.cat(halves))  # however processes share it
        assert torch.equal(y, labels)
        for image, original in zip(x, expected, strict=True):
            was = not torch.equal(image, original)
            assert torch.equal(image, original.flip(-1) if was else original)
            mirrored += was
    assert abs(mirrored - 8 * 57 / 2) < 5 * (8 * 57) ** 0.5 / 2  # five standard deviations
    with pytest.raises(ElitError, match="holds latents, which cannot be mirrored; encode them with"):
        open_data(str(prepared.latents), flips=True)


def test_images_that_cannot_be_encoded(prepared: Prepared, tmp_path: Path) -> None:
    for i, size in enumerate([(8, 8), (8, 9)]):
        Image.new("RGB", size).save(tmp_path / f"{i}.png")
    with pytest.raises(ElitError, match=r"1.png is 8x9 and the first image 8x8; run elit prepare convert first"):
        prepare_encode(str(tmp_path), tmp_path / "out", str(prepared.autoencoder), workers=1)
    Image.new("RGB", (8, 9)).save(tmp_path / "0.png")
    with pytest.raises(ElitError, match=r"0.png is not square"):
        open_data(str(tmp_path))
    (tmp_path / "0.png").write_bytes(b"")
    with pytest.raises(ElitError, match=r"0.png cannot be read"):
        open_data(str(tmp_path))
    with pytest.raises(ElitError, match="dtype is 'int8'; it is one of float32"):
        prepare_encode(str(prepared.images), tmp_path / "out", str(prepared.autoencoder), dtype="int8")
    with pytest.raises(ElitError, match=r"cannot write .*0\.png: File exists"):
        prepare_encode(str(prepared.images), tmp_path / "0.png", str(prepared.autoencoder), workers=0)


# ------------------------------------------------------------------------------------------------ open_data


def test_urls_are_copied_once(prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ELIT_CACHE", str(tmp_path / "cache"))
    bucket = fsspec.filesystem("memory")
    bucket.put(str(prepared.latents), "/bucket/latents", recursive=True)
    archive = io.BytesIO(zipped(prepared.images, tmp_path / "images.zip").read_bytes())
    bucket.pipe("/bucket/images.zip", archive.getvalue())
    first = open_data("memory://bucket/latents")
    assert torch.equal(first.batch(INDICES)[0], open_data(str(prepared.latents)).batch(INDICES)[0])
    pixels = open_data("memory://bucket/images.zip")
    assert torch.equal(pixels.batch(INDICES)[0], ImageFolder(prepared.images).batch(INDICES)[0])
    copies = [file for file in (tmp_path / "cache").rglob("*") if file.is_file()]
    times = [file.stat().st_mtime_ns for file in copies]
    open_data("memory://bucket/latents/")
    assert times == [file.stat().st_mtime_ns for file in copies]
    index = next(file for file in copies if file.name == "index.json")
    index.write_text("{")
    assert len(open_data("memory://bucket/latents")) == 57
    assert [file for file, before in zip(copies, times, strict=True) if file.stat().st_mtime_ns != before] == [index]
    with pytest.raises(ElitError, match="cannot fetch memory://bucket/nothing"):
        open_data("memory://bucket/nothing")
    with pytest.raises(ElitError, match="cannot fetch foo://bar"):
        open_data("foo://bar")


def test_held_out_part_lies_beside(prepared: Prepared, tmp_path: Path) -> None:
    shutil.copytree(prepared.latents, tmp_path / "data")
    with pytest.raises(ElitError, match=r"no data set is named '.*data-held-out'"):
        open_data(str(tmp_path / "data"), held_out=True)
    shutil.copytree(prepared.images, tmp_path / "data-held-out")
    assert isinstance(open_data(str(tmp_path / "data"), held_out=True), ImageFolder)
