"""Samples that share a batch, each with its own budget, steps, guidance, solver and text, are those drawn alone."""

from typing import Any

import pytest
import torch
from torch import Tensor

import elit
from elit import ElitError, Guidance
from elit.conditions import Text
from elit.flow import PATHS, SOLVERS, StageSchedule
from elit.models import Model
from tests.helpers.models import Recorder, inputs, of, tiny
from tests.helpers.stacks import KINDS

every_kind = pytest.mark.parametrize("kind", KINDS)
every_solver = pytest.mark.parametrize("solver", SOLVERS)
SEEDS, STEPS = [5, 0, 123456789012, 7], [3, 5, 3, 4]
BUDGETS = torch.tensor([1.0, 0.25, 0.75, 0.5])
GUIDANCE = [None, Guidance("cfg", 2.0, interval=(0.3, 1.0)), Guidance("ccfg", 0.5, 0.25), Guidance("ag", 3.0)]


def prepared(kind: str) -> tuple[Any, Any, list[Guidance | None]]:
    """A model in float64, where the order of sums shows at 1e-14; conditions of four samples; guidance it can take."""
    model = KINDS[kind]().double()
    if not model.conditional:
        return model, None, [None, Guidance("ag", 2.0, 0.5), Guidance("ag", 0.5, 0.25), Guidance("ag", 3.0)]
    y = inputs(model, 4, dtype=torch.float64)[2]
    if isinstance(y, Text):
        y = y._replace(mask=torch.arange(6) < torch.tensor([[2], [6], [3], [5]]))
        return model, y, list(GUIDANCE)
    return model, y.clamp(max=9), list(GUIDANCE)


def alone(model: Model, y: Any, i: int, **options: Any) -> Tensor:
    """Sample i, drawn in a batch of one."""
    return elit.sample(model, None if y is None else own(y, i), seeds=[SEEDS[i]], **options)


def own(y: Any, i: int) -> Any:
    """The condition of sample i; of text its own words, without the padding up to the longest."""
    condition = of(y, [i])
    if not isinstance(condition, Text):
        return condition
    length = int(condition.mask.sum())
    return Text(condition.tokens[:, :length], condition.mask[:, :length])


def assert_near(found: Tensor, wanted: Tensor) -> None:
    """Equal within 1e-6 of the largest value. Velocities are float64; samples are rounded to float32, 6e-8."""
    assert wanted.isfinite().all()
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6 * wanted.abs().max().item())


# ------------------------------------------------------------------------------------------------ elit.sample


@every_kind
@every_solver
def test_every_sample_has_its_own_budget_steps_and_guidance(kind: str, solver: str) -> None:
    model, y, guidance = prepared(kind)
    told = {"solver": solver}
    together = elit.sample(model, y, seeds=SEEDS, steps=STEPS, budget=BUDGETS, guidance=guidance, **told)
    in_pairs = elit.sample(model, y, seeds=SEEDS, steps=STEPS, budget=BUDGETS, guidance=guidance, batch_size=2, **told)
    assert_near(in_pairs, together)
    for i, budget in enumerate(BUDGETS.tolist()):
        expected = alone(model, y, i, steps=STEPS[i], budget=budget, guidance=guidance[i], **told)
        assert_near(together[[i]], expected)
        for other in ({"steps": STEPS[i] + 1}, {"budget": 0.25 if i != 1 else 1.0}, {"guidance": Guidance("ag", 5.0)}):
            changed = {"steps": STEPS[i], "budget": budget, "guidance": guidance[i]} | other
            assert (alone(model, y, i, **changed, **told) - expected).abs().max() > 1e-4  # each setting counts


@every_kind
@every_solver
def test_every_sample_has_its_own_budget_at_each_step(kind: str, solver: str) -> None:
    model, y, guidance = prepared(kind)
    draws = torch.Generator().manual_seed(1)
    budgets = torch.randint(1, 5, (4, 5), generator=draws) / 4  # as many columns as the longest has steps
    together = elit.sample(model, y, seeds=SEEDS, steps=STEPS, solver=solver, budget=budgets, guidance=guidance)
    for i, steps in enumerate(STEPS):
        told = {"steps": steps, "solver": solver, "guidance": guidance[i]}
        assert_near(together[[i]], alone(model, y, i, budget=budgets[i, :steps].tolist(), **told))


def test_stages_have_schedules_of_their_own() -> None:
    model, y, _ = prepared("ELIT-DFM")
    schedules = [StageSchedule([2, 2], [0.2]), 4, StageSchedule([1, 3], [0.5]), StageSchedule([3, 2], [0.0])]
    together = elit.sample(model, y, seeds=SEEDS, steps=schedules, budget=BUDGETS)
    for i, schedule in enumerate(schedules):
        assert_near(together[[i]], alone(model, y, i, steps=schedule, budget=BUDGETS[i].item()))


def test_a_budget_by_noise_is_asked_at_the_times_of_each_sample() -> None:
    model, y, _ = prepared("ELIT-DiT")
    schedule = elit.BudgetByNoise([0.5], [0.25, 1.0])
    together = elit.sample(model, y, seeds=SEEDS, steps=STEPS, budget=schedule)
    for i, steps in enumerate(STEPS):
        assert_near(together[[i]], alone(model, y, i, steps=steps, budget=schedule))


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"steps": [3, 4]}, "steps lists 2 values for 4 samples; give one per sample, or one for all"),
        ({"guidance": [None] * 5}, "guidance lists 5 values for 4 samples; give one per sample, or one for all"),
        ({"budget": torch.ones(3)}, r"budget is a tensor of shape \(3,\); for 4 samples of 3 steps give \(4,\) or"),
        ({"budget": torch.ones(4, 2)}, r"tensor of shape \(4, 2\); for 4 samples of 3 steps give \(4,\) or \(4, 3\)"),
        ({"budget": torch.ones(4, 3), "steps": [3, 3, 4, 3]}, r"shape \(4, 3\); for 4 samples of 4 steps"),
        ({"budget": [0.5] * 4}, "budget lists 4 values for 3 sampling steps; give one per step"),
        ({"budget": torch.tensor([1.0, 0.5, 0.0, 1.0])}, r"budget is 0\.0; it must be a number in"),
        ({"steps": [3, 4, 0, 3]}, "steps is 0; it must be a whole number"),
        ({"seeds": SEEDS[:3]}, "one of each per sample, not 4 labels, 3 seeds"),
    ],
)
def test_another_number_than_of_samples_is_named(given: dict[str, Any], why: str) -> None:
    for start in (elit.sample, elit.trajectories):
        with pytest.raises(ElitError, match=why) as caught:
            start(tiny(), [1, 2, 3, 4], **({"steps": 3} | given))
        assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------ trajectories


@every_kind
def test_trajectories_may_join_late_and_leave_early(kind: str) -> None:
    """Other solvers, times, step counts, levels, guidance and lengths of text in one batch; each is its sample."""
    model, y, guidance = prepared(kind)
    solvers = ["euler", "heun", "sde", "heun"]
    options = [
        {"steps": STEPS[i], "solver": solvers[i], "budget": BUDGETS[i].item(), "guidance": guidance[i]}
        for i in range(4)
    ]
    expected = [alone(model, y, i, **options[i]) for i in range(4)]
    waiting = [
        elit.trajectories(model, None if y is None else own(y, i), seeds=[SEEDS[i]], **options[i])[0] for i in range(4)
    ]
    started, in_flight, sizes = list(waiting), [], []
    while waiting or in_flight:
        in_flight += [waiting.pop(0)] if waiting else []  # one more joins at every turn
        elit.advance(model, in_flight)
        sizes.append(len(in_flight))
        in_flight = [trajectory for trajectory in in_flight if not trajectory.is_done]
    assert sizes[:4] == [1, 2, 3, 3]  # the first, of three evaluations, has left when the last comes
    for trajectory, wanted in zip(started, expected, strict=True):
        assert trajectory.step == trajectory.steps
        assert_near(trajectory.samples(), wanted)


@every_solver
def test_trajectories_are_the_samples_of_one_call(solver: str) -> None:
    model, y, guidance = prepared("ELIT-DiT")
    told = {"seeds": SEEDS, "steps": STEPS, "solver": solver, "budget": BUDGETS, "guidance": guidance}
    flight, rounds = elit.trajectories(model, y, **told), 0
    assert [len(trajectory.x) for trajectory in flight] == [1] * 4
    while not all(trajectory.is_done for trajectory in flight):
        elit.advance(model, flight)  # also those that are done: they stay as they are
        rounds += 1
    assert rounds == SOLVERS[solver].evaluations * (max(STEPS) - 1) + 1
    assert_near(torch.cat([trajectory.samples() for trajectory in flight]), elit.sample(model, y, **told))


def test_a_trajectory_named_twice_is_refused() -> None:
    one, other = elit.trajectories(tiny(), [1, 2], steps=3)
    with pytest.raises(ElitError, match="a trajectory is named twice"):
        elit.advance(tiny(), [one, other, one])
    assert (one.step, other.step) == (0, 0)


def test_a_trajectory_tells_where_it_is() -> None:
    model = tiny()
    (trajectory,) = elit.trajectories(model, [1], seeds=[3], steps=2, solver="heun")
    start = trajectory.x
    assert (trajectory.step, trajectory.steps, trajectory.is_done) == (0, 2, False)
    elit.advance(model, [trajectory])  # the first of two evaluations of a step
    assert trajectory.step == 0 and torch.equal(trajectory.x, start)
    elit.advance(model, [trajectory])
    assert trajectory.step == 1 and not torch.equal(trajectory.x, start)
    elit.advance(model, [trajectory])  # the last step has one
    assert trajectory.is_done and trajectory.step == 2
    end = trajectory.samples()
    elit.advance(model, [trajectory])
    elit.advance(model, [])
    assert torch.equal(trajectory.samples(), end)
    assert torch.equal(end, elit.sample(model, [1], seeds=[3], steps=2, solver="heun"))


@every_solver
def test_a_trajectory_takes_another_level_from_the_next_step_on(solver: str) -> None:
    model = tiny()
    (trajectory,) = elit.trajectories(model, [1], seeds=[3], steps=4, solver=solver)
    elit.advance(model, [trajectory])
    assert trajectory.step_has_begun == (solver == "heun")
    trajectory.set_level(1)  # in the middle of heun's first step, which keeps its own
    while not trajectory.is_done:
        elit.advance(model, [trajectory])
    expected = elit.sample(model, [1], seeds=[3], steps=4, solver=solver, budget=[1.0, 0.25, 0.25, 0.25])
    assert torch.equal(trajectory.samples(), expected)


@pytest.mark.parametrize("path", ["linear", "cosine"])
@every_solver
def test_a_preview_shows_the_data_that_the_last_velocity_points_to(solver: str, path: str) -> None:
    """The stand-in's velocity leads from the noise to data that are 0.7 everywhere."""

    def straight(x: Tensor, t: Tensor, y: Tensor, budget: Tensor) -> Tensor:
        t, chosen = t.view(-1, 1, 1, 1), PATHS[path]
        noise = (x - chosen.alpha(t) * 0.7) / chosen.sigma(t)
        return chosen.d_alpha(t) * 0.7 + chosen.d_sigma(t) * noise

    model = Recorder(straight)
    (trajectory,) = elit.trajectories(model, [1], seeds=[3], steps=5, solver=solver, path=path)
    assert torch.equal(trajectory.preview(), trajectory.samples())  # the noise
    while not trajectory.is_done:
        elit.advance(model, [trajectory])
        torch.testing.assert_close(trajectory.preview(), torch.full((1, 2, 4, 4), 0.7), rtol=0, atol=1e-5)
