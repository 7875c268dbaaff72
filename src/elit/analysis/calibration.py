"""What the planner must know of a model on a device, measured once: what a sampling step costs at every level, how far
it then is from full budget, and what too few steps cost.

Errors are root mean squares over the elements of a *sample*: the velocity's error at (noise level, level) is taken on
the model's own trajectories, and multiplied by how much of a small change at that noise level remains in the sample.
"""

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from elit.analysis.environment import environment
from elit.analysis.flops import velocity_flops
from elit.analysis.measure import synchronize
from elit.atomic import write_json
from elit.conditions import Condition, map_condition
from elit.digest import weights_digest
from elit.errors import ElitError
from elit.flow import (
    Evaluation,
    Guidance,
    StepInfo,
    Trajectory,
    advance,
    evaluate,
    flow_of,
    sample,
    time_grid,
    weak_level,
)
from elit.flow.solvers import Moment, solver_named
from elit.models import Model
from elit.seeding import generator, normal

NOISE_LEVELS = 8  # at which the velocity is compared, evenly from t = 1
STEP_COUNTS = (2, 4, 8, 16, 32)  # at which the discretisation error is measured; it is a power law in between
REFERENCE_STEPS = 64
MAX_LEVELS = 9  # more are thinned out, evenly in the logarithm
TIMING_ROUNDS = 15


@dataclass(frozen=True)
class Option:
    """One way to guide, at every calibrated level of the strong term.

    Attributes:
        guidance: None is none.
        errors: of a guided velocity against the reference's, as it shows in the sample: (noise levels, levels).
        seconds: of one evaluation of a batch with guidance on: (levels,).
        flops: of one evaluation of one sample with guidance on: (levels,).
    """

    guidance: Guidance | None
    errors: list[list[float]]
    seconds: list[float]
    flops: list[int]


@dataclass(frozen=True)
class Calibration:
    """Of one model, device, batch size, solver and guidance.

    Attributes:
        levels: J~ that were measured, ascending; the last is J.
        times: noise levels, descending from 1.
        options: ways to guide, the one asked for first.
        seconds: of one evaluation of a batch without guidance: (levels,). ``flops`` likewise, of one sample.
        overhead: seconds of a call of :func:`elit.sample` beside its steps.
        step_counts: numbers of steps at which ``step_errors`` is the error of full budget.
        stamp: what was measured, with what and when.
    """

    levels: list[int]
    times: list[float]
    options: list[Option]
    seconds: list[float]
    flops: list[int]
    overhead: float
    step_counts: list[int]
    step_errors: list[float]
    solver: str
    stamp: dict[str, Any]

    def discretisation(self, steps: int) -> float:
        """Error of so many steps at full budget: a power law between what was measured, and beyond."""
        x, y = np.log(self.step_counts), np.log(self.step_errors)
        at = int(np.clip(np.searchsorted(x, np.log(steps)) - 1, 0, len(x) - 2))
        slope = (y[at + 1] - y[at]) / (x[at + 1] - x[at])
        return float(np.exp(y[at] + slope * (np.log(steps) - x[at])))

    def errors_at(self, option: Option, times: np.ndarray) -> np.ndarray:
        """Of the option's velocity at any noise levels, linear between those measured: (noise levels, levels)."""
        columns = np.array(option.errors[::-1]).T
        return np.stack([np.interp(times, self.times[::-1], column) for column in columns], axis=1)

    def save(self, path: Path) -> None:
        """Raises:
        ElitError: it cannot be written.
        """
        write_json(path, asdict(self), indent=None)

    @classmethod
    def load(cls, path: Path) -> "Calibration":
        """Raises:
        ElitError: the file is no calibration.
        """
        try:
            values = json.loads(path.read_text())
            options = [Option(**{**o, "guidance": guidance_from(o["guidance"])}) for o in values.pop("options")]
            return cls(options=options, **values)
        except (ValueError, TypeError, KeyError) as error:
            raise ElitError(f"{path} is no calibration, or a damaged one; delete it to measure again") from error


def guidance_from(values: dict[str, Any] | None) -> Guidance | None:
    """Guidance as it is read from JSON."""
    return None if values is None else Guidance(**{**values, "interval": tuple(values["interval"])})


def calibration_stamp(
    model: Model, batch_size: int, guidance: Guidance | None, solver: str, path: str, seed: int
) -> dict[str, Any]:
    """What a calibration depends on; two with equal stamps are the same measurement."""
    device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else model.device.type
    return {
        "model": weights_digest(model),
        "dtype": str(model.dtype),
        "device": device,
        "batch_size": batch_size,
        "guidance": json.loads(json.dumps(asdict(guidance))) if guidance else None,
        "solver": solver,
        "path": path,
        "seed": seed,
        **{k: v for k, v in environment().items() if k != "date"},
    }


def calibrate(
    model: Model,
    labels: Condition | Sequence[int] | None,
    *,
    batch_size: int = 1,
    guidance: Guidance | None = None,
    solver: str = "euler",
    path: str = "linear",
    num_samples: int = 8,
    seed: int = 0,
) -> Calibration:
    """Measures a model: some hundred forwards of ``num_samples`` samples, and the timing of steps of a batch.

    Args:
        labels: what to sample, one per sample; None for an unconditional model.
        batch_size: of which latencies are measured.
        guidance: to come close to. Of ``cfg``, whose weak term has the budget of the strong one, ``ccfg`` at every
            level is measured too.

    Raises:
        ElitError: a model that has no budgets to plan with, the stochastic solver, or guidance that does not fit.
    """
    if model.stage_shapes is not None or not model.levels:
        raise ElitError("planning needs a model with a latent interface, and not a multi-scale one (DFM)")
    if solver == "sde":
        raise ElitError("planning needs a deterministic solver, euler or heun: with sde no two budgets end alike")
    stamp = calibration_stamp(model, batch_size, guidance, solver, path, seed)
    levels = thinned(model.levels)
    options = _options(model, guidance, levels)
    probe = _Probe(model, labels, guidance, solver, path, num_samples, seed)
    errors = probe.velocity_errors(options, levels)
    counts, step_errors = probe.step_errors()
    clock = _Clock(model, labels, batch_size)
    seconds, by_option = clock.measure(options, levels)

    def flops(option: Guidance | None) -> list[int]:
        weak = None if option is None else weak_level(model, option)
        return [velocity_flops(model.config, level, option, weak) for level in levels]

    return Calibration(
        levels=list(levels),
        times=probe.times,
        options=[
            Option(option, error, of_option, flops(option))
            for option, error, of_option in zip(options, errors, by_option, strict=True)
        ],
        seconds=seconds,
        flops=flops(None),
        overhead=clock.overhead(levels[0] / model.num_latents, seconds[0]),
        step_counts=counts,
        step_errors=step_errors,
        solver=solver,
        stamp={**stamp, "date": environment()["date"]},
    )


def thinned(levels: Sequence[int], most: int = MAX_LEVELS) -> tuple[int, ...]:
    """At most so many of the levels, evenly in the logarithm, the first and the last among them."""
    if len(levels) <= most:
        return tuple(levels)
    wanted = np.geomspace(levels[0], levels[-1], most)
    return tuple(sorted({min(levels, key=lambda level: abs(level - w)) for w in wanted}))


def _options(model: Model, guidance: Guidance | None, levels: Sequence[int]) -> list[Guidance | None]:
    if guidance is None or guidance.kind != "cfg":
        return [guidance]
    return [guidance, *(replace(guidance, kind="ccfg", budget=level / model.num_latents) for level in levels)]


def _always(guidance: Guidance | None) -> Guidance | None:
    """The same at every time: what a guided step costs."""
    return guidance and replace(guidance, interval=(0.0, 1.0))


class _Probe:
    """Trajectories of a few samples at full budget, and what lower budgets and fewer steps do to them."""

    def __init__(
        self,
        model: Model,
        labels: Condition | Sequence[int] | None,
        guidance: Guidance | None,
        solver: str,
        path: str,
        num_samples: int,
        seed: int,
    ) -> None:
        self.model, self.guidance, self.flow = model, guidance, flow_of(model, path)
        self.solver = solver_named(solver)
        self.weak = weak_level(model, guidance) if guidance else None
        self.y = None if labels is None else _cycled(model.as_condition(labels), num_samples)
        self.null = None if self.y is None else model.null_condition(self.y)
        start = normal(generator(seed, "calibration"), (num_samples, *model.input_shape()))
        self.start = start.to(model.device, torch.float64)
        self.times = torch.linspace(1, 0, NOISE_LEVELS + 1, dtype=torch.float64)[:-1].tolist()

    def _run(self, steps: int, start: Tensor, skipped: int = 0) -> list[Tensor]:
        """Returns the states from the start on, at full budget, entering the grid of ``steps`` after those skipped."""
        count = len(start)
        times = time_grid("euler", steps)[skipped:]
        trajectory = Trajectory(
            self.flow,
            self.solver,
            start,
            times[:, None].expand(-1, count),
            [[self.model.levels[-1]] * count] * (len(times) - 1),
            self.y,
            self.null,
            [self.guidance] * count,
            [self.weak] * count,
            device=self.model.device,
        )
        states = [start]
        while not trajectory.is_done:
            advance(self.model, [trajectory])
            if trajectory.step == len(states):
                states.append(trajectory.x)
        return states

    def step_errors(self) -> tuple[list[int], list[float]]:
        """Of fewer steps, against ``REFERENCE_STEPS``."""
        reference = self._run(REFERENCE_STEPS, self.start)[-1]
        return list(STEP_COUNTS), [root_mean_square(self._run(n, self.start)[-1] - reference) for n in STEP_COUNTS]

    def velocity_errors(self, options: Sequence[Guidance | None], levels: Sequence[int]) -> list[list[list[float]]]:
        """Against the first option at full budget, as it shows in the sample: (options, noise levels, levels)."""
        states = self._run(NOISE_LEVELS, self.start)
        by_time = []
        for at, t in enumerate(self.times):
            velocities = self._velocities(states[at], torch.tensor(t, dtype=torch.float64), options, levels)
            full = velocities[0][-1]
            gain = self._gain(states, at, velocities[0][0] - full)
            by_time.append([[gain * root_mean_square(v - full) for v in row] for row in velocities])
        return [list(rows) for rows in zip(*by_time, strict=True)]

    def _velocities(
        self, x: Tensor, t: Tensor, options: Sequence[Guidance | None], levels: Sequence[int]
    ) -> list[list[Tensor]]:
        """Of every option at every level; each term is computed once."""
        cond = {level: self._term(x, t, self.y, level) for level in levels}
        if self.guidance is None or not self.guidance.active(t):
            return [list(cond.values()) for _ in options]
        y = self.null if self.guidance.drops_condition else self.y
        of_options = [weak_level(self.model, option) for option in options if option]
        weak_levels = {*levels, *(level for level in of_options if level is not None)}
        weak = {level: self._term(x, t, y, level) for level in weak_levels}

        def guided(option: Guidance, level: int) -> Tensor:
            of_option = weak_level(self.model, option)
            return option.combine(cond[level], weak[level if of_option is None else of_option])

        return [[guided(option, level) for level in levels] for option in options if option]

    def _term(self, x: Tensor, t: Tensor, y: Condition | None, level: int) -> Tensor:
        count = len(x)
        times = t.expand(count)
        moment = Moment(times, times.to(x.device, torch.float32), self.flow.spread(times.to(x.device)))
        moves = torch.ones(count, dtype=torch.bool, device=x.device)
        wanted = Evaluation(x, moment, moves, y, None, [level] * count, [None] * count, [None] * count)
        return evaluate(self.model, self.flow, wanted)

    def _gain(self, states: list[Tensor], at: int, direction: Tensor) -> float:
        """How much of a change of the state, of the size that one step makes, is left in the sample."""
        size = root_mean_square(direction)
        if size == 0:  # one level alone: nothing to plan with
            return 1.0
        change = -direction / NOISE_LEVELS
        moved = self._run(NOISE_LEVELS, states[at + 1] + change, skipped=at + 1)[-1]
        return root_mean_square(moved - states[-1]) / root_mean_square(change)


class _Clock:
    """Times the steps of :func:`elit.sample` itself."""

    def __init__(self, model: Model, labels: Condition | Sequence[int] | None, batch_size: int) -> None:
        self.model = model
        self.labels = None if labels is None else _cycled(model.as_condition(labels), batch_size)
        self.batch_size = batch_size

    def measure(
        self, options: Sequence[Guidance | None], levels: Sequence[int]
    ) -> tuple[list[float], list[list[float]]]:
        """Seconds of a step without guidance (levels,), and with each option (options, levels): medians of rounds.

        The terms of ``ccfg`` and ``ag`` run one after the other, so a weak term is timed at one level of the strong.
        """
        always = [_always(option) for option in options]
        rows = {None: levels} | {o: levels if o.kind == "cfg" else levels[:1] for o in always if o}
        rounds: dict[Guidance | None, list[list[float]]] = {option: [] for option in rows}
        for turn in range(TIMING_ROUNDS + 1):
            for option, row in rows.items():
                seconds = self._steps(option, row)
                if turn:  # the first warms up
                    rounds[option].append(seconds)
        medians = {o: [statistics.median(s) for s in zip(*turns, strict=True)] for o, turns in rounds.items()}
        plain = medians[None]

        def spread(row: list[float]) -> list[float]:
            return row if len(row) == len(levels) else [s + row[0] - plain[0] for s in plain]

        return plain, [spread(medians[option]) for option in always]

    def _steps(self, guidance: Guidance | None, levels: Sequence[int]) -> list[float]:
        """Seconds of one step at each level; a step before them takes the start of the call."""
        stamps: list[float] = []

        def stamp(info: StepInfo) -> None:
            synchronize(self.model.device)
            stamps.append(time.perf_counter())

        budgets = [level / self.model.num_latents for level in (levels[0], *levels)]
        self._sample(len(budgets), budgets, guidance, stamp)
        return [end - start for start, end in zip(stamps, stamps[1:], strict=False)]

    def overhead(self, budget: float, seconds: float) -> float:
        """Seconds of a call beside its steps."""
        calls = []
        for _ in range(TIMING_ROUNDS):
            start = time.perf_counter()
            self._sample(1, budget, None)
            synchronize(self.model.device)
            calls.append(time.perf_counter() - start)
        return max(0.0, statistics.median(calls) - seconds)

    def _sample(self, steps: int, budget: Any, guidance: Guidance | None, callback: Any = None) -> Tensor:
        return sample(
            self.model,
            self.labels,
            seeds=range(self.batch_size),
            steps=steps,
            budget=budget,
            guidance=guidance,
            batch_size=self.batch_size,
            callback=callback,
        )


def _cycled(y: Condition, count: int) -> Condition:
    """The first ``count`` conditions, from the start again where there are fewer."""
    return map_condition(lambda v: v[torch.arange(count, device=v.device) % len(v)], y)


def root_mean_square(x: Tensor) -> float:
    """Root mean square of each sample, averaged over samples."""
    return x.pow(2).flatten(1).mean(1).sqrt().mean().item()
