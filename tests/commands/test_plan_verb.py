"""`elit plan` and `elit sample --plan`, as a user runs them."""

import json
from pathlib import Path

import pytest
from PIL import Image

from elit.analysis import calibration
from elit.analysis.plan import Plan
from elit.cli import main
from elit.commands.plan import PlanOptions, make_plan
from elit.errors import ElitError
from elit.evaluation.classifier import Classifier
from elit.tensors import write_tensors
from tests.helpers.models import tiny


@pytest.fixture(autouse=True)
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer steps of everything that is measured, in a cache of the test's own."""
    monkeypatch.setenv("ELIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(calibration, "STEP_COUNTS", (2, 4, 8))
    monkeypatch.setattr(calibration, "REFERENCE_STEPS", 12)
    monkeypatch.setattr(calibration, "TIMING_ROUNDS", 2)


@pytest.fixture
def saved(tmp_path: Path) -> str:
    tiny().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_planned_samples(tmp_path: Path, saved: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "plan.json"
    command = ["plan", "--model", saved, "--gflops", "0.02", "--guidance-scale", "2", "--steps", "8", "--out", str(out)]
    assert main(command) == 0
    told = capsys.readouterr().out
    assert "target 0.02 GFLOPs" in told and "calibrated" in told and f"--plan {out}" in told
    found = Plan.load(out)
    assert found.flops <= 0.02e9
    assert found.guidance is not None and found.guidance.scale == 2
    results = json.loads((tmp_path / "plan-results.json").read_text())
    assert [row["name"] for row in results["rows"]][:2] == ["full budget", "plan"]
    assert all(row["seconds"] > 0 and row["error"] >= 0 for row in results["rows"])
    assert (tmp_path / "plan.png").stat().st_size and (tmp_path / "plan.svg").stat().st_size

    assert (
        main(["sample", "--model", saved, "--plan", str(out), "--num-images", "3", "--out", str(tmp_path / "x.png")])
        == 0
    )
    settings = json.loads(Image.open(tmp_path / "x.png").info["elit"])
    assert settings["steps"] == found.steps and settings["budget"] == found.budgets

    assert main([*command, "--measure", "false"]) == 0
    assert "calibration of" in capsys.readouterr().out  # not measured again
    assert main([*command[:3], "--gflops", "1e-6"]) == 2
    assert "nothing costs 1e-06 GFLOPs or less; the least is" in capsys.readouterr().err


def test_plan_in_a_folder_is_one_of_its_settings(tmp_path: Path, saved: str) -> None:
    # half of 64 steps: a busy machine may mistake the latency of a step by much, and there is still a plan
    make_plan(PlanOptions(model=saved, speedup=2, steps=64, measure=False, out=tmp_path / "plan.json"))
    command = ["sample", "--model", saved, "--out", str(tmp_path / "folder"), "--num-images", "2", "--batch-size", "2"]
    assert main([*command, "--plan", str(tmp_path / "plan.json")]) == 0
    settings = json.loads((tmp_path / "folder" / "settings.json").read_text())
    assert settings["budget"] == Plan.load(tmp_path / "plan.json").budgets
    assert main([*command, "--steps", "8"]) == 2  # other images


@pytest.fixture
def judge(tmp_path: Path) -> list[str]:
    """The options of a choice by quality, with a classifier of random weights."""
    weights = tmp_path / "weights.safetensors"
    write_tensors(weights, Classifier(1, 10).state_dict())
    return ["--reference", "digits8:held-out", "--extractor", "digits8", "--extractor-weights", str(weights)]


@pytest.mark.parametrize("target", [["--gflops", "0.02"], ["--speedup", "1"]])
def test_a_plan_chosen_by_quality(
    tmp_path: Path, saved: str, judge: list[str], target: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "plan.json"
    command = ["plan", "--model", saved, *target, "--steps", "8", "--num-samples", "40", "--measure", "false"]
    assert main([*command, *judge, "--out", str(out)]) == 0
    captured = capsys.readouterr()
    found = Plan.load(out)
    assert found.choice is not None
    rows = {row["name"]: row for row in found.choice["candidates"]}
    chosen = rows[found.choice["chosen"]]
    assert chosen["budgets"] == found.budgets and chosen["flops"] == found.flops
    assert min(row["score"] for row in rows.values() if row["samples"] == 40) >= chosen["score"] - chosen["above"]
    assert "least error" in rows and len(rows) > 2
    assert found.choice["protocol"]["extractor"] == "digits8"
    assert found.choice["protocol"]["reference_source"] == "digits8:held-out"
    assert "chosen by frechet_distance" in captured.out and f"chosen: {found.choice['chosen']}; " in captured.out
    assert "40 samples are too few for 64 features" in captured.out
    assert f"--plan {out}" in captured.out.splitlines()[-1]
    assert "choosing" in captured.err  # the bar
    results = json.loads((tmp_path / "plan-results.json").read_text())
    beside = [] if found.choice["chosen"] == "least error" else ["least error"]
    assert [row["name"] for row in results["rows"]][: 2 + len(beside)] == ["full budget", "plan", *beside]
    assert results["rows"][1]["plan"]["budgets"] == found.budgets
    assert list((tmp_path / "cache" / "features").iterdir())  # of the reference, as elit evaluate keeps them

    if "--gflops" in target:
        assert found.flops <= 0.02e9
        assert main([*command, "--out", str(tmp_path / "nearest.json")]) == 0  # without a judge: the least error
        nearest = Plan.load(tmp_path / "nearest.json")
        assert nearest.choice is None and nearest.error == rows["least error"]["error"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            ["--extractor", "digits8"],
            "extractor is given without a reference; add --reference, or leave --extractor out",
        ),
        (["--reference", "nowhere"], "there is nothing at nowhere"),
        (["--reference", "digits8", "--num-samples", "39"], "a choice by quality needs at least 40"),
        (["--reference", "digits8", "--extractor-weights", "nowhere"], "nowhere"),
    ],
)
def test_wrong_options_of_a_choice_are_told(
    tmp_path: Path, saved: str, judge: list[str], options: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = options if "--reference" not in options else [*judge, *options]
    assert main(["plan", "--model", saved, "--gflops", "0.02", "--out", str(tmp_path / "x.json"), *given]) == 2
    error = capsys.readouterr().err
    assert told in error and "Traceback" not in error
    assert not (tmp_path / "x.json").exists()


def test_missing_weights_of_an_extractor_are_told_with_the_option_that_names_them(
    saved: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch_fidelity")
    given = ["--reference", "digits8", "--extractor-weights", "nowhere.pth"]
    assert main(["plan", "--model", saved, "--gflops", "0.02", *given]) == 2
    error = capsys.readouterr().err
    assert "nowhere.pth does not hold the weights of Inception" in error and "with --extractor-weights" in error


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, "give one target"),
        ({"gflops": 1.0, "speedup": 2.0}, "give one target"),
        ({"speedup": -1.0}, "speedup is -1.0; it must be a number above 0"),
        ({"speedup": 2.0, "guidance_budget": 0.25}, "guidance_budget is given without guidance"),
        ({"speedup": 2.0, "min_steps": 100}, "plans have up to 64 steps"),
        ({"speedup": 2.0, "data": "digits"}, "digits has samples of shape"),
    ],
)
def test_wrong_options_are_told(saved: str, options: dict[str, float], told: str) -> None:
    with pytest.raises(ElitError, match=told):
        make_plan(PlanOptions(model=saved, **options))  # type: ignore[arg-type]


def test_plan_of_another_model_and_options_beside_a_plan_are_refused(
    tmp_path: Path, saved: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make_plan(PlanOptions(model=saved, speedup=2, steps=64, measure=False, out=tmp_path / "plan.json"))
    tiny(seed=1).save_pretrained(tmp_path / "other")
    command = ["sample", "--plan", str(tmp_path / "plan.json"), "--out", str(tmp_path / "x.png")]
    assert main([*command, "--model", str(tmp_path / "other")]) == 2
    assert "was made for other weights" in capsys.readouterr().err
    assert main([*command, "--model", saved, "--steps", "3"]) == 2
    assert "leave --steps out" in capsys.readouterr().err
    assert main([*command[:1], "--plan", "nowhere.json", "--model", saved]) == 2
    assert "cannot read the plan nowhere.json" in capsys.readouterr().err
    assert not (tmp_path / "x.png").exists()
