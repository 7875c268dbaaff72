"""Which budgets the verbs take and show, of a model that was trained for two of its four levels."""

import json
from pathlib import Path

import pytest

from elit.cli import main
from elit.interface import InterfaceConfig
from tests.helpers.models import tiny


@pytest.fixture
def saved(tmp_path: Path) -> str:
    tiny(interface=InterfaceConfig(group_size=2, levels=(2, 4))).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.mark.parametrize(
    "options",
    [
        ("sample", "--budget", "0.25"),
        ("sample", "--budget", "0.25,1"),
        ("sample", "--guidance", "ccfg", "--guidance-budget", "0.25"),
        ("plan", "--speedup", "2", "--guidance", "ccfg", "--guidance-budget", "0.25"),
        ("analyze", "budgets", "--budgets", "[0.25]"),
        ("analyze", "guidance", "--budget", "0.25"),
    ],
    ids=" ".join,
)
def test_a_budget_that_was_not_trained_is_refused(
    options: tuple[str, ...], saved: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = ("--steps", "2") if "--speedup" not in options else ()
    assert main([*options, *steps, "--model", saved, "--out", str(tmp_path / "out.png")]) == 2
    sentence = capsys.readouterr().err.strip().splitlines()[-1]
    assert "trained with 2 and 4: take at least 0.5" in sentence
    assert not (tmp_path / "out.png").exists()


def test_the_curious_may_use_it(saved: str, tmp_path: Path) -> None:
    command = ["sample", "--model", saved, "--steps", "2", "--num-images", "2", "--batch-size", "2"]
    curious = [*command, "--untrained-levels", "--budget", "0.25", "--out", str(tmp_path / "folder")]
    assert main(curious) == 0
    assert json.loads((tmp_path / "folder" / "settings.json").read_text())["untrained_levels"] is True
    options = ("--budgets", "[0.25]", "--batch-sizes", "[1]", "--repeats", "2", "--steps", "2", "--untrained-levels")
    assert main(["analyze", "budgets", "--model", saved, *options, "--out", str(tmp_path / "out")]) == 0
    result = json.loads((tmp_path / "out" / "budgets.json").read_text())
    assert [row["num_latents"] for row in result["costs"]] == [1, 4]
    assert result["costs"][0]["flops"] < result["costs"][1]["flops"]


def test_only_trained_levels_are_shown(saved: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", saved]) == 0
    shown = capsys.readouterr().out
    assert "4 windows of 2x2 tokens, 2 and 4 of 4 latents each (2 budgets)" in shown
    assert "0.25" not in shown
    for verb, options in (("budgets", ("--repeats", "2", "--batch-sizes", "[1]", "--steps", "2")), ("cost", ())):
        assert main(["analyze", verb, "--model", saved, *options, "--out", str(tmp_path / "out")]) == 0
    costs = json.loads((tmp_path / "out" / "budgets.json").read_text())["costs"]
    formula = json.loads((tmp_path / "out" / "cost.json").read_text())["budgets"]
    assert [row["num_latents"] for row in costs] == [row["num_latents"] for row in formula] == [2, 4]
