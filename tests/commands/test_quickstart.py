"""The first run, shortened: everything that `make quickstart` shows, from a few training steps."""

import base64
import json
import re
from pathlib import Path

import pytest

from elit.commands import quickstart as module
from elit.errors import ElitError


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quickstart")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "NUM_SAMPLES", 40)
        patch.setattr(module, "SAMPLING_STEPS", 2)
        patch.setattr(module, "train_classifier", lambda data, seed: _classifier(data, seed))
        module.quickstart(folder, minutes=0.02)
    return folder


def _classifier(data, seed):  # type: ignore[no-untyped-def]
    from elit.evaluation import train_classifier

    return train_classifier(data, seed, steps=30)


def test_numbers(out: Path) -> None:
    results = json.loads((out / "results.json").read_text())
    assert [row["num_latents"] for row in results["costs"]] == [1, 2, 4, 8, 16]
    assert all(row["flops"] == 2 * row["macs"] for row in results["costs"])
    assert results["costs"][-1]["elastic_efficiency"] == 1
    assert results["held_out_loss"][-1]["excess"] == 0
    none, cfg, ccfg = (results["quality"][k] for k in ("none", "cfg", "ccfg"))
    assert cfg[-1]["flops_per_image"] == 2 * none[-1]["flops_per_image"]
    assert ccfg[-1]["flops_per_image"] == none[-1]["flops_per_image"] + none[0]["flops_per_image"]
    assert ccfg[0]["frechet_distance"] == pytest.approx(cfg[0]["frechet_distance"], rel=1e-4)  # one batch or two
    assert set(results["attention"]) == {"same image", "another image"}
    assert results["training"]["config"]["steps"] >= 20


def test_a_run_that_is_there_keeps_its_steps(out: Path, tmp_path: Path) -> None:
    steps = json.loads((out / "results.json").read_text())["training"]["config"]["steps"]
    assert module.steps_of(str(out / "run")) == steps
    assert module.steps_of(str(tmp_path)) is None


@pytest.mark.parametrize("minutes", [0.0, -1.0, float("inf"), float("nan")])
def test_minutes_must_be_above_0(tmp_path: Path, minutes: float) -> None:
    with pytest.raises(ElitError, match="must be above 0, and finite"):
        module.quickstart(tmp_path, minutes=minutes)


def test_page_shows_every_picture_and_number(out: Path) -> None:
    """The page holds the very files that lie beside it, and the numbers of results.json in its tables."""
    page = (out / "report.html").read_text()
    shown = {path.stem for path in out.glob("*.png") if base64.b64encode(path.read_bytes()).decode() in page}
    assert shown == {path.stem for path in out.glob("*.png")} - {"overview"}  # the picture of the README
    assert {"samples-none", "samples-cfg", "samples-ccfg", "budget-cost", "budget-loss", "attention"} <= shown
    cells = [re.findall(r"<td>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", page)]
    results = json.loads((out / "results.json").read_text())
    costs, losses = results["costs"], results["held_out_loss"]
    expected = [
        [str(c["num_latents"]), f"{c['flops'] / 1e6:.1f}", f"{x['loss']:.4f}"]
        for c, x in zip(costs, losses, strict=True)
    ]
    assert [[row[1], row[2], row[9]] for row in cells if len(row) == 11] == expected
    qualities = [row for rows in results["quality"].values() for row in rows] + list(results["references"].values())
    assert [row[4] for row in cells if len(row) == 5] == [f"{row['frechet_distance']:.2f}" for row in qualities]
    share, above = costs[2]["flops_ratio"], losses[2]["loss"] / losses[-1]["loss"] - 1
    assert f"takes {share:.0%} of the FLOPs" in page and f"the held-out loss is {abs(above):.0%}" in page
    assert ["samples", f"{results['copying']['samples']:.3f}"] in [row[:2] for row in cells]
