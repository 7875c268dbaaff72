"""A choice by quality: who wins, who is dropped, what is told; with judges whose answers are known."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import elit
from elit.analysis import calibration as calibrating
from elit.analysis import candidate_plans, choose, solve
from elit.analysis.calibration import Calibration, calibrate
from elit.analysis.plan import Plan, baseline_plans
from elit.errors import ElitError
from elit.models import Model
from tests.helpers.models import tiny

LABELS = [3, 1, 4]


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny()


@pytest.fixture(scope="module")
def calibration(model: Model) -> Calibration:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrating, "TIMING_ROUNDS", 1)
        patch.setattr(calibrating, "REFERENCE_STEPS", 33)
        return calibrate(model, LABELS, num_samples=2, guidance=elit.Guidance("cfg", 2.0))


@pytest.fixture(scope="module")
def plan(calibration: Calibration) -> Plan:
    return replace(solve(calibration, 4 * calibration.tables[0].flops[-1], "flops"), guidance=None, cache=None)


class Likes:
    """Scores the mean distance of samples from those of one budget and number of steps, on the same noise."""

    name = "distance"

    def __init__(self, model: Model, plan: Plan) -> None:
        self.model, self.plan = model, plan
        self.seen: list[Tensor] = []

    def features(self, samples: Tensor) -> Tensor:
        self.seen.append(samples)
        return samples.flatten(1)

    def score(self, features: Tensor) -> tuple[float, Tensor]:
        labels = torch.arange(len(features)) % 3
        seeds = [10**12 + index for index in range(len(features))]
        wanted = elit.sample(self.model, torch.tensor(LABELS)[labels], seeds=seeds, **self.plan.arguments())
        distances = (features - wanted.flatten(1)).pow(2).mean(1).double()
        return distances.mean().item(), distances - distances.mean()

    def protocol(self) -> dict[str, Any]:
        return {"likes": self.plan.steps}


def with_budgets(plan: Plan, *budgets: float, error: float = 1.0) -> Plan:
    return replace(plan, budgets=list(budgets), flops=len(budgets), error=error)


def test_the_plan_that_the_judge_likes_wins_and_those_far_from_it_leave_early(model: Model, plan: Plan) -> None:
    plans = {
        "nearest": with_budgets(plan, 0.25, 0.25, error=0.1),
        "liked": with_budgets(plan, 1, 0.5, 0.25, error=0.3),
        "close": with_budgets(plan, 1, 0.5, 0.5, error=0.2),
        "far": with_budgets(plan, 1, error=0.4),
    }
    judge = Likes(model, plans["liked"])
    chosen = choose(model, LABELS, plans, judge, num_samples=40, batch_size=7)
    assert chosen.arguments() == plans["liked"].arguments() and plan.choice is None
    choice = chosen.choice
    assert choice is not None and (choice["chosen"], choice["protocol"]) == ("liked", {"likes": 3})
    rows = {row["name"]: row for row in choice["candidates"]}
    assert next(iter(rows)) == "liked" and rows.keys() == plans.keys()
    assert rows["liked"]["samples"] == 40 and rows["liked"]["above"] == 0
    assert rows["far"]["samples"] == 10 and rows["far"]["above"] > 3 * rows["far"]["standard_error"] > 0
    assert rows["close"]["budgets"] == [1, 0.5, 0.5]
    assert torch.cat(judge.seen).isfinite().all()


def test_of_equally_good_plans_one_budget_wins(model: Model, plan: Plan) -> None:
    """Budgets that change have to show that they are better. For the model 0.26 is 0.25: the samples are the same."""
    constant = with_budgets(plan, 0.25, 0.25, error=0.2)
    plans = {"changing": with_budgets(plan, 0.25, 0.26, error=0.1), "constant": constant}
    chosen = choose(model, LABELS, plans, Likes(model, constant), num_samples=40)
    assert chosen.choice is not None and chosen.choice["chosen"] == "constant"


def test_of_equally_good_plans_the_nearest_to_the_full_model_wins(model: Model, plan: Plan) -> None:
    same = 1.0, 0.5
    plans = {"far": with_budgets(plan, *same, error=0.2), "near": with_budgets(plan, *same, error=0.1)}
    for names in (("far", "near"), ("near", "far")):
        chosen = choose(model, LABELS, {n: plans[n] for n in names}, Likes(model, plans["far"]), num_samples=40)
        assert chosen.choice is not None and chosen.choice["chosen"] == "near"


def test_noise_is_a_function_of_the_seed_and_not_that_of_other_samples(model: Model, plan: Plan) -> None:
    def seen(seed: int, batch_size: int) -> Tensor:
        judge = Likes(model, plan)
        choose(model, LABELS, {"one": plan}, judge, num_samples=40, seed=seed, batch_size=batch_size)
        return torch.cat(judge.seen)

    torch.testing.assert_close(seen(0, 40), seen(0, 7))  # rounding of the matrix kernels
    assert not torch.isclose(seen(0, 40), seen(1, 40)).all(dim=(1, 2, 3)).any()
    ours = elit.sample(model, [LABELS[i % 3] for i in range(40)], **plan.arguments())
    assert not torch.isclose(ours, seen(0, 40)).all(dim=(1, 2, 3)).any()


def test_candidates_keep_the_cost_and_are_different(calibration: Calibration) -> None:
    limit = 8.0 * calibration.tables[0].flops[-1]
    found = candidate_plans(calibration, limit, 8, "flops")
    plans = list(found.values())
    assert all(plan.flops <= limit and plan.steps >= 4 for plan in plans)
    assert found["least error"] == solve(calibration, limit, "flops")
    for other in baseline_plans(calibration, limit, 8, "flops").values():
        assert any(other.budgets == plan.budgets for plan in plans)
    assert len({(tuple(p.budgets), p.guidance, p.flops) for p in plans}) == len(plans)
    assert {plan.steps for plan in plans} >= {4, 8}
    assert any(p.guidance is not None and p.guidance.budget == 0.25 for p in plans)
    seconds = candidate_plans(calibration, max(plan.seconds for plan in plans), 8)
    assert seconds and all(plan.seconds <= max(p.seconds for p in plans) for plan in seconds.values())
    with pytest.raises(ElitError, match=r"nothing costs .* or less; the least is"):
        candidate_plans(calibration, 1, 8, "flops")


def test_a_choice_survives_its_file(tmp_path: Path, model: Model, plan: Plan) -> None:
    chosen = choose(model, LABELS, {"one": plan}, Likes(model, plan), num_samples=40)
    chosen.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == chosen


def test_wrong_choices_are_told(model: Model, plan: Plan) -> None:
    with pytest.raises(ElitError, match="num_samples is 39; a choice by quality needs at least 40"):
        choose(model, LABELS, {"one": plan}, Likes(model, plan), num_samples=39)
    with pytest.raises(ElitError, match="there are no plans to choose from"):
        choose(model, LABELS, {}, Likes(model, plan))
