"""Solvers against exact solutions."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from elit import ElitError
from elit.flow import PATHS, SOLVERS, Path, time_grid
from elit.flow.solvers import Moment, Step

MEAN, STD = 0.7, 0.4
Velocity = Callable[[Tensor, Tensor], Tensor]
every_path = pytest.mark.parametrize("name", PATHS)


def gaussian(path: Path) -> Velocity:
    """The velocity of the marginals of data N(MEAN, STD^2), whose flow is known: x_t moves with mean and width."""

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma, d_alpha, d_sigma = path.alpha(t), path.sigma(t), path.d_alpha(t), path.d_sigma(t)
        variance = alpha**2 * STD**2 + sigma**2
        growth = (alpha * d_alpha * STD**2 + sigma * d_sigma) / variance
        return d_alpha * MEAN + growth * (x - alpha * MEAN)

    return velocity


def no_draw(step: int) -> Tensor:
    raise AssertionError("a deterministic solver draws nothing")


def solve(
    solver: str,
    velocity: Velocity,
    x: Tensor,
    steps: int,
    path: Path = PATHS["linear"],
    draw: Callable[[int], Tensor] = no_draw,
    states: list[Tensor] | None = None,
) -> Tensor:
    """The state at t = 0 of states x (B,) that move by a velocity(x, t); those after each step go into ``states``."""
    times = time_grid(solver, steps)
    moments = [Moment(at, at.float(), at) for at in times[:, None].expand(-1, len(x))]
    for i in range(steps):
        step = Step(moments[i], moments[i + 1], i == steps - 1, path, lambda i=i: draw(i))  # type: ignore[misc]
        solving, answer = SOLVERS[solver].step(x, step), None
        while True:
            try:
                at, moment = solving.send(answer)  # type: ignore[arg-type]
            except StopIteration as done:
                x = done.value
                break
            answer = velocity(at, moment.state)
        if states is not None:
            states.append(x)
    return x


@every_path
@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_solvers_converge_to_the_exact_flow_at_their_order(solver: str, order: int, name: str) -> None:
    """Heun's last step is Euler's; its local error is of second order too, so the global order stays 2."""
    x = torch.linspace(-3, 3, 13, dtype=torch.float64)
    exact = MEAN + STD * x  # the noise quantile is carried to the data quantile
    path = PATHS[name]
    ends = (solve(solver, gaussian(path), x, steps, path) for steps in (64, 128, 256, 512))
    errors = [(end - exact).abs().max().item() for end in ends]
    for coarse, fine in zip(errors, errors[1:], strict=False):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15)  # the next order's share at these steps
    assert errors[-1] < (3e-2 if order == 1 else 3e-4)


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_a_straight_path_is_exact_in_any_number_of_steps(solver: str, steps: int) -> None:
    """One datum: the velocity along each path is constant, which is why rectified flow needs few steps."""
    datum, x = torch.randn(2, 5, dtype=torch.float64)

    end = solve(solver, lambda x, t: (x - datum) / t, x, steps)
    torch.testing.assert_close(end, datum, rtol=0, atol=1e-14)


def test_euler_and_heun_by_hand() -> None:
    x = torch.tensor([1.0], dtype=torch.float64)

    # two steps of 1/2 from t = 1: Euler x (1 - 1/2 * 1), then (1 - 1/2 * 1/2)
    assert solve("euler", lambda x, t: x * t, x, 2).item() == 0.5 * 0.75
    # Heun: slopes 1 and 0.5 * 0.5 on the first step, then Euler
    first = 1 - 0.5 * (1 + 0.25) / 2
    assert solve("heun", lambda x, t: x * t, x, 2).item() == first * 0.75


# ------------------------------------------------------------------------------------------------ the SDE


@every_path
def test_the_sde_keeps_the_marginals_of_a_gaussian(name: str) -> None:
    """At every step the state has the mean and the variance of the path, although noise comes in all the time."""
    path, count, steps = PATHS[name], 100_000, 200
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(count, generator=draws, dtype=torch.float64)
    seen: list[Tensor] = []
    end = solve(
        "sde", gaussian(path), x, steps, path,
        lambda step: torch.randn(count, generator=draws, dtype=torch.float64), seen,
    )  # fmt: skip
    for step in (19, 99, 179, 198):
        t, state = time_grid("sde", steps)[step + 1], seen[step]
        alpha, sigma = path.alpha(t), path.sigma(t)
        mean, variance = (alpha * MEAN).item(), (alpha**2 * STD**2 + sigma**2).item()
        # five standard errors (0.3 % of the width, 0.45 % of the variance) and the step's own error, some h = 0.5 %
        assert state.mean().item() == pytest.approx(mean, abs=0.02 * variance**0.5)
        assert state.var().item() == pytest.approx(variance, rel=0.03)
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
    end = solve("sde", lambda x, t: v, x, steps, draw=draw)
    assert asked == [0, 1, 2, 3]
    for step, (t, t_next) in enumerate(zip(times[:-1].tolist(), times[1:].tolist(), strict=True)):
        x = x + (t_next - t) * (v - t * -(x + (1 - t) * v) / t)  # the published formulas, spelled out
        if step < steps - 1:
            x = x + math.sqrt(2 * t * (t - t_next))
    torch.testing.assert_close(end, x, rtol=0, atol=1e-13)


# ------------------------------------------------------------------------------------------------ what they share


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 10])
def test_evaluations_are_at_the_start_of_a_step_and_for_heun_at_its_end_too(solver: str, steps: int) -> None:
    evaluated: list[float] = []

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        assert x.dtype == t.dtype == torch.float64
        evaluated.append(t[0].item())
        return torch.ones_like(x)

    x = torch.zeros(3, dtype=torch.float64)
    end = solve(solver, velocity, x, steps, draw=lambda step: torch.zeros_like(x))
    assert end.dtype == torch.float64
    expected = []
    for step, (t, t_next) in enumerate(zip(*(time_grid(solver, steps).tolist()[i:] for i in (0, 1)), strict=False)):
        expected += [t, t_next] if solver == "heun" and step < steps - 1 else [t]
    assert evaluated == expected
    assert len(evaluated) == SOLVERS[solver].evaluations * (steps - 1) + 1  # the last step takes a single one


@pytest.mark.parametrize("solver", SOLVERS)
def test_what_does_not_move_in_a_step_stays_as_it_is(solver: str) -> None:
    """A stage of a pyramid that is done, at t = 0, where there is no score, or one that waits at t = 1."""
    host = torch.tensor([0.0, 1.0, 0.5]).double()
    ends = torch.tensor([0.0, 1.0, 0.25]).double()
    start, end = (Moment(at, at.float(), at) for at in (host, ends))
    x = torch.randn(3, dtype=torch.float64)
    solving = SOLVERS[solver].step(x, Step(start, end, False, PATHS["linear"], lambda: torch.ones_like(x)))
    answer, after = None, None
    while after is None:
        try:
            solving.send(answer)  # type: ignore[arg-type]
            answer = torch.full_like(x, 2.0)
        except StopIteration as done:
            after = done.value
    assert after[:2].tolist() == x[:2].tolist()
    assert after[2].isfinite() and after[2] != x[2]


def test_the_sde_adds_no_noise_to_what_a_step_brings_to_the_data() -> None:
    """As the last step of a plain model does, so does that of a stage of a pyramid that is done before the others."""
    start, end = torch.tensor([0.25, 0.25]).double(), torch.tensor([0.0, 0.125]).double()
    x, v, path = torch.randn(2, dtype=torch.float64), torch.randn(2, dtype=torch.float64), PATHS["linear"]

    def stepped(noise: float, is_last: bool) -> Tensor:
        moments = (Moment(at, at.float(), at) for at in (start, end))
        solving = SOLVERS["sde"].step(x, Step(*moments, is_last, path, lambda: torch.full_like(x, noise)))
        next(solving)
        with pytest.raises(StopIteration) as done:
            solving.send(v)
        return done.value.value

    quiet, noisy, last = stepped(0.0, False), stepped(1.0, False), stepped(1.0, True)
    assert torch.equal(last, quiet)
    assert noisy[0] == quiet[0]
    assert noisy[1].item() == pytest.approx(quiet[1].item() + math.sqrt(2 * 0.25 * 0.125))


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
