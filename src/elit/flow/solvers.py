"""Solvers from noise (t = 1) to data (t = 0): plain functions of one signature, in float64.

A solver takes ``velocity(x, t, step)``, the state x, the times (a float64 vector from :func:`time_grid`, or rows that
broadcast against x where its elements have times of their own), the path, a source of noise ``draw(step)`` and a
callback. Only the stochastic solver looks at path and draw.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from elit.errors import ElitError
from elit.flow.paths import Path, score

Velocity = Callable[[Tensor, Tensor, int], Tensor]
Draw = Callable[[int], Tensor]


class StepInfo(NamedTuple):
    """What a callback is told after each step: its index, the time and state that it ended at."""

    step: int
    steps: int
    t: float | Tensor
    x: Tensor


Callback = Callable[[StepInfo], None]
Solver = Callable[[Velocity, Tensor, Tensor, Path, Draw, Callback | None], Tensor]

SDE_LAST_TIME = 0.04  # the stochastic solver takes its last step, without noise, from here


def euler(
    velocity: Velocity, x: Tensor, times: Tensor, path: Path, draw: Draw, callback: Callback | None = None
) -> Tensor:
    """First order, one evaluation per step."""
    steps = len(times) - 1
    for step, (t, t_next) in enumerate(zip(times[:-1], times[1:], strict=True)):
        x = x + (t_next - t) * velocity(x, t, step)
        if callback:
            callback(StepInfo(step, steps, t_next, x))
    return x


def heun(
    velocity: Velocity, x: Tensor, times: Tensor, path: Path, draw: Draw, callback: Callback | None = None
) -> Tensor:
    """Second order: every Euler step but the last is corrected by the velocity at its end (EDM, Alg. 1)."""
    steps = len(times) - 1
    for step, (t, t_next) in enumerate(zip(times[:-1], times[1:], strict=True)):
        v = velocity(x, t, step)
        end = x + (t_next - t) * v
        if step < steps - 1:
            end = x + (t_next - t) * (v + velocity(end, t_next, step)) / 2
        x = end
        if callback:
            callback(StepInfo(step, steps, t_next, x))
    return x


def euler_maruyama(
    velocity: Velocity, x: Tensor, times: Tensor, path: Path, draw: Draw, callback: Callback | None = None
) -> Tensor:
    """The reverse SDE with diffusion 2 sigma(t) (SiT, Eq. 5): drift ``v - sigma * score``, noise ``sqrt(2 sigma
    |dt|)``.

    The last step keeps the drift and adds no noise.
    """
    steps = len(times) - 1
    for step, (t, t_next) in enumerate(zip(times[:-1], times[1:], strict=True)):
        v = velocity(x, t, step)
        dt, sigma = t_next - t, path.sigma(t)
        x = x + dt * (v - sigma * score(path, x, v, t))
        if step < steps - 1:
            x = x + (2 * sigma * dt.abs()).sqrt() * draw(step)
        if callback:
            callback(StepInfo(step, steps, t_next, x))
    return x


SOLVERS: dict[str, Solver] = {"euler": euler, "heun": heun, "sde": euler_maruyama}


def solver_named(name: str) -> Solver:
    """Raises:
    ElitError: no solver has this name.
    """
    if name not in SOLVERS:
        raise ElitError(f"no solver is named {name!r}; there are {', '.join(SOLVERS)}")
    return SOLVERS[name]


def check_steps(steps: int) -> int:
    """Raises:
    ElitError: it is not a whole number, at least 1.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ElitError(f"steps is {steps!r}; it must be a whole number, at least 1")
    return steps


def time_grid(solver: str, steps: int) -> Tensor:
    """Times of ``steps`` steps, from 1 to 0 in float64: equal steps, or for ``sde`` from 1 to 0.04 and then to 0.

    Raises:
        ElitError: no such solver, or too few steps.
    """
    solver_named(solver)
    check_steps(steps)
    if solver == "sde":
        return torch.cat((torch.linspace(1, SDE_LAST_TIME, steps, dtype=torch.float64), torch.zeros(1).double()))
    return torch.linspace(1, 0, steps + 1, dtype=torch.float64)
