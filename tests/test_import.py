"""`import elit` is light, and shows what the README shows."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import elit

HEAVY = ["accelerate", "matplotlib", "sklearn", "diffusers", "transformers", "scipy", "jsonargparse", "tensorboard",
         "gradio", "torchvision", "rich"]  # fmt: skip


def test_import_loads_no_heavy_library() -> None:
    code = "import sys, json, elit; print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = json.loads(ran.stdout)
    assert "torch" in loaded
    assert sorted(set(loaded) & set(HEAVY)) == []
    assert ran.stderr == ""


def test_the_public_face() -> None:
    assert {"create", "load", "sample", "Guidance", "ElitError"} <= set(elit.__all__)
    for name in elit.__all__:
        assert getattr(elit, name) is not None
    assert issubclass(elit.ElitError, ValueError)


LAYERS = ["interface", "models", "flow", "evaluation", "analysis", "training", "commands"]
IMPORT = re.compile(r"^\s*(?:from|import) elit\.(\w+)", re.MULTILINE)


@pytest.mark.parametrize("package", [*LAYERS, "data"])
def test_imports_point_down(package: str) -> None:
    """A package uses those before it; what stands beside all of them (layers, conditions, seeding, ...) is free."""
    above = ["cli", *(LAYERS if package == "data" else LAYERS[LAYERS.index(package) + 1 :])]
    above += ["data"] if package in ("interface", "models", "flow") else []
    wrong = [
        f"{file.name} imports elit.{name}"
        for file in (Path(elit.__file__).parent / package).rglob("*.py")
        for name in IMPORT.findall(file.read_text())
        if name in above
    ]
    assert wrong == []
