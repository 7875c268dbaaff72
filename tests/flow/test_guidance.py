"""Guidance against its definition, on a stand-in whose velocity is known and whose calls are written down."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

import elit
from elit import ElitError, Guidance
from elit.flow import time_grid
from tests.helpers.models import Recorder, tiny

NULL = 10


def answer(x: Tensor, t: Tensor, y: Tensor | None, budget: Tensor) -> Tensor:
    """Depends on everything: a guided velocity shows which terms went into it."""
    of_class = torch.zeros(len(x)) if y is None else (y.float() + 1).sin()
    rest = (of_class + 0.3 * budget * (t + 0.5)).view(-1, 1, 1, 1)
    return 0.2 * x * (1 + budget.view(-1, 1, 1, 1)) + rest


def each(budget: float | None) -> Tensor:
    """The budget of two samples."""
    return torch.full((2,), 1.0 if budget is None else budget)


def first_velocity(model: Recorder, labels: list[int] | None, **options: Any) -> tuple[Tensor, Tensor]:
    """Starting noise, and the velocity that one Euler step from t = 1 to 0 must have used."""
    noise = torch.randn(2, *model.input_shape())
    end = elit.sample(model, labels, noise=noise, steps=1, **options)
    return noise, noise - end


LABELS, ONES = [3, 7], torch.ones(2)
CLASSES, NULLS = torch.tensor(LABELS), torch.tensor([NULL, NULL])


@pytest.mark.parametrize("scale", [-1.0, 0.0, 0.5, 1.5, 4.0])
@pytest.mark.parametrize("budget", [None, 0.5])
@pytest.mark.parametrize(
    ("guidance", "weak_label", "weak_budget"),
    [
        (Guidance("cfg"), NULLS, "same"),
        (Guidance("ag"), CLASSES, 1 / 16),
        (Guidance("ag", budget=0.25), CLASSES, 0.25),
        (Guidance("ccfg"), NULLS, 1 / 16),
        (Guidance("ccfg", budget=0.25), NULLS, 0.25),
    ],
    ids=["cfg", "ag", "ag at a quarter", "ccfg", "ccfg at a quarter"],
)
def test_guidance_is_its_definition(
    guidance: Guidance, weak_label: Tensor, weak_budget: float | str, budget: float | None, scale: float
) -> None:
    """v_weak + w (v_cond - v_weak) at every w: cfg drops the class, ag lowers the budget, ccfg does both."""
    model = Recorder(answer)
    guided = Guidance(guidance.kind, scale, guidance.budget)
    noise, v = first_velocity(model, LABELS, budget=budget, guidance=guided)
    strong = answer(noise, ONES, CLASSES, each(budget))
    weak = answer(noise, ONES, weak_label, each(budget if weak_budget == "same" else weak_budget))  # type: ignore[arg-type]
    assert (strong - weak).abs().max() > 0.05
    torch.testing.assert_close(v, weak + scale * (strong - weak), rtol=0, atol=1e-5)  # float32 velocities


def test_no_guidance_is_the_model() -> None:
    model = Recorder(answer)
    noise, v = first_velocity(model, LABELS, budget=0.5)
    torch.testing.assert_close(v, answer(noise, ONES, CLASSES, each(0.5)), rtol=0, atol=1e-6)
    assert [(len(call.x), call.rows, call.levels) for call in model.calls] == [(2, [0, 1], [8, 8])]


@pytest.mark.parametrize("kind", ["cfg", "ag", "ccfg"])
def test_a_scale_of_one_is_off_and_costs_nothing(kind: Any) -> None:
    model = Recorder(answer)
    noise, v = first_velocity(model, LABELS, guidance=Guidance(kind, 1.0))
    torch.testing.assert_close(v, answer(noise, ONES, CLASSES, each(None)), rtol=0, atol=1e-6)
    assert [(len(call.x), call.rows) for call in model.calls] == [(2, [0, 1])]


def evaluations(**options: Any) -> list[tuple[float, int, dict[int, int]]]:
    """Of every evaluation, 8 samples in one batch: its time, how many were encoded, and how many went on at each level
    of 16."""
    model = Recorder(answer)
    elit.sample(model, [0] * 8, **options)
    return [(round(call.t[0].item(), 6), len(call.x), dict(Counter(call.levels))) for call in model.calls]


def test_terms_of_cfg_are_one_batch_those_of_ag_are_encoded_once_and_ccfg_is_two_calls() -> None:
    assert evaluations(steps=1, guidance=Guidance("cfg", 2.0), budget=0.5) == [(1.0, 16, {8: 16})]
    assert evaluations(steps=1, guidance=Guidance("ccfg", 2.0), budget=0.5) == [(1.0, 8, {8: 8}), (1.0, 8, {1: 8})]
    assert evaluations(steps=1, guidance=Guidance("ag", 2.0, 0.25)) == [(1.0, 8, {16: 8, 4: 8})]


def test_cfg_in_one_batch_is_two_passes() -> None:
    """Of a real model: each half of the joint batch is what a call of its own gives."""
    model = tiny()
    start, y = torch.randn(4, 3, 8, 8), torch.tensor([3, 0, 9, 3])
    scale = 3.0
    end = elit.sample(model, y, noise=start, steps=1, guidance=Guidance("cfg", scale), budget=0.5)
    ones = torch.ones(4)
    with torch.no_grad():
        strong, weak = model(start, ones, y, 0.5), model(start, ones, torch.full_like(y, NULL), 0.5)
    # float32 in batches of 4 and of 8: a few roundings of values of about 10, times the scale
    torch.testing.assert_close(start - end, weak + scale * (strong - weak), rtol=0, atol=1e-4)


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_the_interval_includes_its_ends_and_is_asked_at_each_evaluation(solver: str) -> None:
    calls = evaluations(steps=4, solver=solver, guidance=Guidance("cfg", 2.0, interval=(0.25, 0.75)))
    assert all(batch == (16 if 0.25 <= t <= 0.75 else 8) for t, batch, _ in calls)
    times = [1.0, 0.75, 0.5, 0.25] if solver == "euler" else [1.0, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25]
    assert [t for t, _, _ in calls] == times


def test_active_is_the_closed_interval() -> None:
    t = torch.tensor([0.0, 0.2, 0.20000001, 0.5, 0.8, 0.81, 1.0], dtype=torch.float64)
    assert Guidance("cfg", 2.0, interval=(0.2, 0.8)).active(t).tolist() == [False, True, True, True, True, False, False]
    assert Guidance("cfg", 2.0).active(t).all()
    assert not Guidance("cfg", 1.0).active(t).any()
    assert Guidance("cfg", 2.0, interval=(0.5, 0.5)).active(t).tolist() == [False] * 3 + [True] + [False] * 3


def test_every_step_has_its_own_budget() -> None:
    budgets = [1 / 16, 0.25, 0.5, 1.0]
    assert evaluations(steps=4, budget=budgets) == [(1 - i / 4, 8, {round(16 * b): 8}) for i, b in enumerate(budgets)]
    by_noise = elit.BudgetByNoise([0.5], [0.25, 1.0])
    assert [levels for _, _, levels in evaluations(steps=4, budget=by_noise)] == [{4: 8}, {4: 8}, {16: 8}, {16: 8}]
    assert [list(levels) for _, _, levels in evaluations(steps=4, budget=lambda t: t)] == [[16], [12], [8], [4]]
    # Heun evaluates twice within a step, both at the step's budget; the last step is Euler's
    calls = evaluations(steps=2, budget=[0.25, 0.5], solver="heun")
    assert calls == [(1.0, 8, {4: 8}), (0.5, 8, {4: 8}), (0.5, 8, {8: 8})]


def test_budgets_of_both_terms_go_their_own_ways() -> None:
    calls = evaluations(steps=2, budget=[0.5, 1.0], guidance=Guidance("ccfg", 2.0, budget=0.25))
    assert calls == [(1.0, 8, {8: 8}), (1.0, 8, {4: 8}), (0.5, 8, {16: 8}), (0.5, 8, {4: 8})]
    calls = evaluations(steps=2, budget=[0.5, 1.0], guidance=Guidance("cfg", 2.0))
    assert calls == [(1.0, 16, {8: 16}), (0.5, 16, {16: 16})]


def test_the_model_gets_its_own_dtype_and_float32_times() -> None:
    model = Recorder(answer).bfloat16()
    elit.sample(model, [0], steps=2)
    assert {(call.x.dtype, call.t.dtype) for call in model.calls} == {(torch.bfloat16, torch.float32)}
    assert time_grid("euler", 2).dtype == torch.float64


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"kind": "apg"}, "no guidance is named 'apg'; there are cfg, ccfg and ag"),
        ({"kind": "cfg", "budget": 0.5}, "cfg runs its weak term at the budget of the strong one"),
        ({"kind": "ccfg", "budget": 0}, "the guidance budget is 0; it must be a number in"),
        ({"kind": "ag", "budget": 1.5}, "the guidance budget is 1.5"),
        ({"kind": "ag", "budget": "abc"}, "the guidance budget is 'abc'"),
        ({"kind": "ag", "budget": True}, "the guidance budget is True"),
        ({"kind": "ag", "budget": float("nan")}, "the guidance budget is nan"),
        ({"interval": (0.6, 0.4)}, r"the guidance interval \(0.6, 0.4\) is not \(low, high\)"),
        ({"interval": (-0.1, 0.4)}, "the guidance interval"),
        ({"interval": (0.5, 1.1)}, "the guidance interval"),
        ({"interval": (0.5,)}, "the guidance interval"),
        ({"interval": (float("nan"), 1.0)}, "the guidance interval"),
        ({"scale": "strong"}, "the guidance scale is 'strong'"),
        ({"scale": float("nan")}, "the guidance scale is nan"),
        ({"scale": None}, "the guidance scale is None"),
    ],
)
def test_guidance_that_is_none_is_named(arguments: dict[str, Any], why: str) -> None:
    with pytest.raises(ElitError, match=why):
        Guidance(**arguments)


@pytest.mark.parametrize("kind", ["cfg", "ccfg"])
def test_a_model_without_classes_cannot_drop_one(kind: Any) -> None:
    with pytest.raises(ElitError, match=f"{kind} needs a class to drop, and this model has none; take ag"):
        elit.sample(Recorder(answer, num_classes=0), seeds=[0], guidance=Guidance(kind))


@pytest.mark.parametrize("kind", ["ag", "ccfg"])
def test_a_plain_model_has_no_lower_budget(kind: Any) -> None:
    with pytest.raises(ElitError, match=f"{kind} needs a model with a latent interface; take cfg"):
        elit.sample(Recorder(answer, elastic=False), [0], guidance=Guidance(kind))


def test_autoguidance_needs_no_class() -> None:
    model = Recorder(answer, num_classes=0)
    noise, v = first_velocity(model, None, guidance=Guidance("ag", 2.0, 0.25))
    strong, weak = answer(noise, ONES, None, each(None)), answer(noise, ONES, None, each(0.25))
    torch.testing.assert_close(v, weak + 2 * (strong - weak), rtol=0, atol=1e-5)
    assert [call.y for call in model.calls] == [None]
