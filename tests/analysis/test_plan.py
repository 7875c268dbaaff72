"""The planner: its knapsack against all combinations, what it measures against samples, what it predicts and keeps."""

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import elit
from elit import Cache, Guidance
from elit.analysis import calibration as calibrating
from elit.analysis import count_flops, sampling_flops
from elit.analysis.calibration import STEPS, Calibration, GuidanceTable, StepTable, calibrate, choose_levels
from elit.analysis.plan import Plan, baseline_plans, constant_plan, knapsack, predict, solve
from elit.errors import ElitError
from elit.interface import InterfaceConfig
from elit.models import MMDiT, MMDiTConfig, Model
from elit.seeding import generator, normal
from tests.helpers.models import TINY, inputs, randomize, tiny

LABELS = [3, 1, 4]
CFG = Guidance("cfg", scale=2.5)


@pytest.fixture(scope="module", autouse=True)
def _few_rounds() -> Iterator[None]:
    """Times are not looked at here, so few of them do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrating, "TIMING_ROUNDS", 2)
        yield


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny()


@pytest.fixture(scope="module")
def plain(model: Model) -> Calibration:
    return calibrate(model, LABELS, num_samples=3)


@pytest.fixture(scope="module")
def guided(model: Model) -> Calibration:
    return calibrate(model, LABELS, num_samples=3, guidance=CFG)


def runs(steps: int) -> list[bool]:
    """The first step, every third one and the last run the core."""
    return [step % 3 == 0 or step == steps - 1 for step in range(steps)]


def made(seed: int = 0, guidance: Guidance | None = None) -> Calibration:
    """A calibration with random costs and errors, which fall and rise as they do in models."""
    rng = np.random.default_rng(seed)
    seconds = np.sort(rng.uniform(0.5, 2, 4)).tolist()
    errors = -np.sort(-rng.uniform(0.01, 1, (3, 3)))
    table = np.hstack([errors, np.zeros((3, 1))]).tolist()
    flops = [10, 20, 30, 40]
    return Calibration(
        levels=[1, 2, 3, 4],
        num_latents=4,
        times=[1.0, 0.6, 0.2],
        tables=[
            GuidanceTable(
                *(guidance, table, [2 * s for s in seconds], [2 * f for f in flops]),
                *([1.2 * s for s in seconds], [f + 2 for f in flops]),
            )
        ],
        seconds=seconds,
        flops=flops,
        seconds_skipped=[0.6 * s for s in seconds],
        flops_skipped=[f // 2 + 1 for f in flops],
        overhead=0.25,
        step_tables=[
            StepTable(None, [0.4, 0.2, 0.1, 0.05, 0.02], []),
            StepTable(Cache(0.1, 1), [0.4, 0.2, 0.12, 0.08, 0.07], [runs(steps) for steps in STEPS]),
        ],
        solver="euler",
        stamp={"path": "linear", "format": calibrating.FORMAT},
    )


@given(
    st.integers(1, 4).flatmap(
        lambda columns: st.lists(
            st.lists(st.tuples(st.integers(1, 40), st.floats(0, 1)), min_size=columns, max_size=columns),
            min_size=1,
            max_size=5,
        )
    )
)
def test_knapsack_finds_what_trying_everything_finds(rows: list[list[tuple[int, float]]]) -> None:
    """Costs are whole units, so nothing is rounded."""
    costs, errors = (np.array([[cell[i] for cell in row] for row in rows], dtype=float) for i in (0, 1))
    at = list(range(len(rows)))
    every = [list(c) for c in itertools.product(range(costs.shape[1]), repeat=len(rows))]
    fitting = [c for c in every if costs[at, c].sum() <= 60]
    chosen = knapsack(costs / 60, errors, units=60)
    if not fitting:
        assert chosen is None
        return
    assert chosen is not None
    assert costs[at, chosen].sum() <= 60
    assert errors[at, chosen].sum() == pytest.approx(min(errors[at, c].sum() for c in fitting))


def test_a_time_that_noise_made_negative_costs_nothing() -> None:
    costs, errors = np.array([[-0.02, 0.5], [0.3, 0.6]]), np.array([[0.4, 0.1], [0.8, 0.2]])
    assert knapsack(costs, errors) == [0, 1]


@given(st.integers(0, 10**6), st.floats(3, 60))
def test_plans_keep_their_cost_and_no_constant_budget_is_predicted_better(seed: int, limit: float) -> None:
    calibration = made(seed)
    try:
        plan = solve(calibration, limit)
    except ElitError:
        assert constant_plan(calibration, calibration.tables[0], 1, 4).seconds > limit * (1 - 1e-9)
        return
    assert plan.seconds <= limit * (1 + 1e-9)
    for other in baseline_plans(
        calibration, limit * (1 - 0.02), steps=10
    ).values():  # costs are rounded up by 64 / 4000
        if other.steps >= 4:
            assert plan.error <= other.error + 1e-12


def test_predictions_add_up_step_by_step() -> None:
    calibration = made(1, Guidance("cfg", 2.0, interval=(0.0, 0.6)))
    option = calibration.tables[0]
    plan = predict(calibration, option, [1, 2, 4, 3])  # at t = 1, 0.75, 0.5, 0.25: guided below 0.6
    columns = [0, 1, 3, 2]
    tables = (calibration.seconds, calibration.seconds, option.seconds, option.seconds)
    assert plan.seconds == pytest.approx(0.25 + sum(t[c] for t, c in zip(tables, columns, strict=True)))
    assert plan.flops == 10 + 20 + 80 + 60
    grid = torch.tensor(option.errors)
    between = [grid[0, 0], 0.375 * grid[0, 1] + 0.625 * grid[1, 1], 0 * grid[0, 0], grid[1, 2] / 8 + 7 * grid[2, 2] / 8]
    assert plan.error == pytest.approx(float(np.hypot(0.2, sum(between).item() / 4)))  # type: ignore[union-attr]
    assert calibration.step_tables[0].error(6) == pytest.approx(0.2 * (0.1 / 0.2) ** np.log2(6 / 4))
    assert plan.budgets == [0.25, 0.5, 1.0, 0.75]


def test_steps_that_skip_the_core_cost_less_and_keep_the_level_of_the_step_before() -> None:
    calibration = made(1)
    cached = calibration.step_tables[1]
    plan = predict(calibration, calibration.tables[0], [2, 2, 2, 4, 4, 4, 1], cached)  # 0, 3 and 6 run the core
    flops = calibration.flops, calibration.flops_skipped
    assert plan.flops == flops[0][1] + 2 * flops[1][1] + flops[0][3] + 2 * flops[1][3] + flops[0][0]
    assert plan.error > cached.error(7) > calibration.step_tables[0].error(7)
    assert plan.cache == plan.arguments()["cache"] == Cache(0.1, 1)
    chosen = [solve(made(seed), limit) for seed in range(8) for limit in (4, 6, 9, 14)]
    skipping = [plan for plan in chosen if plan.cache]
    assert skipping
    for plan in skipping:
        for step, ran in enumerate(runs(plan.steps)):
            assert ran or plan.budgets[step] == plan.budgets[step - 1]


def test_more_money_never_buys_a_worse_plan() -> None:
    errors = [solve(made(2), limit).error for limit in (4, 6, 9, 14, 20, 40, 90)]
    assert errors == sorted(errors, reverse=True)


def test_impossible_target_names_the_least_possible() -> None:
    with pytest.raises(ElitError, match=r"nothing costs 0\.04 GFLOPs or less; the least is 0\.08 GFLOPs: 4 steps"):
        solve(replace(made(), flops=[10**7 * f for f in (1, 2, 3, 4)], tables=[_scaled()]), 4e7, "flops")


def _scaled() -> GuidanceTable:
    doubled = [2 * 10**7 * f for f in (1, 2, 3, 4)]
    return replace(made().tables[0], guidance=Guidance("cfg"), flops=doubled, flops_skipped=doubled)


def test_error_of_a_step_is_what_it_does_to_samples(model: Model, plain: Calibration) -> None:
    """One step at the lowest level, the others at full budget, drawn by the sampler itself."""
    steps, low = calibrating.NOISE_LEVELS, plain.levels[0] / model.num_latents
    noise = normal(generator(0, "calibration"), (3, *model.input_shape()))
    draw = partial(elit.sample, model, LABELS, noise=noise, steps=steps)
    full = draw()
    for at in range(steps - 1):
        changed = draw(budget=[low if i == at else 1.0 for i in range(steps)])
        effect = (changed - full).pow(2).flatten(1).mean(1).sqrt().mean().item()
        # float32 samples that differ by little: 1 % of the effect, and of nothing else
        assert plain.tables[0].errors[at][0] / steps == pytest.approx(effect, rel=0.01)


def test_full_budget_has_no_error_and_guided_errors_follow_the_terms(model: Model, guided: Calibration) -> None:
    kinds = [(o.guidance.kind, o.guidance.budget) for o in guided.tables if o.guidance]
    assert kinds == [("cfg", None), *(("ccfg", level / model.num_latents) for level in guided.levels)]
    assert all(row[-1] == 0 for row in guided.tables[0].errors)
    last = guided.tables[-1].errors  # ccfg with a weak term at full budget: no error at full budget either
    assert all(row[-1] == pytest.approx(0, abs=1e-6) for row in last)
    assert all(error > 0 for option in guided.tables[:-1] for row in option.errors for error in row[:-1])


def test_cost_of_options(model: Model, guided: Calibration, plain: Calibration) -> None:
    assert guided.flops == plain.flops
    for option in guided.tables:
        assert option.guidance is not None
        weak = option.guidance.budget
        own = [count_flops(model.config, level).total for level in guided.levels]
        of_weak = None if weak is None else count_flops(model.config, model.level(weak)).total
        assert option.flops == [flops + (flops if of_weak is None else of_weak) for flops in own]
        assert len(option.seconds) == len(guided.levels)


@pytest.mark.parametrize("guidance", [CFG, Guidance("ag", 2.0), Guidance("ccfg", 2.0, interval=(0.2, 0.7))])
@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_flops_of_plans_are_those_of_sampling(model: Model, guidance: Guidance, solver: str) -> None:
    """Also where Heun's second evaluation is guided and its first is not."""
    calibration = calibrate(model, LABELS, num_samples=1, guidance=guidance, solver=solver)
    for table in calibration.tables:
        plan = predict(calibration, table, [1, 4, 2, 3, 4])
        assert plan.flops == sampling_flops(model, plan.steps, plan.budgets, plan.guidance, solver)
        for stepping in calibration.step_tables[1:]:
            levels = [1 + sum(stepping.runs(12)[: step + 1]) % 4 for step in range(12)]  # another one at every run
            plan = predict(calibration, table, levels, stepping)
            counted = sampling_flops(model, 12, plan.budgets, plan.guidance, solver, plan.cache)
            assert plan.flops == counted < predict(calibration, table, levels).flops


def test_seconds_of_every_pair_of_levels(monkeypatch: pytest.MonkeyPatch, model: Model) -> None:
    """The terms of cfg run as one batch, and the weak term of ccfg as a forward of its own."""
    strong, weak, both = {1: 5.0, 2: 6.5, 4: 9.0}, {1: 1.0, 2: 1.5, 4: 3.0}, {1: 5.5, 2: 7.5, 4: 11.0}
    ways = [CFG, *(Guidance("ccfg", 2.0, level / 4) for level in strong)]

    def steps(timer: Any, guidance: Guidance | None, levels: Sequence[int], skips_core: bool) -> list[float]:
        assert not skips_core
        if guidance is None or guidance.budget is None:
            return [(strong if guidance is None else both)[level] for level in levels]
        return [strong[level] + weak[int(4 * guidance.budget)] for level in levels]

    monkeypatch.setattr(calibrating._StepTimer, "_steps", steps)
    timer = calibrating._StepTimer(calibrating._Samples(model, LABELS, 1, "linear"))
    plain, guided = timer.measure(ways, (1, 2, 4))
    assert plain == list(strong.values())
    assert guided == [steps(timer, way, (1, 2, 4), False) for way in ways]


def test_only_trained_levels_are_measured_and_planned() -> None:
    """The highest need not be J."""
    model = tiny(interface=InterfaceConfig(2, levels=(1, 3)))
    calibration = calibrate(model, LABELS, num_samples=2, guidance=Guidance("ccfg", 2.0))
    assert (calibration.levels, calibration.num_latents) == ([1, 3], 4)
    assert calibration.tables[0].flops[1] == sum(count_flops(model.config, level).total for level in (3, 1))
    plan = solve(calibration, 1e12, "flops")
    assert set(plan.budgets) == {0.75}
    assert baseline_plans(calibration, 1e12, 8, "flops")["fewer steps"].budgets[0] == 0.75
    assert elit.sample(model, LABELS, **plan.arguments()).isfinite().all()


def test_a_stamp_tells_models_apart_that_have_the_same_weights() -> None:
    models = [tiny(), tiny(interface=InterfaceConfig(2, levels=(1, 4))), tiny(rope_theta=50.0)]
    models += [tiny(interface=InterfaceConfig(2, levels=(1, 4))).allow_untrained_levels()]
    stamps = [calibrating.calibration_stamp(model, 1, None, "euler", "linear", 0) for model in models]
    assert len({stamp["model"] for stamp in stamps}) == 1
    assert len({json.dumps(stamp) for stamp in stamps}) == 4


def test_files_of_another_version_are_refused(tmp_path: Path, plain: Calibration) -> None:
    plan = solve(plain, 1e12, "flops")
    for stamp in ({**plain.stamp, "format": 1}, {k: v for k, v in plain.stamp.items() if k != "format"}):
        replace(plain, stamp=stamp).save(tmp_path / "calibration.json")
        replace(plan, stamp=stamp).save(tmp_path / "plan.json")
        with pytest.raises(ElitError, match=r"calibration\.json was calibrated by another version of elit; delete it"):
            Calibration.load(tmp_path / "calibration.json")
        with pytest.raises(ElitError, match=r"plan\.json was planned by another version of elit; make it again"):
            Plan.load(tmp_path / "plan.json")


class InOnePiece(Model):
    """Runs a model as a whole, as an exported file does."""

    def __init__(self, model: Model) -> None:
        super().__init__(model.config)
        self.model, self.interface = model, model.interface

    def encode(self, x: Any, t: Any, y: Any = None) -> Any:
        return x, t, y

    def at_levels(self, encoded: Any, num_latents: Any, rows: Any = None) -> Any:
        assert rows is None
        return self.model(*encoded, num_latents=num_latents)


def test_a_model_in_one_piece_is_planned_without_caches(model: Model) -> None:
    whole = InOnePiece(model)
    calibration = calibrate(whole, LABELS, num_samples=2)
    assert [table.cache for table in calibration.step_tables] == [None]
    plan = solve(calibration, calibration.flops[0] * 8, "flops")
    assert torch.equal(elit.sample(whole, LABELS, **plan.arguments()), elit.sample(model, LABELS, **plan.arguments()))
    with pytest.raises(ElitError, match="this model has no parts: it is exported as a whole"):
        elit.sample(whole, LABELS, cache=Cache(0.1))


def test_autoguidance_keeps_its_weak_term(model: Model) -> None:
    calibration = calibrate(model, LABELS, num_samples=2, guidance=Guidance("ag", 2.0, budget=0.5))
    assert [o.guidance for o in calibration.tables] == [Guidance("ag", 2.0, budget=0.5)]


def test_models_of_text_are_planned() -> None:
    model = randomize(MMDiT(MMDiTConfig(**(TINY.__dict__ | {"num_classes": 0, "text_width": 32})))).eval()
    _, _, text = inputs(model, 3)
    calibration = calibrate(model, text, guidance=CFG, num_samples=2)
    plan = solve(calibration, calibration.tables[0].flops[0] * 6, "flops")
    assert elit.sample(model, text, seeds=[0, 1, 2], **plan.arguments()).isfinite().all()


def test_plan_and_calibration_survive_their_files(tmp_path: Path, model: Model, guided: Calibration) -> None:
    guided.save(tmp_path / "calibration.json")
    assert Calibration.load(tmp_path / "calibration.json") == guided
    plan = solve(guided, guided.tables[0].flops[-1] * 10, "flops")
    plan.save(tmp_path / "plan.json")
    read = Plan.load(tmp_path / "plan.json")
    assert read == plan
    noise = torch.randn(2, *model.input_shape())
    images = [elit.sample(model, [1, 2], noise=noise, **p.arguments()) for p in (plan, read)]
    assert torch.equal(*images)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"guidance": null}', '{"guidance": 3}'])
def test_damaged_files_are_told(tmp_path: Path, text: str) -> None:
    file = tmp_path / "x.json"
    file.write_text(text)
    with pytest.raises(ElitError, match="is no plan"):
        Plan.load(file)
    with pytest.raises(ElitError, match="is no calibration"):
        Calibration.load(file)


def test_what_cannot_be_planned_is_refused(model: Model) -> None:
    with pytest.raises(ElitError, match="latent interface"):
        calibrate(tiny(interface=None), LABELS)
    with pytest.raises(ElitError, match="deterministic"):
        calibrate(model, LABELS, solver="sde")
    with pytest.raises(ElitError, match="cannot read the plan"):
        Plan.load(Path("nowhere.json"))


@given(st.integers(1, 20), st.integers(20, 90))
def test_thinned_levels_keep_the_ends(first: int, last: int) -> None:
    levels = choose_levels(range(first, last + 1))
    assert levels[0] == first and levels[-1] == last
    assert len(levels) <= calibrating.MAX_LEVELS and sorted(set(levels)) == list(levels)
