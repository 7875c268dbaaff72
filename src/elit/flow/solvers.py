"""Solvers from noise (t = 1) to data (t = 0), in float64.

A solver is one step, written as a generator: it yields the state and the moment at which it wants to know the velocity,
is sent the velocity, and returns the state at the end of the step. It knows no model, no guidance and no batch, so
:func:`elit.sample` and a server that advances whatever is in flight share it. To add one, write such a function and
give it a name in :data:`SOLVERS`.
"""

from collections.abc import Callable, Generator
from numbers import Integral
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from elit.errors import ElitError
from elit.flow.paths import Path, score


class Moment(NamedTuple):
    """Holds the times of some samples at one point of their way, in the three forms in which they are needed.

    Attributes:
        host: (B,) float64 on the CPU, for guidance intervals; of a multi-scale model (B, S).
        model: the same in float32 on the model's device, what a model takes.
        state: the same in float64 on the model's device, of a shape that broadcasts against the state.
    """

    host: Tensor
    model: Tensor
    state: Tensor


class Step(NamedTuple):
    """Describes the step that a solver is to take.

    Attributes:
        start, end: its moments.
        is_last: whether it ends at the data.
        path: the path between data and noise.
        noise: draws standard normal noise like the state, for this step; only stochastic solvers call it.
    """

    start: Moment
    end: Moment
    is_last: bool
    path: Path
    noise: Callable[[], Tensor]

    @property
    def dt(self) -> Tensor:
        return self.end.state - self.start.state


StepGenerator: TypeAlias = Generator[tuple[Tensor, Moment], Tensor, Tensor]
"""Yields (state, moment), is sent the velocity there, and returns the state at the end of the step."""


def euler(x: Tensor, step: Step) -> StepGenerator:
    """Takes one step of first order, with one evaluation."""
    v = yield x, step.start
    return x + step.dt * v


def heun(x: Tensor, step: Step) -> StepGenerator:
    """Takes one step of second order: an Euler step that the velocity at its end corrects (EDM, Alg. 1).

    The last step is an Euler step, without correction.
    """
    v = yield x, step.start
    end = x + step.dt * v
    if step.is_last:
        return end
    v_end = yield end, step.end
    return x + step.dt * (v + v_end) / 2


def euler_maruyama(x: Tensor, step: Step) -> StepGenerator:
    """Takes one step of the reverse SDE with diffusion 2 sigma(t) (SiT, Eq. 5).

    The drift is ``v - sigma * score``, and the noise has the standard deviation ``sqrt(2 sigma |dt|)``. What a step
    brings to the data, at t = 0, takes no noise. What does not move in a step (a stage of a pyramid that is done) stays
    as it is: at t = 0 there is no score.
    """
    v = yield x, step.start
    t, dt, path = step.start.state, step.dt, step.path
    sigma = path.sigma(t)
    moved = x + dt * (v - sigma * score(path, x, v, t))
    if not step.is_last:
        spread = torch.where(step.end.state > 0, (2 * sigma * dt.abs()).sqrt(), 0.0)
        moved = moved + spread * step.noise()
    return torch.where(dt == 0, x, moved)


SDE_LAST_TIME = 0.04  # the stochastic solver takes its last step, without noise, from here


def equal_times(steps: int) -> Tensor:
    """Returns the times of equal steps from 1 to 0: (steps + 1,)."""
    return torch.linspace(1, 0, steps + 1, dtype=torch.float64)


def sde_times(steps: int) -> Tensor:
    """Returns the times of equal steps from 1 to 0.04, and of a last one to 0: (steps + 1,)."""
    return torch.cat((torch.linspace(1, SDE_LAST_TIME, steps, dtype=torch.float64), torch.zeros(1).double()))


class Solver(NamedTuple):
    """Puts together what a solver is: a step, the times of the steps, and what a step costs.

    Attributes:
        step: the generator function that takes one step.
        times: returns the times of a number of steps, from 1 to 0 in float64: (steps + 1,).
        evaluations: the number of evaluations of every step but the last, which has one.
    """

    step: Callable[[Tensor, Step], StepGenerator]
    times: Callable[[int], Tensor] = equal_times
    evaluations: int = 1


SOLVERS = {
    "euler": Solver(euler),
    "heun": Solver(heun, evaluations=2),
    "sde": Solver(euler_maruyama, sde_times),
}


def solver_named(name: str) -> Solver:
    """Finds a solver by its name.

    Raises:
        ElitError: no solver has this name.
    """
    if name not in SOLVERS:
        raise ElitError(f"no solver is named {name!r}; there are {', '.join(SOLVERS)}")
    return SOLVERS[name]


def check_steps(steps: Any) -> int:
    """Checks a number of steps and returns it.

    Raises:
        ElitError: it is not a whole number, at least 1.
    """
    if isinstance(steps, bool) or not isinstance(steps, Integral) or int(steps) < 1:
        raise ElitError(f"steps is {steps!r}; it must be a whole number, at least 1")
    return int(steps)


def time_grid(solver: str, steps: int) -> Tensor:
    """Returns the times of ``steps`` steps of a solver, from 1 to 0 in float64: (steps + 1,).

    Raises:
        ElitError: there is no such solver, or the number of steps is not a whole number, at least 1.
    """
    return solver_named(solver).times(check_steps(steps))
