"""What a sample is on its way between noise and data: one tensor at one time (:class:`FlowMatching`), or for
multi-scale models the stages of a pyramid, each with a time of its own (:class:`~elit.flow.pyramid.PyramidFlow`).

Training, sampling and measuring ask a flow and need not know which one it is.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from elit.errors import ElitError
from elit.flow.objective import flow_matching_loss
from elit.flow.paths import Path
from elit.flow.solvers import Solver, check_steps
from elit.flow.times import TimeDensity

Velocity = Callable[[Any, Tensor], Any]
"""(x_t, t) -> velocity, as a model takes and gives them; condition and level are bound by the caller."""


class TrainingFlow(Protocol):
    """Says how data become noise in training, and what the loss is."""

    noise_shapes: list[tuple[int, ...]]
    """The shapes of the noise that training draws for one sample: one, or one per stage."""

    def draw_times(self, count: int, rng: np.random.Generator) -> tuple[Tensor, int]:
        """Draws training times of a batch, (count,) or (count, S), and the number of stages that take part.

        The coarsest stages take part first. For plain models the number is 1.
        """
        ...

    def loss(self, velocity: Velocity, x: Tensor, t: Tensor, noise: Sequence[Tensor], active: int = 1) -> Tensor:
        """Returns one loss per sample of data x (B, C, H, W): (B,).

        Args:
            t, active: as :meth:`draw_times` gives them.
            noise: tensors (B, *shape) of :attr:`noise_shapes`.
        """
        ...

    def noise_level(self, t: Tensor) -> Tensor:
        """Returns one noise level for times (...,) or (..., S), by which a budget may be chosen: (...,)."""
        ...


class Flow(TrainingFlow, Protocol):
    """Says what a sample is on its way between noise and data, for training and sampling alike.

    A *state* is a batch of samples on their way, (B, *state_shape).
    """

    path: Path
    state_shape: tuple[int, ...]

    def times(self, solver: Solver, steps: Any) -> Tensor:
        """Returns the times of all steps in float64: (steps + 1,), of a pyramid (steps + 1, S)."""
        ...

    def spread(self, t: Tensor) -> Tensor:
        """Reshapes times (B,) or (B, S), or a mask like them, so that they broadcast against a state."""
        ...

    def to_model(self, x: Tensor, moves: Tensor) -> Any:
        """Turns a state into the input of a model.

        Args:
            moves: shaped like the times of the model; whether a sample or stage has begun to move. A stage that has
                not is masked.
        """
        ...

    def from_model(self, v: Any) -> Tensor:
        """Turns the velocity that a model returns into the velocity of a state, (B, *state_shape)."""
        ...

    def to_samples(self, x: Tensor) -> Tensor:
        """Turns a state at t = 0 into samples (B, C, H, W)."""
        ...


class FlowMatching:
    """Defines the flow of plain models, where a state is the sample itself, at one time.

    Args:
        shape: the shape of a sample, (C, H, W) or (C, T, H, W).
        path: the path between data and noise.
        times: the density from which training draws times.
    """

    def __init__(self, shape: Sequence[int], path: Path, times: TimeDensity | None = None) -> None:
        self.state_shape = tuple(shape)
        self.noise_shapes = [self.state_shape]
        self.path = path
        self.density = times or TimeDensity()

    def draw_times(self, count: int, rng: np.random.Generator) -> tuple[Tensor, int]:
        return self.density.draw(count, self.path, rng), 1

    def loss(self, velocity: Velocity, x: Tensor, t: Tensor, noise: Sequence[Tensor], active: int = 1) -> Tensor:
        return flow_matching_loss(velocity, x, t, noise[0], self.path)

    def times(self, solver: Solver, steps: Any) -> Tensor:
        if not isinstance(steps, int | np.integer):
            raise ElitError(f"steps is {steps!r}; give a whole number (stages are for multi-scale models)")
        return solver.times(check_steps(steps))

    def spread(self, t: Tensor) -> Tensor:
        return t.view(-1, *(1,) * len(self.state_shape))

    def noise_level(self, t: Tensor) -> Tensor:
        return t

    def to_model(self, x: Tensor, moves: Tensor) -> Tensor:
        return x

    def from_model(self, v: Tensor) -> Tensor:
        return v

    def to_samples(self, x: Tensor) -> Tensor:
        return x
