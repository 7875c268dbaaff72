"""--precision: which dtype a model is loaded in, what a device lacks, and what is recorded."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from elit.cli import main
from elit.commands.options import ModelOptions
from elit.errors import ElitError
from elit.launch import Precision, choose_precision
from tests.helpers.models import tiny

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("precision") / "model"
    tiny().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("verb", ["sample", "plan", "analyze budgets", "analyze steps", "analyze guidance"])
def test_verbs_that_run_a_model_have_the_option(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*verb.split(), "--help"])
    assert "--precision {auto,fp32,tf32,bf16,fp16}" in capsys.readouterr().out


def test_auto_is_bf16_on_a_gpu_alone() -> None:
    assert choose_precision("auto", CPU) == "fp32"
    assert choose_precision("auto", GPU) == "bf16"
    assert choose_precision("fp16", GPU) == "fp16"


@pytest.mark.parametrize("precision", ["fp16", "tf32"])
def test_a_cpu_lacks_tf32_and_fp16(saved: str, precision: Precision, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ElitError, match=f"precision is {precision}, which needs a GPU"):
        ModelOptions(model=saved, device="cpu", precision=precision).load_model(CPU)
    assert main(["sample", "--model", saved, "--device", "cpu", "--precision", precision]) == 2
    assert f"precision is {precision}, which needs a GPU" in capsys.readouterr().err


def test_models_are_loaded_in_the_precision(saved: str) -> None:
    options = ModelOptions(model=saved)
    assert options.load_model(CPU).dtype == torch.float32
    assert options.precision == "fp32"
    assert ModelOptions(model=saved, precision="bf16").load_model(CPU).dtype == torch.bfloat16


def test_a_folder_keeps_its_precision(saved: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["sample", "--model", saved, "--num-images", "2", "--batch-size", "2", "--steps", "4", "--device", "cpu"]
    pixels = {}
    for precision in ("bf16", "fp32"):
        out = tmp_path / precision
        assert main([*command, "--out", str(out), "--precision", precision]) == 0
        assert json.loads((out / "settings.json").read_text())["precision"] == precision
        pixels[precision] = np.asarray(Image.open(out / "000000.png")).astype(int)
    error = np.abs(pixels["bf16"] - pixels["fp32"])
    assert error.max() > 0 and error.mean() < 4  # of 255: other images, and almost the same
    assert main([*command, "--out", str(tmp_path / "fp32")]) == 0  # auto is fp32 here
    capsys.readouterr()
    assert main([*command, "--out", str(tmp_path / "bf16")]) == 2
    assert "precision 'bf16', not 'fp32'" in capsys.readouterr().err


def test_a_plan_holds_for_its_precision(
    saved: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ELIT_CACHE", str(tmp_path / "cache"))
    plan, out = str(tmp_path / "plan.json"), str(tmp_path / "x.png")
    command = ["plan", "--model", saved, "--gflops", "0.02", "--steps", "8", "--device", "cpu", "--measure", "false"]
    assert main([*command, "--precision", "bf16", "--out", plan]) == 0
    command = ["sample", "--model", saved, "--plan", plan, "--num-images", "2", "--device", "cpu", "--out", out]
    assert main([*command, "--precision", "bf16"]) == 0
    assert json.loads(Image.open(out).info["elit"])["precision"] == "bf16"
    capsys.readouterr()
    assert main(command) == 2
    assert "was made for a model in bfloat16, and precision is fp32" in capsys.readouterr().err


@pytest.mark.slow
def test_compiled_samples_are_near(saved: str, tmp_path: Path) -> None:
    command = ["sample", "--model", saved, "--num-images", "2", "--steps", "4", "--device", "cpu"]
    pixels = {}
    for option in ([], ["--compile"]):
        out = tmp_path / f"{len(option)}.png"
        assert main([*command, "--out", str(out), *option]) == 0
        pixels[len(option)] = np.asarray(Image.open(out)).astype(int)
    assert np.abs(pixels[1] - pixels[0]).max() <= 1  # of 255: fused sums are rounded elsewhere
