"""Pyramids, the loss over their stages, and when each stage is sampled."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from elit.errors import ElitError
from elit.flow import (
    FlowMatching,
    PyramidFlow,
    StageDensity,
    StageSchedule,
    TimeDensity,
    decompose,
    path_named,
    recompose,
)

NUMBERS = load_file(Path(__file__).parents[1] / "data" / "published" / "dfm_sit_tiny.safetensors")
LINEAR = path_named("linear")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ------------------------------------------------------------------------------------------------ the pyramid


def test_published_pyramid() -> None:
    stages = decompose(NUMBERS["in.clean"], 2)
    for stage, found in enumerate(stages):
        assert (found - NUMBERS[f"pyramid.{stage}"]).abs().max() < 1e-6
    assert (recompose(stages) - NUMBERS["recomposed"]).abs().max() < 1e-6


@given(stages=st.integers(1, 4), height=st.integers(1, 3), width=st.integers(1, 3), seed=st.integers(0, 99))
def test_recompose_is_the_inverse(stages: int, height: int, width: int, seed: int) -> None:
    scale = 2 ** (stages - 1)
    x = random(2, 3, height * scale, width * scale, seed=seed)
    pyramid = decompose(x, stages)
    assert [tuple(stage.shape[2:]) for stage in pyramid] == [
        (height * 2**k, width * 2**k) for k in range(stages)
    ]  # coarsest first
    assert (recompose(pyramid) - x).abs().max() < 1e-12
    # and the other way round, for any stages: the detail that doubling adds to a stage has no mean over 2 x 2 pixels
    again = decompose(recompose(pyramid), stages)
    assert all((a - b).abs().max() < 1e-12 for a, b in zip(again, pyramid, strict=True))


def test_a_flat_image_has_no_detail() -> None:
    low, *details = decompose(torch.full((1, 1, 8, 8), 3.0), 3)
    assert torch.equal(low, torch.full((1, 1, 2, 2), 3.0))
    assert all(not detail.any() for detail in details)


@pytest.mark.parametrize(("size", "stages"), [((6, 8), 3), ((8, 3), 2), ((8, 8), 0)])
def test_sides_that_cannot_be_halved(size: tuple[int, int], stages: int) -> None:
    with pytest.raises(ElitError, match="cannot be halved"):
        decompose(torch.zeros(1, 1, *size), stages)


# ------------------------------------------------------------------------------------------------ training


def test_stages_and_times_are_drawn_as_published() -> None:
    density, rng = StageDensity(), np.random.default_rng(0)
    drawn = [density.draw(4, LINEAR, rng) for _ in range(4000)]
    assert sum(active == 1 for _, active in drawn) / len(drawn) == pytest.approx(0.9, abs=0.02)
    assert all((times[:, 1] == 1).all() for times, active in drawn if active == 1)
    first = torch.cat([times[:, 0] for times, active in drawn if active == 1]).logit()
    both = torch.cat([times for times, active in drawn if active == 2]).logit()
    assert [float(first.mean()), float(both[:, 0].mean()), float(both[:, 1].mean())] == pytest.approx(
        [0, -2, 0], abs=0.1
    )
    assert float(both.std(0).mean()) == pytest.approx(1, abs=0.05)


def test_draws_are_those_of_the_generator() -> None:
    density = StageDensity([1, 1, 1], last=TimeDensity("uniform"))
    one, two = (density.draw(5, LINEAR, np.random.default_rng(3)) for _ in range(2))
    assert torch.equal(one[0], two[0]) and one[1] == two[1]
    assert one[0].shape == (5, 3) and one[0].dtype == torch.float32


@pytest.mark.parametrize("weights", [[], [0, 0], [1, -1], [float("nan")]])
def test_weights_that_are_none(weights: list[float]) -> None:
    with pytest.raises(ElitError, match="stage weights"):
        StageDensity(weights)


SHAPES = [(3, 2, 2), (3, 4, 4), (3, 8, 8)]


def linear_model(x: list[Tensor], t: Tensor) -> list[Tensor]:
    return [0.5 * stage + t[:, k].view(-1, 1, 1, 1) for k, stage in enumerate(x)]


@pytest.mark.parametrize("active", [1, 2, 3])
def test_loss_is_the_sum_over_active_stages(active: int) -> None:
    x, t = random(2, 3, 8, 8), torch.rand(2, 3, dtype=torch.float64)
    noise = [random(2, *shape, seed=k) for k, shape in enumerate(SHAPES)]
    found = PyramidFlow(SHAPES, LINEAR).loss(linear_model, x, t, noise, active)
    by_hand = torch.zeros(2)
    for k, stage in enumerate(decompose(x, 3)[:active]):
        at = t[:, k].view(-1, 1, 1, 1)
        state = (1 - at) * stage + at * noise[k]
        by_hand += (0.5 * state + at - (noise[k] - stage)).square().mean((1, 2, 3))
    assert torch.allclose(found, by_hand, rtol=1e-6)


def test_one_stage_is_plain_flow_matching() -> None:
    x, t, noise = random(2, 3, 8, 8), torch.rand(2, 1, dtype=torch.float64), random(2, 3, 8, 8, seed=1)
    plain = FlowMatching(SHAPES[2], LINEAR)
    expected = plain.loss(lambda x, t: 0.5 * x + t.view(-1, 1, 1, 1), x, t[:, 0], [noise])
    assert torch.equal(PyramidFlow(SHAPES[2:], LINEAR).loss(linear_model, x, t, [noise], 1), expected)


@pytest.mark.parametrize("active", [1, 2, 3])
def test_the_loss_gives_masked_stages_to_the_model_as_zeros(active: int) -> None:
    x, t = random(2, 3, 8, 8), torch.rand(2, 3, dtype=torch.float64)
    noise = [random(2, *shape, seed=k) for k, shape in enumerate(SHAPES)]
    seen: list[bool] = []

    def velocity(x: list[Tensor], t: Tensor) -> list[Tensor]:
        seen.extend(bool(stage.any()) for stage in x)
        return linear_model(x, t)

    PyramidFlow(SHAPES, LINEAR).loss(velocity, x, t, noise, active)
    assert seen == [k < active for k in range(3)]


def test_a_state_is_the_stages_side_by_side() -> None:
    flow, stages = PyramidFlow(SHAPES, LINEAR), [random(2, *shape, seed=k) for k, shape in enumerate(SHAPES)]
    state = flow.from_model(stages)
    assert state.shape == (2, *flow.state_shape) == (2, 12 + 48 + 192)
    moves = torch.tensor([[True, True, True], [True, False, False]])
    for k, stage in enumerate(flow.to_model(state, moves)):
        assert torch.equal(stage, stages[k] * moves[:, k].view(-1, 1, 1, 1))
    assert torch.equal(flow.to_samples(state), recompose(stages))
    t = torch.tensor([[0.0, 0.5, 1.0], [0.1, 0.2, 0.3]]).double()
    assert torch.equal(
        flow.from_model([t[:, k].view(-1, 1, 1, 1).expand(2, *SHAPES[k]) for k in range(3)]), flow.spread(t)
    )
    torch.testing.assert_close(flow.noise_level(t)[0].item(), (0.5 * 48 + 1.0 * 192) / 252)


# ------------------------------------------------------------------------------------------------ sampling


def test_two_stages_take_the_published_schedule() -> None:
    schedule = StageSchedule([4, 3], [0.1])
    coarse = [1, 0.775, 0.55, 0.325, 0.1, 0.2 / 3, 0.1 / 3, 0]
    fine = [1, 1, 1, 1, 1, 2 / 3, 1 / 3, 0]
    assert torch.allclose(schedule.times(), torch.tensor([coarse, fine], dtype=torch.float64).T, atol=1e-15, rtol=0)
    assert schedule == StageSchedule.even(7, 2)


@given(data=st.data(), stages=st.integers(1, 5))
def test_schedules(data: Any, stages: int) -> None:
    steps = data.draw(st.lists(st.integers(1, 9), min_size=stages, max_size=stages))
    below_one = st.floats(0, 1, exclude_max=True)
    thresholds = data.draw(st.lists(below_one, min_size=stages - 1, max_size=stages - 1))
    schedule = StageSchedule(steps, thresholds)
    times = schedule.times()
    assert times.shape == (sum(steps) + 1, stages) and times.dtype == torch.float64
    assert (times[0] == 1).all() and (times[-1] == 0).all()
    assert (times.diff(dim=0) <= 0).all()
    for stage in range(stages):
        begins = sum(steps[:stage])
        assert (times[: begins + 1, stage] == 1).all()  # waits, masked
        if (*thresholds, 0.0)[stage] < 0.99:  # where floating point can tell the first step from none
            assert (times[begins + 1 :, stage] < 1).all()  # then it moves on
        if stage < stages - 1:
            assert times[begins + steps[stage], stage] == thresholds[stage]


@given(stages=st.integers(1, 5), more=st.integers(0, 30))
def test_steps_are_shared_out_evenly(stages: int, more: int) -> None:
    steps = list(StageSchedule.even(stages + more, stages).steps)
    assert sum(steps) == stages + more and max(steps) - min(steps) <= 1
    assert steps == sorted(steps, reverse=True)


@pytest.mark.parametrize(
    ("steps", "thresholds", "said"),
    [
        ([4, 3], [], "one threshold less than stages, not 0 for 2"),
        ([], [], "one threshold less"),
        ([4, 0], [0.1], "steps is 0"),
        ([4, 3], [1.0], "in .0, 1"),
        ([4, 3], [-0.1], "in .0, 1"),
        ([4, 3], [float("nan")], "in .0, 1"),
    ],
)
def test_schedules_that_are_none(steps: list[int], thresholds: list[float], said: str) -> None:
    with pytest.raises(ElitError, match=said):
        StageSchedule(steps, thresholds)


def test_fewer_steps_than_stages() -> None:
    with pytest.raises(ElitError, match="2 steps are too few for 3 stages"):
        StageSchedule.even(2, 3)
