"""How well does the engine keep a latency objective as the load rises, and at which quality? Beside other policies.

    python benchmarks/serving.py --model runs/digits                 # everything, in half an hour
    python benchmarks/serving.py --model ELIT-SiT-S/2 --steps 4 --seconds 40 --loads 0.5,1,2,3 --patterns poisson

An open-loop generator submits requests at random times that the seed fixes, whatever the engine does. Load 1 is what
the engine serves at full budget when its queue never empties. Every policy runs on the same engine:

- elastic: the controller chooses budgets and, as requests begin, their steps, in the order of a calibration;
- budgets alone: the controller chooses budgets;
- fewer steps: full budget, and the controller chooses steps;
- fixed full, fixed low: the highest and the lowest budget;
- request-level: full budget, and a batch runs to its end before the next begins;
- one at a time: full budget, one image after the other.

All of them refuse a request at once that they predict to miss the objective. Attainment is the share of *offered*
requests that were finished in time: a refused one is a miss. A model's name in place of a folder means random weights.

On a machine that does other work too, `--clock processor` runs the same scheduler, controller and steps of the model on
the simulator's clock, which a batch moves on by the processor time that it took. It leaves out the engine's thread, its
locks and callbacks; `--clock wall` is the engine in real time.

Every cell of the measurement is a file in `--out`, so that the parts can run one by one and go on where they stopped:
`measure`, `overload` (3x for two minutes) and `report`, which also simulates every cell and judges the quality of its
mix: that of 500 images, of the same seeds for all cells, with budgets and steps as its requests were delivered.
"""

import json
import resource
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jsonargparse import auto_cli
from rich.console import Console

import elit
from elit.analysis import Calibration, calibrate
from elit.analysis.calibration import STEPS
from elit.analysis.environment import environment
from elit.atomic import write_json
from elit.data import digits
from elit.evaluation import Judge, train_classifier
from elit.flow import Guidance, Trajectory
from elit.models import Model
from elit.seeding import generator
from elit.serving import CostTable, Engine, EngineOptions, Event, Finished, Preview, QueueFull, Request
from elit.serving.costs import measure_costs
from elit.serving.engine import are_finite, new_job, serving_points
from elit.serving.job import Job, batch_seconds
from elit.serving.points import OperatingPoint, points_from
from elit.serving.scheduler import Scheduler, SchedulerOptions
from elit.serving.simulator import simulate

Clock = Literal["wall", "processor"]
FEWEST = 4  # what is asked for, over this, are the fewest steps that the controller gives
SATURATING = 100  # requests that are submitted at once to measure the capacity
QUALITY_SAMPLES = 500
OBJECTIVE = 2.5  # times what a full batch takes at full budget
OVERLOAD, OVERLOAD_SECONDS = 3.0, 120.0
BURST = (4.0, 1.0, 2.5, 0.5)  # seconds of a period, of its burst, and the rates within and outside, over the mean
console = Console(width=160)


# ------------------------------------------------------------------------------------------------ policies


class RequestLevel(Scheduler):
    """Runs a batch to its end before the next one begins."""

    def next_batch(self, now: float) -> list[Job]:
        """Returns the batch that runs, or forms another one."""
        return [job for job in self if job.started is not None] or super().next_batch(now)


@dataclass(frozen=True)
class Policy:
    """How requests are served: at which budget (None is the controller's), by which scheduler.

    Attributes:
        gives: what the controller chooses for requests: pairs of budgets and steps, steps, or nothing but budgets
            where ``budget`` leaves them to it.
    """

    budget: float | None = 1.0
    gives: Literal["pairs", "steps", "budgets"] = "budgets"
    scheduler: type[Scheduler] = Scheduler
    max_work: float | None = None


POLICIES = {
    "elastic": Policy(None, "pairs"),
    "budgets alone": Policy(None),
    "fewer steps": Policy(gives="steps"),
    "fixed full": Policy(),
    "fixed low": Policy(0.0),  # the lowest of the model
    "request-level": Policy(scheduler=RequestLevel),
    "one at a time": Policy(max_work=1e-9),
}


# ------------------------------------------------------------------------------------------------ the load


def arrival_times(pattern: str, rate: float, seconds: float, seed: int) -> list[float]:
    """Draws the times of requests: ``poisson`` at a constant rate, or ``bursts`` of the same mean rate."""
    draws = generator(seed, "arrivals", pattern, f"{rate:.6g}").exponential(1.0, int(3 * rate * seconds) + 50)
    units = np.cumsum(draws)  # a Poisson process of rate 1, whose clock runs faster within bursts
    if pattern == "poisson":
        times = units / rate
    else:
        period, burst, high, low = BURST
        ends = np.array([0.0, burst * high, burst * high + (period - burst) * low]) * rate
        whole, rest = np.divmod(units, ends[-1])
        times = whole * period + np.interp(rest, ends, [0.0, burst, period])
    return [float(each) for each in times[times < seconds]]


@dataclass(frozen=True)
class Setup:
    """What all cells share: the model, what is asked of it, and what was measured of it before."""

    model: Model
    steps: int
    guidance: Guidance | None
    costs: CostTable
    pairs: tuple[OperatingPoint, ...]
    objective: float
    capacity: float
    slowdown: float

    def request(self, policy: Policy, index: int) -> Request:
        """Returns the request with an index: labels in turn, seeds of their own."""
        budget = self.model.levels[0] / self.model.num_latents if policy.budget == 0 else policy.budget
        label = index % self.model.config.num_classes
        fewest = None if policy.gives == "budgets" else self.min_steps
        return Request(label, seed=index, steps=self.steps, min_steps=fewest, budget=budget, guidance=self.guidance)

    @property
    def min_steps(self) -> int:
        """The fewest steps that the controller gives."""
        return max(1, self.steps // FEWEST)

    def options(self, policy: Policy) -> EngineOptions:
        """Returns the options of the engine under a policy."""
        counts = (count for count in STEPS if self.min_steps <= count <= self.steps)
        points = {
            "pairs": self.pairs,
            "steps": tuple(OperatingPoint(self.model.levels[-1], count / self.steps) for count in counts),
            "budgets": None,
        }
        return EngineOptions(self.objective, points=points[policy.gives], max_work=policy.max_work)


def prepare(
    model: Model, steps: int, guidance: Guidance | None, objective: float | None, folder: Path, clock: Clock
) -> Setup:
    """Measures costs and capacity, or reads what was measured before."""
    file, calibrated = folder / "costs.json", folder / "calibration.json"
    if not (file.exists() and calibrated.exists()):
        costs = measure_costs(model)
        labels = list(range(model.config.num_classes))
        calibrate(model, labels, batch_size=int(costs.saturating_work()), guidance=guidance).save(calibrated)
        blank = Setup(model, steps, guidance, costs, (), 1e6, 0.0, 1.0)
        measured = drain_seconds(blank, clock)
        predicted = max(row["latency"] for row in simulated(blank, Policy(), [0.0] * SATURATING, slack=True))
        batch = steps * costs.forward({model.levels[-1]: costs.saturating_work()}) * measured / predicted
        write_json(
            file,
            {
                "costs": asdict(costs),
                "capacity": SATURATING / measured,
                "slowdown": measured / predicted,
                "objective": objective or OBJECTIVE * batch,
                "environment": environment(),
            },
        )
    found = json.loads(file.read_text())
    table = {**found["costs"], **{key: tuple(found["costs"][key]) for key in ("levels", "batch_sizes")}}
    costs = CostTable(**{**table, "seconds": tuple(map(tuple, table["seconds"]))})
    pairs = points_from(Calibration.load(calibrated), costs, steps, max(1, steps // FEWEST))
    return Setup(model, steps, guidance, costs, pairs, found["objective"], found["capacity"], found["slowdown"])


def drain_seconds(setup: Setup, clock: Clock) -> float:
    """Measures how long many requests at full budget take that come at once."""
    if clock == "processor":
        return max(row["latency"] for row in in_processor_time(setup, Policy(), [0.0] * SATURATING, slack=True))
    engine = Engine(setup.model, replace(setup.options(Policy()), latency_objective=None), setup.costs).start()
    engine.wait_until_ready()
    begun = time.perf_counter()
    for index in range(SATURATING):
        engine.submit(setup.request(Policy(), index), lambda event: None)
    engine.close()
    return time.perf_counter() - begun


# ------------------------------------------------------------------------------------------------ one cell


def measure(setup: Setup, policy: Policy, times: Sequence[float]) -> list[dict[str, Any]]:
    """Serves a load in real time and returns what became of each request."""
    engine = Engine(setup.model, setup.options(policy), setup.costs, policy.scheduler).start()
    engine.wait_until_ready()
    rows: list[dict[str, Any]] = [{"arrival": arrival, "latency": None} for arrival in times]
    problems: list[Event] = []

    def receiver(row: dict[str, Any]) -> Any:
        def receive(event: Event) -> None:
            if isinstance(event, Finished):
                levels = [round(budget * setup.model.num_latents) for budget in event.budgets]
                row.update(latency=event.latency, queued=event.queued, levels=levels)
            elif not isinstance(event, Preview):
                problems.append(event)

        return receive

    begun = time.perf_counter()
    for index, row in enumerate(rows):
        time.sleep(max(0.0, row["arrival"] - (time.perf_counter() - begun)))
        row["lag"] = time.perf_counter() - begun - row["arrival"]
        try:
            engine.submit(setup.request(policy, index), receiver(row))
        except QueueFull as refusal:
            row["retry_after"] = refusal.retry_after
    engine.close()
    status = engine.status()
    assert not problems, problems
    assert status.finished + status.refused == len(rows) and status.queued == status.in_flight == 0, status
    return rows


def on_virtual_clock(
    setup: Setup, policy: Policy, times: Sequence[float], seconds: Callable[[Sequence[Job]], float], slack: bool = False
) -> list[dict[str, Any]]:
    """Serves a load with the policy's scheduler on the simulator's clock; ``seconds`` says what a batch takes.

    Args:
        slack: without objective, to measure the capacity.
    """
    options = SchedulerOptions(
        serving_points(setup.model, setup.options(policy)),
        policy.max_work or setup.costs.saturating_work(),
        None if slack else setup.objective,
        refuse_late=not slack,
    )
    jobs = [
        replace_arrival(new_job(setup.request(policy, index), setup.model, 0.0), at) for index, at in enumerate(times)
    ]
    return [
        {"arrival": each.job.arrival, "latency": None}
        if each.finish is None
        else {"arrival": each.job.arrival, "latency": each.latency, "levels": each.job.delivered}
        for each in simulate(policy.scheduler(setup.costs, options), jobs, seconds)
    ]


def simulated(setup: Setup, policy: Policy, times: Sequence[float], slack: bool = False) -> list[dict[str, Any]]:
    """Does as :func:`measure`, with the seconds that the costs predict."""
    return on_virtual_clock(
        setup, policy, times, lambda batch: setup.slowdown * batch_seconds(batch, setup.costs), slack
    )


def in_processor_time(
    setup: Setup, policy: Policy, times: Sequence[float], slack: bool = False
) -> list[dict[str, Any]]:
    """Does as :func:`measure`, but on a clock that runs while the steps are computed: other work does not count."""
    flight: dict[Job, Trajectory] = {}

    def seconds(batch: Sequence[Job]) -> float:
        begun = time.process_time()
        for job in batch:
            if job not in flight:
                request = setup.request(policy, len(flight))
                told: dict[str, Any] = {"seeds": [request.seed], "steps": job.steps, "guidance": request.guidance}
                (flight[job],) = elit.trajectories(setup.model, request.labels(), **told)
            if flight[job].levels[job.step][0] != job.level:
                flight[job].set_level(job.level)
        elit.advance(setup.model, [flight[job] for job in batch])
        assert all(are_finite([flight[job] for job in batch]))
        return time.process_time() - begun

    return on_virtual_clock(setup, policy, times, seconds, slack)


def replace_arrival(job: Job, arrival: float) -> Job:
    """Lets a job come at another time."""
    job.arrival = arrival
    return job


def summary(rows: Sequence[dict[str, Any]], setup: Setup, seconds: float) -> dict[str, Any]:
    """Returns the figures of a cell."""
    served = [row for row in rows if row["latency"] is not None]
    latencies = [row["latency"] for row in served] or [float("nan")]
    steps = [level for row in served for level in row["levels"]]
    return {
        "offered": len(rows),
        "refused": len(rows) - len(served),
        "attainment": sum(latency <= setup.objective for latency in latencies) / max(1, len(rows)),
        **{f"p{q}": float(np.percentile(latencies, q)) for q in (50, 95, 99)},
        "throughput": len(served) / max([seconds, *(row["arrival"] + row["latency"] for row in served)]),
        "budget": float(np.mean(steps)) / setup.model.num_latents if steps else None,
        "steps": float(np.mean([len(row["levels"]) for row in served])) if served else None,
    }


# ------------------------------------------------------------------------------------------------ quality


class QualityMeter:
    """Judges images with the budgets and steps that requests were delivered; equal mixes are judged once."""

    def __init__(self, setup: Setup, file: Path) -> None:
        self.setup, self.file = setup, file
        self.known: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
        self.judge: Judge | None = None

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, float]:
        """Judges the mix of a cell."""
        served = [row["levels"] for row in rows if row["latency"] is not None]
        mix = Counter(map(tuple, served))
        key = json.dumps(sorted(mix.items())) if len(mix) > 1 else json.dumps(served[0])
        if key not in self.known:
            self.known[key] = self._judge(served)
            write_json(self.file, self.known)
        found: dict[str, float] = self.known[key]
        return found

    def _judge(self, served: Sequence[Sequence[int]]) -> dict[str, float]:
        if self.judge is None:
            train = digits()
            self.judge = Judge(train_classifier(train), train)
        which = generator(0, "quality").integers(len(served), size=QUALITY_SAMPLES)
        labels = torch.arange(QUALITY_SAMPLES) % 10
        schedules = [served[i] for i in which]
        longest = max(map(len, schedules))
        budgets = torch.ones(QUALITY_SAMPLES, longest, dtype=torch.float64)
        for row, schedule in zip(budgets, schedules, strict=True):
            row[: len(schedule)] = torch.tensor(schedule) / self.setup.model.num_latents
        images = elit.sample(
            self.setup.model,
            labels,
            seeds=range(QUALITY_SAMPLES),
            steps=[len(schedule) for schedule in schedules],
            budget=budgets,
            guidance=self.setup.guidance,
            batch_size=250,
        )
        return asdict(self.judge(images, labels))


# ------------------------------------------------------------------------------------------------ the parts


@dataclass(frozen=True)
class Cell:
    """One policy under one load."""

    pattern: str
    policy: str
    load: float

    @property
    def name(self) -> str:
        return f"{self.pattern}, {self.policy}, {self.load:g}"


def run_cells(
    setup: Setup, cells: Sequence[Cell], seconds: float, folder: Path, seed: int, until: float, clock: Clock
) -> None:
    """Measures the cells that are not there yet, as long as there is time."""
    serve = measure if clock == "wall" else in_processor_time
    for cell in cells:
        file = folder / f"{cell.name}.json"
        if file.exists():
            continue
        if time.monotonic() + 1.2 * seconds + setup.objective > until:
            console.print("out of time; call again to go on")
            return
        times = arrival_times(cell.pattern, cell.load * setup.capacity, seconds, seed)
        rows = serve(setup, POLICIES[cell.policy], times)
        write_json(file, {"seconds": seconds, "rows": rows, "environment": environment()}, indent=None)
        console.print(
            cell.name, {key: round(value, 3) for key, value in summary(rows, setup, seconds).items() if value}
        )


def run_overload(setup: Setup, folder: Path, seed: int) -> None:
    """Serves three times the capacity for two minutes and counts what became of every request."""
    file = folder / "overload.json"
    if file.exists():
        return
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times = arrival_times("poisson", OVERLOAD * setup.capacity, OVERLOAD_SECONDS, seed)
    rows = measure(setup, POLICIES["elastic"], times)
    found = summary(rows, setup, OVERLOAD_SECONDS)
    served = [row for row in rows if row["latency"] is not None]
    found["attainment of accepted"] = sum(row["latency"] <= setup.objective for row in served) / len(served)
    found["lost"] = len(rows) - len(served) - sum("retry_after" in row for row in rows)
    found["threads"] = threading.active_count()
    found["growth of memory (MB)"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    write_json(file, found)
    console.print(found)


def read_cells(cells: Sequence[Cell], folder: Path) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """Yields the cells that were measured."""
    for cell in cells:
        file = folder / f"{cell.name}.json"
        if file.exists():
            yield cell, json.loads(file.read_text())


def report(setup: Setup, cells: Sequence[Cell], folder: Path, seed: int, judged: bool) -> list[dict[str, Any]]:
    """Returns a row for each measured cell, with what the simulator predicts and the quality of its mix."""
    meter = QualityMeter(setup, folder / "quality.json")
    table = []
    for cell, found in read_cells(cells, folder):
        times = arrival_times(cell.pattern, cell.load * setup.capacity, found["seconds"], seed)
        virtual = summary(simulated(setup, POLICIES[cell.policy], times), setup, found["seconds"])
        table.append(
            {
                **asdict(cell),
                **summary(found["rows"], setup, found["seconds"]),
                "simulated": {key: virtual[key] for key in ("attainment", "p95", "budget", "steps")},
                "lag": max((row.get("lag", 0.0) for row in found["rows"]), default=0.0),
                **(meter(found["rows"]) if judged and any(r["latency"] for r in found["rows"]) else {}),
            }
        )
        write_json(folder / "report.json", table)
    return table


def print_table(table: Sequence[dict[str, Any]]) -> None:
    """Prints the report as Markdown."""
    print(
        "| arrivals | load | policy | in time (%) | simulated | refused (%) | p50 (ms) | p95 | p99 | images/s | budget "
        "| steps | accuracy (%) | Frechet distance |"
    )
    print("| --- | ---: | --- |" + " ---: |" * 11)
    for row in sorted(table, key=lambda row: (row["pattern"] != "poisson", row["load"])):
        quality = [f"{100 * row['accuracy']:.1f}", f"{row['frechet_distance']:.1f}"] if "accuracy" in row else ["", ""]
        cells = [
            *(row["pattern"], f"{row['load']:g}", row["policy"]),
            *(f"{100 * value:.1f}" for value in (row["attainment"], row["simulated"]["attainment"])),
            f"{100 * row['refused'] / max(1, row['offered']):.1f}",
            *(f"{1e3 * row[name]:.0f}" for name in ("p50", "p95", "p99")),
            *(f"{row['throughput']:.1f}", f"{row['budget'] or 0:.2f}", f"{row['steps'] or 0:.1f}", *quality),
        ]
        print("| " + " | ".join(cells) + " |")


def plot(table: Sequence[dict[str, Any]], setup: Setup, path: Path) -> None:
    """Draws attainment, p95 and, where it was judged, quality over load."""
    import matplotlib.pyplot as plt

    from elit.analysis.plots import STYLE, STYLES, save

    panels = [("attainment", "in time (% of offered)", 100.0), ("p95", "p95 latency (ms)", 1e3)]
    if any("accuracy" in row for row in table):
        panels += [("accuracy", "digit accuracy (%)", 100.0), ("frechet_distance", "Frechet distance", 1.0)]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.8))
        for axis, (key, label, scale) in zip(axes, panels, strict=True):
            for name, (color, marker) in zip(POLICIES, [*STYLES, ("#666666", "X")], strict=True):
                rows = [
                    r for r in table if r["policy"] == name and r["pattern"] == "poisson" and r.get(key) is not None
                ]
                if not rows:
                    continue
                rows.sort(key=lambda row: row["load"])
                loads = [row["load"] for row in rows]
                width = 2.5 if name == "elastic" else 1.2
                axis.plot(loads, [scale * r[key] for r in rows], color=color, marker=marker, lw=width, label=name)
                if key in ("attainment", "p95") and name == "elastic":
                    predicted = [scale * r["simulated"][key] for r in rows]
                    axis.plot(loads, predicted, color=color, ls=":", marker="x", label="elastic, simulated")
            axis.set(xlabel="offered load (1 = capacity at full budget)", ylabel=label)
        axes[0].axhline(95, color="#777777", lw=0.8, ls="--")
        axes[1].axhline(1e3 * setup.objective, color="#777777", lw=0.8, ls="--")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="lower center", ncol=len(labels), bbox_to_anchor=(0.5, -0.08))
        figure.tight_layout()
        save(figure, path)


def load_model(name: str) -> tuple[Model, bool]:
    """Loads a saved model, or makes a named one with random weights; returns it and whether it is one of digits."""
    if Path(name).exists():
        return elit.load(name).requires_grad_(False), True
    return elit.create(name, resolution=256).eval().requires_grad_(False), False


def benchmark(
    model: str = "runs/digits",
    parts: str = "measure,overload,report",
    policies: str = ",".join(POLICIES),
    patterns: str = "poisson,bursts",
    loads: str = "0.25,0.5,0.8,1.2,2,3",
    steps: int = 16,
    guidance_scale: float = 1.0,
    objective: float | None = None,
    seconds: float = 9.0,
    minutes: float = 1e9,
    seed: int = 0,
    clock: Clock = "wall",
    out: Path = Path("runs/serving"),
    figure: Path | None = None,
) -> None:
    """Measure the policies under load and print a table.

    Args:
        model: the run of elit quickstart, or a named model, which then has random weights and no quality.
        parts: of measure, overload and report, written with commas; the first measures costs and capacity.
        policies: which of them to measure.
        patterns: of arrivals: poisson and bursts.
        loads: offered, in multiples of the capacity at full budget.
        steps: of every request.
        guidance_scale: of classifier-free guidance, for digits; 1 is none.
        objective: seconds from a request to its image; by default 2.5 times what a full batch takes at full budget.
        seconds: of one cell.
        minutes: no cell begins that would end later; call again to go on.
        seed: of the arrivals.
        clock: wall, the engine in real time; or processor, see above.
        out: the folder of all cells, one for each model; each clock has a folder in it.
        figure: where to draw the figure, without its ending.
    """
    until = time.monotonic() + 60 * minutes
    net, is_digits = load_model(model)
    guidance = Guidance("cfg", guidance_scale) if is_digits and guidance_scale != 1 else None
    out = out / clock
    out.mkdir(parents=True, exist_ok=True)
    setup = prepare(net, steps, guidance, objective, out, clock)
    console.print(
        f"{environment()}\nobjective {setup.objective:.3f} s, capacity at full budget {setup.capacity:.2f} images/s, "
        f"batches take {setup.slowdown:.2f} of what the table says, and hold {setup.costs.saturating_work():g} rows"
    )
    cells = [
        Cell(pattern, policy, float(load))
        for pattern in patterns.split(",")
        for load in loads.split(",")
        for policy in policies.split(",")
    ]
    if "measure" in parts:
        run_cells(setup, cells, seconds, out, seed, until, clock)
    if "overload" in parts:
        run_overload(setup, out, seed)
    if "report" in parts:
        table = report(setup, cells, out, seed, is_digits)
        print_table(table)
        if figure is not None:
            plot(table, setup, figure)


if __name__ == "__main__":
    auto_cli(benchmark)
