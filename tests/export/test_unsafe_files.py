"""Damaged and foreign files end in one sentence, and nothing in them runs."""

import io
import json
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import elit
from elit.errors import ElitError
from tests.helpers.models import tiny

RAN: list[str] = []
"""What a file made this process do."""


class Bomb:
    """Writes down that it was unpickled."""

    def __reduce__(self) -> Any:
        return RAN.append, ("unpickled",)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One small model in both formats."""
    folder, model = tmp_path_factory.mktemp("files"), tiny(depth=3)
    elit.export(model, folder / "model.pt2")
    elit.export(model, folder / "model.onnx")
    return folder


def changed(source: Path, target: Path, record: str, change: Callable[[bytes], bytes]) -> Path:
    """Copies an archive with one record changed, or added where it is new."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as new:
        root = old.namelist()[0].partition("/")[0]
        for name in old.namelist():
            if name != f"{root}/{record}":
                new.writestr(name, old.read(name))
        known = f"{root}/{record}" in old.namelist()
        new.writestr(f"{root}/{record}", change(old.read(f"{root}/{record}") if known else b""))
    return target


def pickled() -> bytes:
    buffer = io.BytesIO()
    torch.save(Bomb(), buffer, pickle_protocol=pickle.HIGHEST_PROTOCOL)
    return buffer.getvalue()


def of_json(change: Callable[[Any], None]) -> Callable[[bytes], bytes]:
    """A change of a record that is JSON."""

    def apply(record: bytes) -> bytes:
        values = json.loads(record)
        change(values)
        return json.dumps(values).encode()

    return apply


def nodes(graph: Any) -> list[Any]:
    return graph["graph_module"]["graph"]["nodes"]  # type: ignore[no-any-return]


def first_expression(node: Any, text: str) -> bool:
    """Replaces the first expression of a size."""
    if isinstance(node, dict) and "expr_str" in node:
        node["expr_str"] = text
        return True
    values = node.values() if isinstance(node, dict) else node if isinstance(node, list) else []
    return any(first_expression(value, text) for value in values)


GRAPH = "models/model.json"
ATTACKS: dict[str, tuple[str, Callable[[bytes], bytes], str]] = {
    "pickled example inputs": ("data/sample_inputs/model.pt", lambda _: pickled(), "it holds example inputs"),
    "pickled weights": (
        "data/weights/model_weights_config.json",
        of_json(lambda config: next(iter(config["config"].values())).update(use_pickle=True)),
        "its weights are pickled",
    ),
    "old pickled weights": ("data/weights/model.pt", lambda _: pickled(), "it holds data/weights/model.pt"),
    "an object": (
        "data/constants/opaque_obj_0",
        lambda _: pickle.dumps(Bomb()),
        "it holds data/constants/opaque_obj_0",
    ),
    "a call": (GRAPH, of_json(lambda g: nodes(g)[0].update(target="torch.serialization.os.system")), "it calls torch"),
    "an operator that writes files": (
        GRAPH,
        of_json(lambda g: nodes(g)[0].update(target="torch.ops.aten.from_file.default")),
        r"it calls torch\.ops\.aten\.from_file",
    ),
    "code for a size": (
        GRAPH,
        of_json(lambda g: first_expression(g, "__import__('tests').export.test_unsafe_files.RAN.append('size')")),
        "no plain expression",
    ),
    "code for a guard": (GRAPH, of_json(lambda g: g.update(guards_code=["print(1)"])), "conditions that are code"),
    "metadata": (GRAPH, of_json(lambda g: nodes(g)[0].update(metadata={"custom": "{}"})), "its nodes have metadata"),
    "another model's name": ("extra/elit.json", lambda _: b'{"format": 1, "config": {}, "architecture": "GPT"}', "GPT"),
    "another version": ("extra/elit.json", of_json(lambda told: told.update(format=2)), "format 2"),
    "levels that cannot be": ("extra/elit.json", of_json(lambda told: told.update(levels=[99])), "levels is"),
    "no metadata": ("extra/elit.json", lambda _: b"", "was not written by elit export"),
    "a damaged graph": (GRAPH, lambda graph: graph[:1000], "is damaged"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_archive_with_anything_else_is_not_loaded(attack: str, folder: Path, tmp_path: Path) -> None:
    record, change, message = ATTACKS[attack]
    file = changed(folder / "model.pt2", tmp_path / "bad.pt2", record, change)
    RAN.clear()
    with pytest.raises(ElitError, match=message) as told:
        elit.load_exported(file)
    assert RAN == []
    assert "\n" not in str(told.value)


def test_an_archive_that_is_only_repacked_is_loaded(folder: Path, tmp_path: Path) -> None:
    """The attacks above are refused for what they are, and not for the way in which they were made."""
    file = changed(folder / "model.pt2", tmp_path / "same.pt2", GRAPH, of_json(lambda _: None))
    x, t, y = torch.randn(1, 3, 8, 8), torch.rand(1), torch.tensor([1])
    assert torch.equal(elit.load_exported(file)(x, t, y), elit.load_exported(folder / "model.pt2")(x, t, y))


@pytest.mark.parametrize("name", ["model.pt2", "model.onnx"])
def test_a_damaged_file_is_told(name: str, folder: Path, tmp_path: Path) -> None:
    whole = (folder / name).read_bytes()
    for damaged in (b"", b"\x00" * 5000, whole[:-3000], whole[: len(whole) // 2], b"<html>not found</html>"):
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(ElitError, match=r"is damaged|was not written by elit export") as told:
            elit.load_exported(tmp_path / name)
        assert "\n" not in str(told.value)


def test_what_is_no_exported_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(ElitError, match="there is no exported file at"):
        elit.load_exported(tmp_path / "missing.pt2")
    (tmp_path / "model.pt").write_bytes(b"")
    with pytest.raises(ElitError, match=r"those end in \.pt2 or \.onnx"):
        elit.load_exported(tmp_path / "model.pt")


def test_a_foreign_program_and_a_foreign_onnx_file_are_told(folder: Path, tmp_path: Path) -> None:
    import onnx

    torch.export.save(torch.export.export(torch.nn.Linear(2, 2), (torch.zeros(1, 2),)), tmp_path / "linear.pt2")
    model = onnx.load(folder / "model.onnx")
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "foreign.onnx")
    for name in ("linear.pt2", "foreign.onnx"):
        with pytest.raises(ElitError, match="was not written by elit export"):
            elit.load_exported(tmp_path / name)


@pytest.mark.parametrize("location", ["../secret.data", "/etc/passwd", "inside/../../secret.data", "link.data"])
def test_weights_outside_the_folder_are_not_read(location: str, folder: Path, tmp_path: Path) -> None:
    import onnx

    inside = tmp_path / "model"
    inside.mkdir()
    model = onnx.load(folder / "model.onnx")
    onnx.save(model, inside / "model.onnx", save_as_external_data=True, location="weights.data")
    assert elit.load_exported(inside / "model.onnx").levels == (1, 2, 3, 4)
    shutil.move(inside / "weights.data", tmp_path / "secret.data")
    if location == "link.data":
        (inside / location).symlink_to(tmp_path / "secret.data")
    moved = onnx.load(inside / "model.onnx", load_external_data=False)
    for tensor in moved.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    onnx.save(moved, inside / "model.onnx")
    with pytest.raises(ElitError, match="outside its folder"):
        elit.load_exported(inside / "model.onnx")
