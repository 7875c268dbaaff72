"""`import elit` is light, and shows what the README shows."""

import json
import subprocess
import sys

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
