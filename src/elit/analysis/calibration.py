"""Measures once what the planner must know of a model on a device: what a sampling step costs at every level, how far
it then is from the highest level, and what too few steps and a cache cost.

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
from elit.flow import Cache, Guidance, Trajectory, advance, flow_of, sample, weak_level
from elit.flow.caching import can_skip_core, embedding_changes
from elit.flow.solvers import solver_named
from elit.models import Model
from elit.seeding import generator, normal

FORMAT = 3  # of calibrations and plans; it rises when their numbers change their meaning
NOISE_LEVELS = 8  # at which the velocity is compared, evenly from t = 1
STEP_COUNTS = (2, 4, 8, 16, 32)  # at which the discretisation error is measured; it is a power law in between
STEPS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16, 18, 20, 24, 28, 32, 36, 40, 48, 56, 64)  # that plans may have
CACHES = (
    Cache(0.05, 1),
    Cache(0.1, 1),
    Cache(0.2, 1),
)  # extrapolating is nearer than reusing (docs/results/caching.md)
REFERENCE_STEPS = 64
MAX_LEVELS = 9  # of more, some are left out
TIMING_ROUNDS = 15


@dataclass(frozen=True)
class GuidanceTable:
    """What was measured of one way to guide, at every calibrated level of the strong term.

    Attributes:
        guidance: the way to guide; None is none.
        errors: of a guided velocity against the reference's, as it shows in the sample: (noise levels, levels).
        seconds: of one evaluation of a batch with guidance on: (levels,).
        flops: of one evaluation of one sample with guidance on: (levels,).
        seconds_skipped, flops_skipped: the same where a cache skips the core of both terms.
    """

    guidance: Guidance | None
    errors: list[list[float]]
    seconds: list[float]
    flops: list[int]
    seconds_skipped: list[float]
    flops_skipped: list[int]


@dataclass(frozen=True)
class StepTable:
    """What was measured of too few steps at the highest level, with a cache or without.

    Attributes:
        cache: None is none.
        errors: of each of ``STEP_COUNTS``, against many steps without a cache.
        core_runs: of each of ``STEPS``, at which steps the core runs.
    """

    cache: Cache | None
    errors: list[float]
    core_runs: list[list[bool]]

    def error(self, steps: int) -> float:
        """Predicts the error of so many steps, by a power law between those that were measured."""
        x, y = np.log(STEP_COUNTS), np.log(np.maximum(self.errors, 1e-12))
        at = int(np.clip(np.searchsorted(x, np.log(steps)) - 1, 0, len(x) - 2))
        slope = (y[at + 1] - y[at]) / (x[at + 1] - x[at])
        return float(np.exp(y[at] + slope * (np.log(steps) - x[at])))

    def runs(self, steps: int) -> list[bool]:
        """Tells at which of so many steps the core runs.

        Raises:
            ElitError: with a cache, a number of steps that plans do not have.
        """
        if self.cache is not None and steps not in STEPS:
            raise ElitError(f"steps is {steps}; with a cache, plans have one of {STEPS}")
        return [True] * steps if self.cache is None else self.core_runs[STEPS.index(steps)]


@dataclass(frozen=True)
class Calibration:
    """What was measured of one model, device, batch size, solver and guidance.

    Attributes:
        levels: J~ that were measured, ascending, all of them trained.
        num_latents: J; a level over it is a budget.
        times: noise levels, descending from 1.
        tables: one for each way to guide, the one asked for first.
        seconds: of one evaluation of a batch without guidance: (levels,). ``flops`` likewise, of one sample.
        seconds_skipped, flops_skipped: the same where a cache skips the core; of no use where the model has none to
            skip.
        overhead: seconds of a call of :func:`elit.sample` beside its steps.
        step_tables: one for each cache, the one without first.
        stamp: what was measured, with what and when.
    """

    levels: list[int]
    num_latents: int
    times: list[float]
    tables: list[GuidanceTable]
    seconds: list[float]
    flops: list[int]
    seconds_skipped: list[float]
    flops_skipped: list[int]
    overhead: float
    step_tables: list[StepTable]
    solver: str
    stamp: dict[str, Any]

    def errors_at(self, table: GuidanceTable, times: np.ndarray) -> np.ndarray:
        """Interpolates a table's errors at any noise levels, linearly: (noise levels, levels)."""
        columns = np.array(table.errors[::-1]).T
        return np.stack([np.interp(times, self.times[::-1], column) for column in columns], axis=1)

    def save(self, path: Path) -> None:
        """Writes the calibration to a JSON file.

        Raises:
            ElitError: it cannot be written.
        """
        write_json(path, asdict(self), indent=None)

    @classmethod
    def load(cls, path: Path) -> "Calibration":
        """Reads a calibration from its file.

        Raises:
            ElitError: the file is no calibration, or one of another version of the library.
        """
        try:
            values = json.loads(path.read_text())
            if is_current(values["stamp"]):
                tables = [
                    GuidanceTable(**{**t, "guidance": guidance_from(t["guidance"])}) for t in values.pop("tables")
                ]
                step_tables = [StepTable(**{**t, "cache": cache_from(t["cache"])}) for t in values.pop("step_tables")]
                return cls(tables=tables, step_tables=step_tables, **values)
        except (ValueError, TypeError, KeyError) as error:
            raise ElitError(f"{path} is no calibration, or a damaged one; delete it to measure again") from error
        raise ElitError(f"{path} was calibrated by another version of elit; delete it to measure again")


def guidance_from(values: dict[str, Any] | None) -> Guidance | None:
    """Builds guidance from what JSON keeps of it."""
    return None if values is None else Guidance(**{**values, "interval": tuple(values["interval"])})


def cache_from(values: dict[str, Any] | None) -> Cache | None:
    """Builds a cache from what JSON keeps of it."""
    return None if values is None else Cache(**values)


def is_current(stamp: dict[str, Any]) -> bool:
    """Tells whether numbers with this stamp have the meaning that this version gives them."""
    return stamp.get("format") == FORMAT


def calibration_stamp(
    model: Model, batch_size: int, guidance: Guidance | None, solver: str, path: str, seed: int
) -> dict[str, Any]:
    """Describes what a calibration depends on; two with equal stamps are the same measurement."""
    device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else model.device.type
    stamp = {
        "format": FORMAT,
        "model": weights_digest(model),
        "config": asdict(model.config),
        "levels": model.levels,
        "dtype": str(model.dtype),
        "compiled": model.is_compiled,
        "captured": model.is_captured,
        "float32_products": torch.get_float32_matmul_precision(),  # high is TF32
        "device": device,
        "batch_size": batch_size,
        "guidance": asdict(guidance) if guidance else None,
        "solver": solver,
        "path": path,
        "seed": seed,
        **{k: v for k, v in environment().items() if k != "date"},
    }
    plain: dict[str, Any] = json.loads(json.dumps(stamp))  # as it comes back from a file
    return plain


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
    """Measures a model at the levels that it was trained for: some hundred forwards of ``num_samples`` samples, and the
    timing of steps of a batch.

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
    levels = choose_levels(model.levels)
    ways = _ways_to_guide(model, guidance, levels)
    measurement = _ErrorMeasurement(_Samples(model, labels, num_samples, path), guidance, solver, seed)
    errors = measurement.velocity_errors(ways, levels)
    timer = _StepTimer(_Samples(model, labels, batch_size, path))
    seconds, seconds_guided = timer.measure(ways, levels)
    skips = can_skip_core(model)
    seconds_skipped, seconds_guided_skipped = timer.measure(ways, levels, True) if skips else (seconds, seconds_guided)

    def flops(way: Guidance | None, skips_core: bool = False) -> list[int]:
        weak = None if way is None else weak_level(model, way)
        return [velocity_flops(model.config, level, way, weak, skips_core) for level in levels]

    return Calibration(
        levels=list(levels),
        num_latents=model.num_latents,
        times=measurement.times,
        tables=[
            GuidanceTable(way, of_way, timed, flops(way), skipped, flops(way, skips_core=True))
            for way, of_way, timed, skipped in zip(ways, errors, seconds_guided, seconds_guided_skipped, strict=True)
        ],
        seconds=seconds,
        flops=flops(None),
        seconds_skipped=seconds_skipped,
        flops_skipped=flops(None, skips_core=True),
        overhead=timer.overhead(seconds[-1]),
        step_tables=measurement.step_tables(),
        solver=solver,
        stamp={**stamp, "date": environment()["date"]},
    )


def choose_levels(levels: Sequence[int], most: int = MAX_LEVELS) -> tuple[int, ...]:
    """Chooses at most so many of the levels, evenly in the logarithm, the first and the last among them."""
    if len(levels) <= most:
        return tuple(levels)
    wanted = np.geomspace(levels[0], levels[-1], most)
    return tuple(sorted({min(levels, key=lambda level: abs(level - w)) for w in wanted}))


def _ways_to_guide(model: Model, guidance: Guidance | None, levels: Sequence[int]) -> list[Guidance | None]:
    """Lists the ways to guide that are measured: the one asked for, and in place of ``cfg`` also ``ccfg``."""
    if guidance is None or guidance.kind != "cfg":
        return [guidance]
    return [guidance, *(replace(guidance, kind="ccfg", budget=level / model.num_latents) for level in levels)]


class _Samples:
    """Some samples of a model, to be started from any state, at any times and levels."""

    def __init__(self, model: Model, labels: Condition | Sequence[int] | None, count: int, path: str) -> None:
        self.model, self.count, self.flow = model, count, flow_of(model, path)
        self.labels = None if labels is None else _repeat(model.as_condition(labels), count)
        self.null = None if self.labels is None else model.null_condition(self.labels)

    def start(
        self,
        solver: str,
        noise: Tensor,
        times: Tensor,
        levels: Sequence[int],
        guidance: Guidance | None,
        cache: Cache | None = None,
        core_runs: Sequence[bool] = (),
    ) -> Trajectory:
        """Starts a trajectory of all samples.

        Args:
            noise: states (B, C, H, W) at the first time.
            times: (steps + 1,).
            levels: J~ of each step.
            core_runs: with a cache, whether the core runs at each step.
        """
        weak = None if guidance is None else weak_level(self.model, guidance)
        return Trajectory(
            self.flow,
            solver_named(solver),
            noise,
            times[:, None].expand(-1, self.count),
            [[level] * self.count for level in levels],
            self.labels,
            self.null,
            [guidance] * self.count,
            [weak] * self.count,
            cache=cache,
            core_runs=[[runs] * self.count for runs in core_runs],
            device=self.model.device,
        )


class _ErrorMeasurement:
    """Trajectories of a few samples at the highest level, and what lower levels and fewer steps do to them."""

    def __init__(self, samples: _Samples, guidance: Guidance | None, solver: str, seed: int) -> None:
        self.samples, self.model, self.flow = samples, samples.model, samples.flow
        self.guidance, self.solver = guidance, solver
        noise = normal(generator(seed, "calibration"), (samples.count, *self.flow.state_shape))
        self.noise = noise.to(self.model.device, torch.float64)
        self.times = self._grid(NOISE_LEVELS)[:-1].tolist()

    def _grid(self, steps: int) -> Tensor:
        return self.flow.times(solver_named(self.solver), steps)

    def _run(self, steps: int, start: Tensor, skipped: int = 0, cache: Cache | None = None) -> list[Tensor]:
        """Returns the states from the start on, at the highest level, entering the grid of ``steps`` after those
        skipped."""
        times = self._grid(steps)[skipped:]
        levels = [self.model.levels[-1]] * (len(times) - 1)
        core_runs = () if cache is None else cache.steps_that_run(embedding_changes(self.model, times))
        trajectory = self.samples.start(self.solver, start, times, levels, self.guidance, cache, core_runs)
        states = [start]
        while not trajectory.is_done:
            advance(self.model, [trajectory])
            if trajectory.step == len(states):
                states.append(trajectory.x)
        return states

    def step_tables(self) -> list[StepTable]:
        """Measures the errors of fewer steps, without a cache and with each, against ``REFERENCE_STEPS`` without."""
        reference = self._run(REFERENCE_STEPS, self.noise)[-1]
        skips = can_skip_core(self.model)
        changes = [embedding_changes(self.model, self._grid(steps)) for steps in STEPS] if skips else []
        tables = []
        for cache in (None, *CACHES) if skips else (None,):
            ends = [self._run(n, self.noise, cache=cache)[-1] for n in STEP_COUNTS]
            core_runs = [] if cache is None else [cache.steps_that_run(of_grid) for of_grid in changes]
            tables.append(StepTable(cache, [root_mean_square(end - reference) for end in ends], core_runs))
        return tables

    def velocity_errors(self, ways: Sequence[Guidance | None], levels: Sequence[int]) -> list[list[list[float]]]:
        """Measures errors against the first way to guide at the highest level, as they show in the sample: (ways, noise
        levels, levels)."""
        states = self._run(NOISE_LEVELS, self.noise)
        by_time = []
        for at, t in enumerate(self.times):
            velocities = self._velocities(states[at], torch.tensor(t, dtype=torch.float64), ways, levels)
            full = velocities[0][-1]
            gain = self._gain(states, at, velocities[0][0] - full)
            by_time.append([[gain * root_mean_square(v - full) for v in row] for row in velocities])
        return [list(rows) for rows in zip(*by_time, strict=True)]

    def _velocities(
        self, x: Tensor, t: Tensor, ways: Sequence[Guidance | None], levels: Sequence[int]
    ) -> list[list[Tensor]]:
        """Returns the velocity of every way to guide at every level; each term is computed once."""
        if self.guidance is None or not self.guidance.active(t):
            strong = self._terms(x, t, self.samples.labels, levels)
            return [list(strong.values()) for _ in ways]
        guided = [(way, weak_level(self.model, way)) for way in ways if way]
        every = sorted({*levels, *(weak for _, weak in guided if weak is not None)})
        strong = self._terms(x, t, self.samples.labels, every)
        weak_terms = self._terms(x, t, self.samples.null, every) if self.guidance.drops_condition else strong
        return [
            [way.combine(strong[level], weak_terms[level if weak is None else weak]) for level in levels]
            for way, weak in guided
        ]

    @torch.no_grad()
    def _terms(self, x: Tensor, t: Tensor, y: Condition | None, levels: Sequence[int]) -> dict[int, Tensor]:
        """Returns the velocity at each level, from one encoding."""
        times = t.to(x.device, torch.float32).expand(self.samples.count)
        encoded = self.model.encode(self.flow.to_model(x.to(self.model.dtype), torch.ones_like(times) > 0), times, y)
        return {level: self.flow.from_model(self.model.at_levels(encoded, level)).double() for level in levels}

    def _gain(self, states: list[Tensor], at: int, direction: Tensor) -> float:
        """Measures how much of a change of the state, of the size that one step makes, is left in the sample."""
        size = root_mean_square(direction)
        if size == 0:  # one level alone: nothing to plan with
            return 1.0
        change = -direction / NOISE_LEVELS
        moved = self._run(NOISE_LEVELS, states[at + 1] + change, skipped=at + 1)[-1]
        return root_mean_square(moved - states[-1]) / root_mean_square(change)


class _StepTimer:
    """Times the steps of trajectories, as :func:`elit.sample` takes them."""

    def __init__(self, samples: _Samples) -> None:
        self.samples, self.model = samples, samples.model
        self.noise = torch.zeros(samples.count, *samples.flow.state_shape, device=self.model.device)

    def measure(
        self, ways: Sequence[Guidance | None], levels: Sequence[int], skips_core: bool = False
    ) -> tuple[list[float], list[list[float]]]:
        """Times a step without guidance (levels,), and with each way to guide (ways, levels): medians of rounds.

        The first way is timed at every level. The others, ``ccfg`` beside ``cfg``, are timed at the lowest level of the
        strong term alone: their weak term is a forward of its own, which takes what it takes beside any strong term.

        Args:
            skips_core: time steps at which a cache skips the core.
        """
        always = [None if way is None else replace(way, interval=(0.0, 1.0)) for way in ways]
        rows = [(None, levels), (always[0], levels), *((way, levels[:1]) for way in always[1:])]
        turns = [[self._steps(*row, skips_core) for row in rows] for _ in range(TIMING_ROUNDS + 1)][1:]  # warmed up
        plain, first, *others = [
            [statistics.median(seconds) for seconds in zip(*of_row, strict=True)] for of_row in zip(*turns, strict=True)
        ]
        return plain, [first, *([seconds + lowest - plain[0] for seconds in plain] for (lowest,) in others)]

    def _steps(self, guidance: Guidance | None, levels: Sequence[int], skips_core: bool = False) -> list[float]:
        """Returns the seconds of one step at each level, after two that do not count.

        Levels fall from step to step, for a cache only has what it needs of lower ones.
        """
        falling = list(reversed(levels))
        times = torch.linspace(1, 0, len(levels) + 3, dtype=torch.float64)
        cache = (CACHES[0], [True, True, *(False for _ in levels)]) if skips_core else ()
        trajectory = self.samples.start("euler", self.noise, times, [*falling[:1] * 2, *falling], guidance, *cache)
        stamps = []
        while not trajectory.is_done:
            advance(self.model, [trajectory])
            synchronize(self.model.device)
            stamps.append(time.perf_counter())
        return [end - start for start, end in zip(stamps[1:], stamps[2:], strict=False)][::-1]

    def overhead(self, seconds: float) -> float:
        """Measures the seconds of a call of :func:`elit.sample` beside its steps, which take ``seconds`` each at the
        highest level."""
        calls, count = [], self.samples.count
        for _ in range(TIMING_ROUNDS):
            start = time.perf_counter()
            sample(self.model, self.samples.labels, seeds=range(count), steps=1, batch_size=count)
            synchronize(self.model.device)
            calls.append(time.perf_counter() - start)
        return max(0.0, statistics.median(calls) - seconds)


def _repeat(y: Condition, count: int) -> Condition:
    """Returns the first ``count`` conditions, from the start again where there are fewer."""
    return map_condition(lambda v: v[torch.arange(count, device=v.device) % len(v)], y)


def root_mean_square(x: Tensor) -> float:
    """Returns the root mean square of each sample, averaged over samples."""
    return x.pow(2).flatten(1).mean(1).sqrt().mean().item()
