"""The experiment on retrofits, at a size where it shows nothing."""

import json
from functools import partial
from pathlib import Path

import pytest

pytest.importorskip("diffusers")

import retrofit
from elit.evaluation import train_classifier


def test_it_trains_distils_judges_and_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(retrofit, "train_classifier", partial(train_classifier, steps=2))
    monkeypatch.setattr(retrofit, "MARKS", (0, 2))
    monkeypatch.setattr(retrofit, "BUDGETS", (1.0, 0.125))
    monkeypatch.setattr(retrofit, "SAMPLES", 20)
    monkeypatch.setattr(retrofit, "SAMPLING_STEPS", 2)
    setting = retrofit.Setting(seeds=1, base_steps=3, batch_size=4, out=tmp_path)
    retrofit.run(setting)
    names = {path.stem for path in (tmp_path / "points").iterdir()}
    expected = {f"{start}-0-{mark}-{budget:g}" for start in retrofit.STARTS for mark in (0, 2) for budget in (1, 0.125)}
    assert names == expected | {"held-out", "base-1", "base-2"}
    of_base, of_start = (
        json.loads((tmp_path / f"points/{name}.json").read_text()) for name in ("base-2", "base-0-0-1")
    )
    assert of_base == of_start  # the start of the base, at full budget, is the base
    assert (tmp_path / "retrofit.png").exists() and (tmp_path / "results.json").exists()

    written = (tmp_path / "points/base-2.json").stat().st_mtime_ns
    capsys.readouterr()
    retrofit.run(setting)
    assert "step" not in capsys.readouterr().out.split("one forward")[0]
    assert (tmp_path / "points/base-2.json").stat().st_mtime_ns == written
