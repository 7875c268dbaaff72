"""The first run, shortened: everything that `make quickstart` shows, from a few training steps."""

import json
from pathlib import Path

import pytest
from PIL import Image

from elit.commands import quickstart as module
from elit.commands.report import reading


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


def test_page_and_pictures(out: Path) -> None:
    page = (out / "report.html").read_text()
    results = json.loads((out / "results.json").read_text())
    assert page.count("data:image/png;base64,") == 8
    assert all(paragraph in page for paragraph in reading(results))
    assert f"{results['costs'][0]['flops'] / 1e6:.1f}" in page
    pictures = sorted(out.glob("*.png"))
    assert len(pictures) == 9
    assert all(min(Image.open(p).size) > 200 and p.with_suffix(".svg").exists() for p in pictures)


def test_reading_follows_the_numbers(out: Path) -> None:
    results = json.loads((out / "results.json").read_text())
    for row in results["held_out_loss"]:
        row["excess"], row["excess_standard_error"] = 0.0, 1.0
    results["copying"]["samples nearer than 99 % of held-out images"] = 0.5
    text = " ".join(reading(results))
    assert "No difference is clear" in text
    assert "Some samples are close to training images" in text
    results["held_out_loss"][0] |= {"excess": 0.1, "excess_standard_error": 0.001}
    assert "That is clear at 1/16, and small" in " ".join(reading(results))
