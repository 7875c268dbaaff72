"""Solvers against exact solutions."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from elit import ElitError
from elit.flow import PATHS, SOLVERS, Path, StepInfo, time_grid

MEAN, STD = 0.7, 0.4
EVALUATIONS = {"euler": 1, "heun": 2, "sde": 1}
every_path = pytest.mark.parametrize("name", PATHS)


def gaussian(path: Path) -> Callable[[Tensor, Tensor, int], Tensor]:
    """The velocity of the marginals of data N(MEAN, STD^2), whose flow is known: x_t moves with mean and width."""

    def velocity(x: Tensor, t: Tensor, step: int) -> Tensor:
        alpha, sigma, d_alpha, d_sigma = path.alpha(t), path.sigma(t), path.d_alpha(t), path.d_sigma(t)
        variance = alpha**2 * STD**2 + sigma**2
        growth = (alpha * d_alpha * STD**2 + sigma * d_sigma) / variance
        return d_alpha * MEAN + growth * (x - alpha * MEAN)

    return velocity


def no_draw(step: int) -> Tensor:
    raise AssertionError("a deterministic solver draws nothing")


def solve(solver: str, path: Path, x: Tensor, steps: int) -> Tensor:
    return SOLVERS[solver](gaussian(path), x, time_grid(solver, steps), path, no_draw)


@every_path
@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_solvers_converge_to_the_exact_flow_at_their_order(solver: str, order: int, name: str) -> None:
    """Heun's last step is Euler's; its local error is of second order too, so the global order stays 2."""
    x = torch.linspace(-3, 3, 13, dtype=torch.float64)
    exact = MEAN + STD * x  # the noise quantile is carried to the data quantile
    errors = [(solve(solver, PATHS[name], x, steps) - exact).abs().max().item() for steps in (64, 128, 256, 512)]
    for coarse, fine in zip(errors, errors[1:], strict=False):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15)  # the next order's share at these steps
    assert errors[-1] < (3e-2 if order == 1 else 3e-4)


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_a_straight_path_is_exact_in_any_number_of_steps(solver: str, steps: int) -> None:
    """One datum: the velocity along each path is constant, which is why rectified flow needs few steps."""
    datum, x = torch.randn(2, 5, dtype=torch.float64)

    def to_datum(x: Tensor, t: Tensor, step: int) -> Tensor:
        return (x - datum) / t

    end = SOLVERS[solver](to_datum, x, time_grid(solver, steps), PATHS["linear"], no_draw)
    torch.testing.assert_close(end, datum, rtol=0, atol=1e-14)


def test_euler_and_heun_by_hand() -> None:
    x = torch.tensor([1.0], dtype=torch.float64)

    def velocity(x: Tensor, t: Tensor, step: int) -> Tensor:
        return x * t

    # two steps of 1/2 from t = 1: Euler x (1 - 1/2 * 1), then (1 - 1/2 * 1/2)
    assert SOLVERS["euler"](velocity, x, time_grid("euler", 2), PATHS["linear"], no_draw).item() == 0.5 * 0.75
    # Heun: slopes 1 and 0.5 * 0.5 on the first step, then Euler
    first = 1 - 0.5 * (1 + 0.25) / 2
    assert SOLVERS["heun"](velocity, x, time_grid("heun", 2), PATHS["linear"], no_draw).item() == first * 0.75


# ------------------------------------------------------------------------------------------------ the SDE


@every_path
def test_the_sde_keeps_the_marginals_of_a_gaussian(name: str) -> None:
    """At every step the state has the mean and the variance of the path, although noise comes in all the time."""
    path, count, steps = PATHS[name], 100_000, 200
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(count, generator=draws, dtype=torch.float64)
    seen: list[StepInfo] = []
    end = SOLVERS["sde"](
        gaussian(path), x, time_grid("sde", steps), path,
        lambda step: torch.randn(count, generator=draws, dtype=torch.float64), seen.append,
    )  # fmt: skip
    for info in (seen[19], seen[99], seen[179], seen[198]):
        t = torch.as_tensor(info.t)
        alpha, sigma = path.alpha(t), path.sigma(t)
        mean, variance = (alpha * MEAN).item(), (alpha**2 * STD**2 + sigma**2).item()
        # five standard errors (0.3 % of the width, 0.45 % of the variance) and the step's own error, some h = 0.5 %
        assert info.x.mean().item() == pytest.approx(mean, abs=0.02 * variance**0.5)
        assert info.x.var().item() == pytest.approx(variance, rel=0.03)
    # the last step jumps from 0.04 to 0 without noise: a few per cent of the variance are missing by design
    assert end.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert end.var().item() == pytest.approx(STD**2, rel=0.1)
    kept = torch.corrcoef(torch.stack((x, end)))[0, 1]
    assert kept < 0.5  # the noise that came in has made it forget where it started; the flow would keep 1


def test_the_sde_adds_noise_on_every_step_but_the_last() -> None:
    x, steps, asked = torch.randn(4, dtype=torch.float64), 5, []

    def draw(step: int) -> Tensor:
        asked.append(step)
        return torch.ones(4, dtype=torch.float64)

    times = time_grid("sde", steps)
    v = torch.randn(4, dtype=torch.float64)
    end = SOLVERS["sde"](lambda x, t, step: v, x, times, PATHS["linear"], draw)
    assert asked == [0, 1, 2, 3]
    for step, (t, t_next) in enumerate(zip(times[:-1].tolist(), times[1:].tolist(), strict=True)):
        x = x + (t_next - t) * (v - t * -(x + (1 - t) * v) / t)  # the published formulas, spelled out
        if step < steps - 1:
            x = x + math.sqrt(2 * t * (t - t_next))
    torch.testing.assert_close(end, x, rtol=0, atol=1e-13)


# ------------------------------------------------------------------------------------------------ what they share


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 10])
def test_the_callback_is_told_every_step_in_float64(solver: str, steps: int) -> None:
    seen: list[StepInfo] = []
    evaluated: list[tuple[float, int]] = []

    def velocity(x: Tensor, t: Tensor, step: int) -> Tensor:
        assert x.dtype == torch.float64
        evaluated.append((t.item(), step))
        return torch.ones_like(x)

    x, times = torch.zeros(3, dtype=torch.float64), time_grid(solver, steps)
    end = SOLVERS[solver](velocity, x, times, PATHS["linear"], lambda step: torch.zeros_like(x), seen.append)
    assert [info.step for info in seen] == list(range(steps))
    assert {info.steps for info in seen} == {steps}
    assert [float(info.t) for info in seen] == times[1:].tolist()
    assert seen[-1].x is end
    assert all(info.x.dtype == torch.float64 for info in seen)
    again = SOLVERS[solver](velocity, x, times, PATHS["linear"], lambda step: torch.zeros_like(x), None)
    assert torch.equal(again, end)
    first_run = evaluated[: len(evaluated) // 2]
    expected = []
    for step in range(steps):
        expected.append((times[step].item(), step))
        if EVALUATIONS[solver] == 2 and step < steps - 1:
            expected.append((times[step + 1].item(), step))
    assert first_run == expected


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("steps", [1, 3, 40])
def test_times_are_equal_steps_from_noise_to_data(solver: str, steps: int) -> None:
    times = time_grid(solver, steps)
    assert times.dtype == torch.float64
    torch.testing.assert_close(times, 1 - torch.arange(steps + 1).double() / steps, rtol=0, atol=1e-15)


@pytest.mark.parametrize("steps", [1, 2, 5, 250])
def test_times_of_the_sde_end_with_one_jump(steps: int) -> None:
    times = time_grid("sde", steps)
    assert (times.dtype, len(times)) == (torch.float64, steps + 1)
    assert (times[0], times[-1]) == (1, 0)
    if steps > 1:
        assert times[-2].item() == pytest.approx(0.04, abs=1e-15)
        gaps = times[:-1].diff()
        torch.testing.assert_close(gaps, torch.full_like(gaps, -0.96 / (steps - 1)), rtol=0, atol=1e-15)


@pytest.mark.parametrize("steps", [0, -3, 2.5, "10", True, None])
def test_an_impossible_number_of_steps_is_named(steps: Any) -> None:
    with pytest.raises(ElitError, match="must be a whole number, at least 1") as caught:
        time_grid("euler", steps)
    assert f"steps is {steps!r};" in str(caught.value)


def test_a_solver_that_does_not_exist_is_named() -> None:
    with pytest.raises(ElitError, match="no solver is named 'rk4'; there are euler, heun, sde"):
        time_grid("rk4", 10)
