"""Trajectories: samples in the making, which wait for the velocity that their solver wants next.

A :class:`Trajectory` holds samples that take the same number of steps; each has its own times, levels, guidance and
seed. :func:`advance` evaluates what any number of them want in one batch and hands out the answers.
:func:`elit.sample` advances its trajectories to the end; a server advances whatever is in flight.
"""

from collections.abc import Sequence
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from elit.conditions import Condition, cat_conditions, select_condition
from elit.flow.guidance import Guidance
from elit.flow.matching import Flow, FlowMatching
from elit.flow.paths import Path, path_named
from elit.flow.pyramid import PyramidFlow
from elit.flow.solvers import Moment, Solver, Step, StepGenerator
from elit.models.base import Model
from elit.seeding import normals


def flow_of(model: Model, path: str | Path = "linear", **densities: Any) -> Flow:
    """Returns the flow that a model is trained and sampled with.

    Args:
        path: ``linear`` or ``cosine``, or the path itself.
        densities: ``times`` (:class:`TimeDensity`) and ``stages`` (:class:`StageDensity`), how training draws times.
    """
    path, stages = path_named(path) if isinstance(path, str) else path, model.stage_shapes
    if stages is None:
        return FlowMatching(model.input_shape(), path, densities.get("times"))
    return PyramidFlow(stages, path, densities.get("stages"))


class Evaluation(NamedTuple):
    """A velocity that is wanted: of which states, at which times, under which conditions and guidance.

    Attributes:
        x: states (B, *state_shape), float64.
        moment: their times.
        moves: whether each sample (or stage) has begun to move: of the shape of the model's times.
        y: their conditions, and ``null`` what replaces them in a weak term; None for an unconditional model.
        levels: of the strong term of each sample.
        guidance: of each sample, None without.
        weak_levels: of the weak term of each sample; None where it is that of the strong one.
    """

    x: Tensor
    moment: Moment
    moves: Tensor
    y: Condition | None
    null: Condition | None
    levels: list[int]
    guidance: list[Guidance | None]
    weak_levels: list[int | None]


class Trajectory:
    """Some samples on their way from noise to data, which take the same number of steps.

    Args:
        flow: see :func:`flow_of`.
        solver: one of :data:`~elit.flow.solvers.SOLVERS`.
        noise: states at t = 1, (B, *state_shape).
        times: (steps + 1, B) or, of a multi-scale model, (steps + 1, B, S), float64 on the CPU.
        levels: J~ for each step and sample.
        y, null: conditions of the samples and of their weak terms; None for an unconditional model.
        guidance, weak_levels: of each sample; by default none.
        seeds: of each sample, for the noise of stochastic solvers.
        device: where the states live.

    Attributes:
        x: the states at the end of the last complete step, float64.
        step: how many steps are complete.
        wanted: the evaluation that the solver waits for; None when the samples are done.
    """

    def __init__(
        self,
        flow: Flow,
        solver: Solver,
        noise: Tensor,
        times: Tensor,
        levels: Sequence[Sequence[int]],
        y: Condition | None = None,
        null: Condition | None = None,
        guidance: Sequence[Guidance | None] | None = None,
        weak_levels: Sequence[int | None] | None = None,
        seeds: Sequence[int] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        count = len(noise)
        self.flow, self.solver, self.y, self.null = flow, solver, y, null
        self.levels = [list(of_step) for of_step in levels]
        self.guidance: list[Guidance | None] = [None] * count if guidance is None else list(guidance)
        self.weak_levels: list[int | None] = [None] * count if weak_levels is None else list(weak_levels)
        self.seeds = list(range(count)) if seeds is None else list(seeds)
        self.x = noise.to(device, torch.float64)
        self.times = times
        self._times = times.to(device)  # once for all steps
        self.step = 0
        self._solver = self._evaluations()
        self.wanted: Evaluation | None = next(self._solver, None)  # there may be no step

    @property
    def steps(self) -> int:
        return len(self.times) - 1

    @property
    def is_done(self) -> bool:
        return self.wanted is None

    def answer(self, velocity: Tensor) -> None:
        """Takes the velocity (B, *state_shape) that was wanted, and goes on to the next evaluation or to the end."""
        try:
            self.wanted = self._solver.send(velocity)
        except StopIteration:
            self.wanted = None

    def samples(self) -> Tensor:
        """Returns the samples (B, C, H, W) in the model's space, float32."""
        return self.flow.to_samples(self.x.float())

    def _evaluations(self) -> Any:
        """Runs the solver step by step: a generator of evaluations, which is sent velocities."""
        for step in range(self.steps):
            start, end = self._moment(step), self._moment(step + 1)
            moves = self._times[step + 1] < 1
            this = Step(start, end, step == self.steps - 1, self.flow.path, partial(self._noise, step))
            solving: StepGenerator = self.solver.step(self.x, this)
            velocity = None
            while True:
                try:
                    x, moment = solving.send(velocity)  # type: ignore[arg-type]  # None starts it
                except StopIteration as done:
                    self.x = done.value
                    break
                velocity = yield Evaluation(
                    x, moment, moves, self.y, self.null, self.levels[step], self.guidance, self.weak_levels
                )
            self.step = step + 1

    def _moment(self, step: int) -> Moment:
        times = self._times[step]
        return Moment(self.times[step], times.float(), self.flow.spread(times))

    def _noise(self, step: int) -> Tensor:
        draws = normals([(seed, f"step {step}") for seed in self.seeds], self.flow.state_shape)
        return draws.to(self.x.device, torch.float64)


def advance(model: Model, trajectories: Sequence[Trajectory]) -> None:
    """Does the next evaluation of every trajectory that is not done, all of them in one batch."""
    waiting = [trajectory for trajectory in trajectories if not trajectory.is_done]
    wanted = [trajectory.wanted for trajectory in waiting if trajectory.wanted is not None]
    if not wanted:
        return
    velocity = evaluate(model, waiting[0].flow, merge(wanted))
    for trajectory, part in zip(waiting, velocity.split([len(each.x) for each in wanted]), strict=True):
        trajectory.answer(part)


def merge(wanted: Sequence[Evaluation]) -> Evaluation:
    """Puts evaluations into one batch."""
    if len(wanted) == 1:
        return wanted[0]
    x, moments, moves, y, null, levels, guidance, weak_levels = zip(*wanted, strict=True)
    return Evaluation(
        torch.cat(x),
        Moment(*(torch.cat(times) for times in zip(*moments, strict=True))),
        torch.cat(moves),
        None if y[0] is None else cat_conditions(*y),
        None if null[0] is None else cat_conditions(*null),
        list(chain.from_iterable(levels)),
        list(chain.from_iterable(guidance)),
        list(chain.from_iterable(weak_levels)),
    )


def evaluate(model: Model, flow: Flow, wanted: Evaluation) -> Tensor:
    """Returns guided velocities of states, (B, *state_shape) in float64; the model runs in its own dtype.

    The two terms of classifier-free guidance run as one batch, and those of autoguidance share the head and Read. The
    weak term of ``ccfg``, which has another condition and another level, is a forward of its own.
    """
    levels, guidance = wanted.levels, wanted.guidance
    active = [None if g is None else g.active(t) for g, t in zip(guidance, wanted.moment.host, strict=True)]
    guided = [i for i, on in enumerate(active) if on is not None and bool(on.any())]
    cfg, ag, ccfg = ([i for i in guided if (g := guidance[i]) and g.kind == kind] for kind in ("cfg", "ag", "ccfg"))
    weak_levels = {i: levels[i] if (level := wanted.weak_levels[i]) is None else level for i in guided}

    every = range(len(levels))
    rows = [*every, *range(len(every), len(every) + len(cfg)), *ag] if ag else None
    velocity = _forward(model, flow, wanted, every, cfg, [*levels, *(weak_levels[i] for i in cfg + ag)], rows)
    if ccfg:
        weak = _forward(model, flow, wanted, (), ccfg, [weak_levels[i] for i in ccfg])
        velocity = torch.cat((velocity, weak))
    if not guided:
        return velocity

    guided = cfg + ag + ccfg  # the order of the weak terms
    device, which = velocity.device, torch.tensor(guided, device=velocity.device)
    strong, weak = velocity[which], velocity[len(every) :]
    scales = torch.tensor([g.scale for i in guided if (g := guidance[i]) is not None], dtype=torch.float64)
    scale = scales.to(device).view(-1, *(1,) * (velocity.dim() - 1))
    on = flow.spread(torch.stack([on for i in guided if (on := active[i]) is not None]).to(device))
    mixed = torch.where(on, weak + scale * (strong - weak), strong)
    return velocity[: len(every)].index_copy(0, which, mixed)


def _forward(
    model: Model,
    flow: Flow,
    wanted: Evaluation,
    conditioned: Sequence[int],
    dropped: Sequence[int],
    levels: list[int],
    rows: Sequence[int] | None = None,
) -> Tensor:
    """Runs the model on some samples with their conditions and, behind them, on some without.

    Args:
        levels: of the samples in that order, or of ``rows``.
        rows: which of them to answer for, see :meth:`Model.at_levels`.
    """
    x, t, moves, y = wanted.x.to(model.dtype), wanted.moment.model, wanted.moves, wanted.y
    chosen = [*conditioned, *dropped]
    if chosen != list(range(len(x))):
        which = torch.tensor(chosen, device=x.device)
        x, t, moves = x[which], t[which], moves[which]
    if dropped:
        null = select_condition(wanted.null, torch.tensor(dropped, device=x.device))
        y = cat_conditions(y, null) if conditioned else null
    with torch.inference_mode():
        encoded = model.encode(flow.to_model(x, moves), t, y)
        level = levels[0] if len(set(levels)) == 1 else levels  # one level: the batch is not split
        velocity = flow.from_model(model.at_levels(encoded, level, rows))
    return velocity.to(torch.float64, copy=True)  # an ordinary tensor again
