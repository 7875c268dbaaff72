"""The experiments, at a size where they show nothing: that they run, continue, and measure what they say."""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import scipy.stats
import torch
from torch import Tensor

import common
import dropping
import joint
import padding
import photographs
import planning
import split
import steps
import windows
from common import ELASTIC, Setting
from elit.evaluation import Classifier, open_extractor, train_classifier
from elit.interface import LatentInterface
from elit.tensors import write_tensors
from tests.helpers.models import Recorder, inputs, tiny


@pytest.fixture(autouse=True)
def _few_crops(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(photographs, "TRAIN", 12)
    monkeypatch.setattr(photographs, "HELD_OUT", 4)
    photographs.photographs.cache_clear()
    yield
    photographs.photographs.cache_clear()


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    """One folder for all: experiments share their trainings."""
    return Setting(seeds=1, steps=1, width=32, out=tmp_path_factory.mktemp("experiments"))


def results(setting: Setting, name: str) -> dict[str, list[dict[str, list[float]]]]:
    assert (setting.out / f"{name}.png").stat().st_size > 0
    return json.loads((setting.out / f"{name}.json").read_text())["results"]


@pytest.mark.parametrize(
    ("experiment", "budgets"),
    [(dropping, [5, 5]), (joint, [5, 3]), (split, [5, 5, 5]), (windows, [5, 3, 5])],
    ids=lambda value: value.__name__ if isinstance(value, ModuleType) else "",
)
def test_every_series_has_a_loss_per_budget(experiment: ModuleType, budgets: list[int], setting: Setting) -> None:
    experiment.run(setting)
    series = results(setting, experiment.__name__)
    assert [len(points) for points in series.values()] == budgets
    losses = [loss for points in series.values() for point in points for loss in point["losses"]]
    assert len(losses) == sum(budgets)
    assert all(map(math.isfinite, losses))


def test_padding_costs_four_times_as_much_and_alike_for_both(setting: Setting) -> None:
    setting = replace(setting, width=64)
    padding.run(setting)
    found = results(setting, "padding")
    flops = torch.tensor([[point["flops"] for point in found[name]] for name in ("DiT", "ELIT")])
    assert (flops[:, 1] > 4 * flops[:, 0]).all()  # attention grows with the square
    assert (flops[1] / flops[0] - 1).abs().max() < 0.05


def test_mixes_of_a_cost_differ_by_less_than_a_step(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "CLASSIFIER_STEPS", 2)
    monkeypatch.setattr(steps, "FULL_STEPS", (2, 3))
    monkeypatch.setattr(steps, "MANY", 3)
    steps.run(setting, samples=3)
    mixes = results(setting, "steps")["mixes"]
    full = {mix["full_steps"]: mix["flops"] for mix in mixes if mix["budget"] == 1}
    for mix in mixes:
        assert abs(mix["flops"] - full[mix["full_steps"]]) <= mix["flops"] / mix["steps"] / 2


def test_a_training_is_not_repeated(setting: Setting) -> None:
    first = common.train(setting, ELASTIC, 0)
    files = {path: path.stat().st_mtime_ns for path in setting.out.rglob("*.safetensors")}
    again = common.train(setting, ELASTIC, 0)
    assert {path: path.stat().st_mtime_ns for path in setting.out.rglob("*.safetensors")} == files
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name


def test_half_width_is_that_of_a_t_test() -> None:
    values, others = torch.randn(2, 5, dtype=torch.float64).tolist()
    expected = scipy.stats.ttest_rel(values, others).confidence_interval(0.95)
    mean, half_width = common.above(values, others)
    assert (mean - half_width, mean + half_width) == pytest.approx(tuple(expected))


def patches(image: Tensor) -> set[bytes]:
    """All crops of an image (3, H, W)."""
    side = photographs.SIDE
    crops = image.unfold(1, side, 1).unfold(2, side, 1).permute(1, 2, 0, 3, 4).flatten(0, 1)
    return {crop.contiguous().numpy().tobytes() for crop in crops}


@pytest.mark.parametrize("held_out", [False, True])
def test_held_out_crops_lie_in_the_right_quarter_and_others_do_not(held_out: bool) -> None:
    data = photographs.photographs(held_out)
    for label, image in enumerate(photographs.whole()):
        edge = 3 * image.shape[2] // 4
        known = patches(image[:, :, edge:] if held_out else image[:, :, :edge])
        crops = data.images[data.labels == label]
        assert len(crops) == (4 if held_out else 12)
        assert all(crop.numpy().tobytes() in known for crop in crops)


def test_padding_changes_nothing_for_a_model_that_ignores_it() -> None:
    """The noise of the crop is the same with and without its border."""
    blind = Recorder(lambda x, t, y, budget: x.tanh(), elastic=False)
    assert padding.content_loss(blind, True) == pytest.approx(padding.content_loss(blind, False), rel=1e-6)


def velocity(order: list[int], level: int) -> Tensor:
    """Of a model that keeps the latents named first."""
    model = tiny(seed=3)
    model.interface.__class__ = dropping.RandomDropping
    model.interface.order = torch.tensor(order)
    return model(*inputs(model, 2, seed=4), budget=level / 4)


def test_random_dropping_keeps_the_latents_of_its_order() -> None:
    kept = velocity([2, 0, 3, 1], 2)
    same = torch.testing.assert_close
    same(kept, velocity([0, 2, 1, 3], 2))  # the core treats them as a set
    assert not torch.allclose(kept, velocity([0, 1, 2, 3], 2), atol=1e-3)
    plain = tiny(seed=3)
    for level in (1, 2, 3, 4):
        same(velocity([0, 1, 2, 3], level), plain(*inputs(plain, 2, seed=4), budget=level / 4))
    same(velocity([3, 1, 0, 2], 4), velocity([0, 1, 2, 3], 4))


def test_random_dropping_trains_on_other_latents_and_leaves_a_plain_model(setting: Setting) -> None:
    setting = replace(setting, steps=8)  # outputs and gates start at zero: latents learn nothing in the first steps
    tail, random = (common.train(setting, variant, 0) for variant in (ELASTIC, dropping.RANDOM))
    assert type(random.interface) is LatentInterface
    assert not torch.equal(tail.interface.latents, random.interface.latents)


def test_planning_compares_plans_of_the_same_cost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tensors(tmp_path / "weights.safetensors", Classifier(1, 10).state_dict())
    monkeypatch.setattr(planning, "train_classifier", partial(train_classifier, steps=3))
    monkeypatch.setattr(planning, "open_extractor", partial(open_extractor, weights=tmp_path / "weights.safetensors"))
    model = tiny(input_size=16, in_channels=1, patch_size=4)
    planning.run(model, tmp_path / "planning.json", steps=8, speedups=[2], seeds=2, num_samples=70, choice_samples=40)
    assert "1/2: chosen" in capsys.readouterr().out
    results = json.loads((tmp_path / "planning.json").read_text())["results"]
    full = {row["guidance"]: row["flops"] for row in results if row["name"] == "1: 8 steps"}
    rows = {(row["guidance"], row["name"]): row for row in results if row["name"] != "1: 8 steps"}
    assert full.keys() == {None, 2.0}
    for (guidance, _), row in rows.items():
        assert row["flops"] <= full[guidance] / 2 and len(row["by_seed"]) == 2
    for guidance in full:
        chosen, constant = (rows[guidance, f"1/2: {name}"] for name in ("chosen", "best constant by score"))
        candidates = chosen["choice"]["candidates"]
        assert chosen["budgets"] == next(
            row["budgets"] for row in candidates if row["name"] == chosen["choice"]["chosen"]
        )
        assert len(set(constant["budgets"])) == 1
        scores = {tuple(row["budgets"]): row["score"] for row in reversed(candidates) if len(set(row["budgets"])) == 1}
        assert scores[tuple(constant["budgets"])] >= candidates[0]["score"]
