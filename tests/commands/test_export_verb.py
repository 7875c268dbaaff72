"""`elit export` on the command line, and its files where a model is asked for."""

from pathlib import Path
from typing import Any

import pytest
import torch

from elit.cli import main
from elit.data.autoencoder import decode, load_autoencoder
from tests.helpers.models import tiny
from tests.helpers.small_autoencoder import save_autoencoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verb")
    tiny(depth=3).save_pretrained(folder / "model")
    assert main(["export", "--model", f"{folder}/model", "--out", f"{folder}/m.onnx", "--levels", "[1,2,4]"]) == 0
    return folder


def test_an_exported_file_is_a_model_of_every_verb(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = f"{folder}/m.onnx"
    assert main(["sample", "--model", file, "--budget", "0.25", "--num-images", "2", "--steps", "2",
                 "--out", f"{folder}/a.png"]) == 0  # fmt: skip
    assert main(["analyze", "budgets", "--model", file, "--repeats", "2", "--batch-sizes", "[1]", "--steps", "2",
                 "--out", f"{folder}/budgets"]) == 0  # fmt: skip
    assert (folder / "a.png").exists()
    assert (folder / "budgets" / "budgets.json").exists()
    assert "elastic" in capsys.readouterr().out


@pytest.mark.slow
def test_an_exported_file_can_be_planned_for(folder: Path) -> None:
    arguments = ["plan", "--model", f"{folder}/m.onnx", "--speedup", "2", "--out", f"{folder}/plan.json"]
    assert main(arguments) == 0
    assert main(["sample", "--model", f"{folder}/m.onnx", "--plan", f"{folder}/plan.json", "--num-images", "2",
                 "--out", f"{folder}/planned.png"]) == 0  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("form", ["onnx", "pt2"])
def test_the_decoder_is_written_beside_the_file(form: str, tmp_path: Path) -> None:
    save_autoencoder(tmp_path / "vae", scaling_factor=0.5)
    tiny(depth=3, in_channels=4).save_pretrained(tmp_path / "model")
    assert main(["export", "--model", f"{tmp_path}/model", "--out", f"{tmp_path}/m.{form}",
                 "--autoencoder", f"{tmp_path}/vae"]) == 0  # fmt: skip
    run: Any
    if form == "onnx":
        session = pytest.importorskip("onnxruntime").InferenceSession(tmp_path / "m-decoder.onnx")
        assert session.get_inputs()[0].shape == ["batch", 4, 8, 8]
        run = lambda latents: torch.from_numpy(session.run(None, {"latents": latents.numpy()})[0])  # noqa: E731
    else:
        run = torch.export.load(tmp_path / "m-decoder.pt2").module()
    autoencoder = load_autoencoder(tmp_path / "vae", 4)
    for batch in (1, 3, 63):
        latents = torch.randn(batch, 4, 8, 8)
        # float32, through 20 convolutions
        torch.testing.assert_close(run(latents), decode(latents, autoencoder), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sample", "--model", "{}/m.onnx", "--budget", "0.3", "--precision", "bf16"], "its precision was decided"),
        (["sample", "--model", "{}/m.onnx", "--compile"], "its compile was decided"),
        (["sample", "--model", "{}/missing.onnx"], "there is no exported file"),
        (["analyze", "attention", "--model", "{}/m.onnx", "--data", "digits"], "samples of shape"),
        (["export", "--model", "{}/m.onnx", "--out", "{}/n.onnx"], "is an exported file already"),
        (["export", "--model", "{}/model", "--out", "{}/n.txt"], "ends in .pt2"),
        (["export", "--model", "{}/model", "--out", "{}/n.onnx", "--levels", "[3,9]"], "levels is [3, 9]"),
        (["export", "--model", "{}/model", "--out", "{}/n.onnx", "--format", "tflite"], "format"),
        (
            ["export", "--model", "{}/model", "--out", "{}/page", "--format", "web", "--guided"],
            "leave guided, batch",
        ),
    ],
)
def test_wrong_options_end_in_a_sentence(
    arguments: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(folder.iterdir())
    assert main([argument.format(folder) for argument in arguments]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert "Traceback" not in told
    assert sorted(folder.iterdir()) == before
