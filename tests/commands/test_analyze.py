"""`elit analyze` from end to end, on tiny models: what is printed, written and drawn, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from diffusers import AutoencoderKL
from PIL import Image

from elit import cli
from elit.commands import inputs
from elit.evaluation import train_classifier
from elit.models import DFM, DFMConfig, MMDiT, MMDiTConfig
from elit.training import ModelChoice, TrainConfig, Trainer
from tests.helpers.models import TINY, randomize, tiny

FEW = ("--num-samples", "12")


@pytest.fixture(autouse=True)
def _quick_classifier(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "train_classifier", lambda data: train_classifier(data, steps=20))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model of the raw digits after three steps."""
    out = tmp_path_factory.mktemp("runs") / "digits8"
    fields = {"width": 32, "depth": 3, "num_heads": 2, "head_depth": 1, "tail_depth": 1, "group_size": 2}
    config = TrainConfig(str(out), data="digits8", model=ModelChoice("ELIT-DiT-S/1", fields), steps=3, batch_size=16)
    Trainer(config).run_to_end()
    return str(out)


def analyze(out: Path, *arguments: str) -> dict[str, Any]:
    """What the verb wrote; every picture that it drew is there twice."""
    assert cli.main(["analyze", *arguments, "--out", str(out)]) == 0
    pictures = list(out.glob("*.png"))
    assert all(min(Image.open(p).size) > 100 and p.with_suffix(".svg").exists() for p in pictures)
    return json.loads((out / f"{arguments[0]}.json").read_text())


def drawn(out: Path) -> set[str]:
    return {path.stem for path in out.glob("*.png")}


def test_budgets(run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--batch-sizes", "[1,3]", "--repeats", "2", "--steps", "2", "--threads", "1")
    result = analyze(tmp_path, "budgets", "--model", run, "--data", "digits8", *FEW, *options)
    every = [0.25, 0.5, 0.75, 1.0]
    assert [(row["batch_size"], row["budget"]) for row in result["costs"]] == [(n, b) for n in (1, 3) for b in every]
    assert all(row["flops"] == 2 * row["macs"] and row["peak_memory"] > 0 for row in result["costs"])
    assert [row["budget"] for row in result["held_out_loss"]] == every
    assert [row["setting"]["budget"] for row in result["samples"]] == every
    assert all(0 <= row["accuracy"] <= 1 and row["frechet_distance"] > 0 for row in result["samples"])
    assert result["settings"]["model"] == run
    assert result["environment"]["threads"] == 1
    kinds = {"cost", "loss", "accuracy", "frechet-distance", "samples"}
    assert drawn(tmp_path) == {f"budgets-{kind}" for kind in kinds}
    assert capsys.readouterr().out.splitlines()[-1].startswith("next: elit analyze steps --model")


def test_budgets_without_data(run: str, tmp_path: Path) -> None:
    result = analyze(tmp_path, "budgets", "--model", run, "--budgets", "[0.5]", "--repeats", "2", "--steps", "2")
    assert [row["setting"]["budget"] for row in result["samples"]] == [0.5, 1.0]
    assert "accuracy" not in result["samples"][0]
    assert result["held_out_loss"] == []
    assert drawn(tmp_path) == {"budgets-cost", "budgets-samples"}


def test_budgets_of_a_multi_scale_model(tmp_path: Path) -> None:
    fields = TINY.__dict__ | {"input_size": 16, "patch_size": 4}
    randomize(DFM(DFMConfig(**fields))).save_pretrained(tmp_path / "model")
    options = ("--budgets", "[0.25]", "--batch-sizes", "[2]", "--repeats", "2", "--steps", "2")
    result = analyze(tmp_path / "out", "budgets", "--model", str(tmp_path / "model"), *options)
    assert [row["num_latents"] for row in result["costs"]] == [1, 4]
    assert drawn(tmp_path / "out") == {"budgets-cost", "budgets-samples"}


def test_guidance(run: str, tmp_path: Path) -> None:
    options = ("--scales", "[1.5,3]", "--steps", "2", "--budget", "0.5")
    result = analyze(tmp_path, "guidance", "--model", run, "--data", "digits8", *FEW, *options)
    none, *guided = result["samples"]
    assert none["setting"]["guidance"] is None
    named = [(row["setting"]["guidance"]["kind"], row["setting"]["guidance"]["scale"]) for row in guided]
    assert named == [(kind, scale) for kind in ("cfg", "ag", "ccfg") for scale in (1.5, 3)]
    by_kind = {row["setting"]["guidance"]["kind"]: row["flops_per_step"] for row in guided}
    assert none["flops_per_step"] < by_kind["ag"] < by_kind["ccfg"] < by_kind["cfg"] == 2 * none["flops_per_step"]
    assert none["saturation"] is None  # grey
    assert drawn(tmp_path) == {"guidance-accuracy", "guidance-frechet-distance", "guidance-samples"}


def test_guidance_of_colours_without_data(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path / "model")
    options = ("--steps", "2", "--scales", "[2]", *FEW)
    result = analyze(tmp_path / "out", "guidance", "--model", str(tmp_path / "model"), *options)
    assert all(0 < row["saturation"] < 1 for row in result["samples"])
    assert drawn(tmp_path / "out") == {"guidance-saturation", "guidance-samples"}


def test_latents_are_decoded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, autoencoder, out = str(tmp_path / "model"), tmp_path / "autoencoder", tmp_path / "out"
    tiny(in_channels=4).save_pretrained(model)
    AutoencoderKL(latent_channels=4, block_out_channels=(4,), norm_num_groups=2).save_pretrained(autoencoder)
    options = ("--steps", "2", "--scales", "[2]", *FEW)
    assert cli.main(["analyze", "guidance", "--model", model, "--out", str(out), *options]) == 2
    assert "give --data for quality, or --autoencoder to see them" in capsys.readouterr().err
    result = analyze(out, "guidance", "--model", model, "--autoencoder", str(autoencoder), *options)
    assert all(row["saturation"] > 0 for row in result["samples"])


def test_steps(run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--steps", "[2,3]", "--budgets", "[0.25,0.5]")
    result = analyze(tmp_path, "steps", "--model", run, "--data", "digits8", *FEW, *options)
    settings = [(row["setting"]["steps"], row["setting"]["budget"]) for row in result["samples"]]
    assert [budget for _, budget in settings] == [0.25, 0.5, 1.0] * 2
    assert (settings[2][0], settings[5][0]) == (2, 3)
    assert settings[3][0] > 3
    distances = [row["frechet_distance"] for row in result["pareto_front"]]
    assert distances == sorted(distances, reverse=True)
    assert drawn(tmp_path) == {"steps-accuracy", "steps-frechet-distance", "steps-samples"}
    assert "within 10% of the lowest distance" in capsys.readouterr().out.splitlines()[-1]


def test_attention(run: str, tmp_path: Path) -> None:
    options = ("--times", "[0.3,0.6]", "--images", "8", "--draws", "2")
    result = analyze(tmp_path, "attention", "--model", run, "--data", "digits8", *options)
    assert [row["time"] for row in result["correlations"]] == [0.3, 0.6]
    for row in result["correlations"]:
        assert all(abs(row[name]["mean"]) <= 1 for name in ("same_image", "another_image", "entropy"))
    assert drawn(tmp_path) == {"attention-correlations", "attention-latents", "attention-maps"}


def test_attention_of_a_text_model(tmp_path: Path) -> None:
    fields = {"num_classes": 0, "text_width": 32, "input_size": 16, "in_channels": 1}
    randomize(MMDiT(MMDiTConfig(**(TINY.__dict__ | fields)))).save_pretrained(tmp_path / "text")
    options = ("--times", "[0.5]", "--images", "4", "--draws", "1", "--budget", "0.5")
    result = analyze(tmp_path, "attention", "--model", str(tmp_path / "text"), "--data", "captioned-digits", *options)
    assert result["correlations"][0]["entropy"] is None  # of two latents


def test_cost(run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fields = '{"depth": 6, "inner_depth": 2, "group_size": 4}'
    named = analyze(tmp_path, "cost", "--model", "ELIT-HDiT-S/2", "--resolution", "512", "--fields", fields)
    assert named["config"]["input_size"] == 64
    assert [row["num_latents"] for row in named["budgets"]] == [4, 8, 16]
    assert all(row["flops"] == sum(row["parts"].values()) for row in named["budgets"])
    saved = analyze(tmp_path, "cost", "--model", run)
    assert list(saved["budgets"][0]["parts"]) == ["encode", "read", "core", "decode"]
    assert "1 MAC = 2 FLOPs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("budgets", "--data", "digits"), "digits has samples of shape (1, 16, 16); the model makes (1, 8, 8)"),
        (("budgets", "--data", "nothing"), "no data set is named 'nothing'"),
        (("budgets", "--budgets", "[2]"), "budget is 2.0; it must be a number in (0, 1]"),
        (("budgets", "--num-samples", "1"), "num_samples and batch_size must be at least 10 and 1"),
        (("budgets", "--batch-sizes", "[0]"), "batch_sizes must be at least 1"),
        (("budgets", "--repeats", "1"), "repeats at least 2, not [1, 16] and 1"),
        (("guidance", "--scales", "[1,2]"), "give numbers above 1"),
        (("attention", "--data", "digits8", "--times", "[1.5]"), "times between 0 and 1"),
        (("attention",), "data"),
        (("steps", "--data", "digits8", "--steps", "[0]"), "steps is 0"),
        (("steps", "--data", "digits8", "--steps", "[]"), "give at least one number of steps"),
        (("cost", "--resolution", "256"), "resolution and fields are for named models"),
    ],
)
def test_refusals(
    run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], words: str
) -> None:
    assert cli.main(["analyze", *arguments, "--model", run, "--out", str(tmp_path)]) == 2
    sentence = capsys.readouterr().err.strip().splitlines()[-1]
    assert sentence.startswith("elit: ")
    assert words in sentence
    assert not list(tmp_path.iterdir())
