"""Trajectories: samples in the making, which wait for the velocity that their solver wants next.

A :class:`Trajectory` holds samples that take the same number of steps; each has its own times, levels, guidance and
seed. :func:`advance` evaluates what any number of them want in one batch and hands out the answers.
:func:`elit.sample` advances its trajectories to the end; a server advances whatever is in flight.
"""

from collections.abc import Sequence
from functools import partial
from itertools import chain
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from elit.conditions import Condition, cat_conditions, select_condition
from elit.errors import ElitError
from elit.flow.caching import Cache, EffectMemory
from elit.flow.guidance import Guidance
from elit.flow.matching import Flow, FlowMatching
from elit.flow.paths import Path, data_estimate, path_named
from elit.flow.pyramid import PyramidFlow
from elit.flow.solvers import Moment, Solver, Step, StepGenerator
from elit.launch import to_device
from elit.models import Effect, Encoded, Model, Transformer
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
        memories: of each sample, what the core did to it before; None where none is kept.
        skips: whether each sample skips the core where its memory allows it.
    """

    x: Tensor
    moment: Moment
    moves: Tensor
    y: Condition | None
    null: Condition | None
    levels: list[int]
    guidance: list[Guidance | None]
    weak_levels: list[int | None]
    memories: list[EffectMemory | None]
    skips: list[bool]


class Trajectory:
    """Holds some samples on their way from noise to data, which take the same number of steps.

    Its solver says in ``wanted`` which velocity it needs next. :func:`advance` computes it and hands it over with
    :meth:`answer`. When ``is_done``, :meth:`samples` returns the result. :func:`elit.trajectories` makes trajectories
    from what :func:`elit.sample` takes.

    Args:
        flow: see :func:`flow_of`.
        solver: one of :data:`~elit.flow.solvers.SOLVERS`.
        noise: states at t = 1, (B, *state_shape).
        times: (steps + 1, B) or, of a multi-scale model, (steps + 1, B, S), float64 on the CPU.
        levels: J~ for each step and sample.
        y, null: conditions of the samples and of their weak terms; None for an unconditional model.
        guidance, weak_levels: of each sample; by default none.
        seeds: of each sample, for the noise of stochastic solvers.
        cache: when the core is skipped; ``core_runs`` then tells for each step and sample whether it runs.
        device: where the states live.

    Attributes:
        x: the states at the end of the last complete step, float64.
        step: how many steps are complete.
        step_has_begun: whether the step after these has had an evaluation already and wants another.
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
        cache: Cache | None = None,
        core_runs: Sequence[Sequence[bool]] = (),
        device: torch.device | str = "cpu",
    ) -> None:
        count = len(noise)
        self.flow, self.solver, self.y, self.null = flow, solver, y, null
        self.levels = [list(of_step) for of_step in levels]
        self.guidance: list[Guidance | None] = [None] * count if guidance is None else list(guidance)
        self.weak_levels: list[int | None] = [None] * count if weak_levels is None else list(weak_levels)
        self.seeds = list(range(count)) if seeds is None else list(seeds)
        self.memories = [None if cache is None else EffectMemory(cache) for _ in range(count)]
        self.core_runs = core_runs
        self.x = noise.to(device, torch.float64)
        self.times = times
        self._times = times.to(device)  # once for all steps
        self.step = 0
        self.step_has_begun = False
        self._last: tuple[Evaluation, Tensor] | None = None
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
        assert self.wanted is not None
        self._last = self.wanted, velocity
        self.step_has_begun = True
        try:
            self.wanted = self._solver.send(velocity)
        except StopIteration:
            self.wanted = None

    def set_level(self, level: int) -> None:
        """Takes all samples on at another level J~, from the next step that has not begun."""
        for of_step in self.levels[self.step + self.step_has_begun :]:
            of_step[:] = [level] * len(of_step)  # in place: the evaluation that is wanted looks at it

    def samples(self) -> Tensor:
        """Returns the samples (B, C, H, W) in the model's space, float32."""
        return self.flow.to_samples(self.x.float())

    def preview(self) -> Tensor:
        """Returns what the samples would be if they went straight on from the last evaluation: (B, C, H, W), float32.

        Before the first evaluation that is the noise.
        """
        if self._last is None:
            return self.samples()
        (x, moment, *_), velocity = self._last
        return self.flow.to_samples(data_estimate(self.flow.path, x, velocity, moment.state).float())

    def _evaluations(self) -> Any:
        """Runs the solver step by step: a generator of evaluations, which is sent velocities."""
        for step in range(self.steps):
            start, end = self._moment(step), self._moment(step + 1)
            moves = self._times[step + 1] < 1
            skips = [not runs for runs in self.core_runs[step]] if self.core_runs else [False] * len(self.x)
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
                    *(x, moment, moves, self.y, self.null, self.levels[step], self.guidance, self.weak_levels),
                    *(self.memories, skips),
                )
            self.step, self.step_has_begun = step + 1, False

    def _moment(self, step: int) -> Moment:
        times = self._times[step]
        return Moment(self.times[step], times.float(), self.flow.spread(times))

    def _noise(self, step: int) -> Tensor:
        draws = normals([(seed, f"step {step}") for seed in self.seeds], self.flow.state_shape)
        return draws.to(self.x.device, torch.float64)


def advance(model: Model, trajectories: Sequence[Trajectory]) -> None:
    """Computes the next velocity that each trajectory waits for, all of them in one batch, and hands it over.

    A step of ``euler`` and ``sde`` is one evaluation, and one of ``heun`` two. Trajectories that are done are left out.

    Args:
        trajectories: of this model, each named once. They may be at different steps.

    Raises:
        ElitError: one is named twice.
    """
    if len({id(trajectory) for trajectory in trajectories}) < len(trajectories):
        raise ElitError("a trajectory is named twice; each can take one step at a time")
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
    x, moments, moves, y, null, levels, guidance, weak_levels, memories, skips = zip(*wanted, strict=True)
    return Evaluation(
        torch.cat(x),
        Moment(*(torch.cat(times) for times in zip(*moments, strict=True))),
        torch.cat(moves),
        None if y[0] is None else cat_conditions(*y),
        None if null[0] is None else cat_conditions(*null),
        list(chain.from_iterable(levels)),
        list(chain.from_iterable(guidance)),
        list(chain.from_iterable(weak_levels)),
        list(chain.from_iterable(memories)),
        list(chain.from_iterable(skips)),
    )


def evaluate(model: Model, flow: Flow, wanted: Evaluation) -> Tensor:
    """Returns guided velocities of states, (B, *state_shape) in float64; the model runs in its own dtype.

    The two terms of classifier-free guidance run as one batch, and those of autoguidance share the head and Read. The
    weak term of ``ccfg``, which has another condition and another level, is a forward of its own.
    """
    batches = terms_of(wanted)
    parts = [forward_terms(model, flow, wanted, terms) for terms in batches]
    velocity = parts[0] if len(parts) == 1 else torch.cat(parts)
    guided = [term.sample for terms in batches for term in terms if term.name == "weak"]
    if not guided:
        return velocity
    count, device = len(wanted.levels), velocity.device
    which = to_device(guided, device)
    strong, weak = velocity[which], velocity[count:]
    scales = [g.scale for i in guided if (g := wanted.guidance[i])]
    scale = to_device(scales, device, torch.float64).view(-1, *(1,) * (velocity.dim() - 1))
    active = [g.active(wanted.moment.host[i]).tolist() for i in guided if (g := wanted.guidance[i])]
    on = flow.spread(to_device(active, device))
    mixed = torch.where(on, weak + scale * (strong - weak), strong)
    return velocity[:count].index_copy(0, which, mixed)


class Term(NamedTuple):
    """One velocity that guidance combines: of a sample, at a level, with its condition or without."""

    sample: int
    name: Literal["strong", "weak"]
    level: int
    drops_condition: bool = False


def terms_of(wanted: Evaluation) -> list[list[Term]]:
    """Lists the terms of what is wanted, by forward: first all strong ones, with the weak ones that run beside them."""
    strong = [Term(i, "strong", level) for i, level in enumerate(wanted.levels)]
    weak: dict[str, list[Term]] = {"cfg": [], "ag": [], "ccfg": []}
    for i, (guidance, t) in enumerate(zip(wanted.guidance, wanted.moment.host, strict=True)):
        if guidance is not None and bool(guidance.active(t).any()):
            level = wanted.levels[i] if (own := wanted.weak_levels[i]) is None else own
            weak[guidance.kind].append(Term(i, "weak", level, guidance.drops_condition))
    first = [*strong, *weak["cfg"], *weak["ag"]]
    return [first, weak["ccfg"]] if weak["ccfg"] else [first]


def forward_terms(model: Model, flow: Flow, wanted: Evaluation, terms: Sequence[Term]) -> Tensor:
    """Runs the model once for some terms: float64 velocities, one per term.

    Terms of the same sample and condition are encoded once. Those without a condition stand behind the others.
    """
    inputs = list(dict.fromkeys((term.sample, term.drops_condition) for term in terms))
    chosen = [sample for sample, _ in inputs]
    dropped = [sample for sample, drops_condition in inputs if drops_condition]
    x, t, moves, y = wanted.x.to(model.dtype), wanted.moment.model, wanted.moves, wanted.y
    if chosen != list(range(len(x))):
        which = to_device(chosen, x.device)
        x, t, moves = x[which], t[which], moves[which]
    if dropped:
        null = select_condition(wanted.null, to_device(dropped, x.device))
        y = cat_conditions(y, null) if len(dropped) < len(inputs) else null
    places = {of_input: place for place, of_input in enumerate(inputs)}
    rows = [places[term.sample, term.drops_condition] for term in terms]
    with torch.inference_mode():
        encoded = model.encode(flow.to_model(x, moves), t, y)
        if any(wanted.memories):
            answers = at_levels_with_memories(model, flow, wanted, encoded, terms, rows)
        else:
            levels = [term.level for term in terms]
            level = levels[0] if len(set(levels)) == 1 else levels  # one level: the batch is not split
            answers = model.at_levels(encoded, level, rows if len(terms) > len(inputs) else None)
        velocity = flow.from_model(answers)
    return velocity.to(torch.float64, copy=True)  # an ordinary tensor again


def at_levels_with_memories(
    model: Model, flow: Flow, wanted: Evaluation, encoded: Encoded, terms: Sequence[Term], rows: Sequence[int]
) -> Any:
    """Does as :meth:`Model.at_levels`, but skips the core where a sample's memory stands in for it, and remembers what
    the others do."""
    assert isinstance(model, Transformer)
    times = flow.noise_level(wanted.moment.host).tolist()
    effects = [remembered(wanted, term, times[term.sample]) for term in terms]
    answers, computed = model.at_levels_with_effects(encoded, [term.level for term in terms], rows, effects)
    for place, effect in computed().items():
        sample, name = terms[place][:2]
        if memory := wanted.memories[sample]:
            memory.keep(name, times[sample], effect)
    return answers


def remembered(wanted: Evaluation, term: Term, t: float) -> Effect | None:
    """Returns the effect that stands in for the core of a term at time t; None where the core has to run."""
    memory = wanted.memories[term.sample]
    return memory.recall(term.name, t, term.level) if memory and wanted.skips[term.sample] else None
