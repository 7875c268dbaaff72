"""How fast is a forward and a training step on one CPU thread, at every budget, here and in another checkout?

    git worktree add ../before 8d1947a
    OMP_NUM_THREADS=1 python benchmarks/cpu.py --other ../before --parts forward,training,mixed

Parts `forward` and `training` time eager float32, eager bf16 and compiled layers at five budgets. All of them, and both
checkouts, take turns in one run, and each ratio is the median over turns of a ratio within a turn:

- speed-up: time of eager float32 here over time of this row; above 1 is faster;
- here / there: time here over time of the same row in the other checkout; below 1 is faster here;
- elastic efficiency: latency ratio to full budget over FLOPs ratio; 1 when time falls as FLOPs do, above 1 when less.

In a forward bf16 means weights of bf16, in training autocast. Part `mixed` times a batch of several budgets over the
sum of its parts, each budget's samples alone. Times are processor time, which other work on the machine changes little.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from against_checkout import Side, imported_from
from jsonargparse import auto_cli
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import elit
from elit.analysis import count_flops
from elit.analysis.environment import environment
from elit.atomic import write_json

BUDGETS = (1 / 16, 1 / 4, 1 / 2, 3 / 4, 1.0)
MIXES: dict[str, list[float]] = {
    "1/16, 1": [1 / 16, 1.0],
    "1/4, 1 in alternation": [1 / 4, 1.0] * 2,
    "1/16, 1/4, 1/2, 1": [1 / 16, 1 / 4, 1 / 2, 1.0],
    "7 of 1/4 and 1 of 1": [1 / 4] * 7 + [1.0],
    "2 of each of 1/16, 1/4, 1/2, 1": [1 / 16, 1 / 4, 1 / 2, 1.0] * 2,
}
Row = dict[str, Any]
Key = TypeVar("Key")


class Way(NamedTuple):
    """How a model is run."""

    dtype: torch.dtype
    compiled: bool

    def __str__(self) -> str:
        return f"{'compiled' if self.compiled else 'eager'} {'bf16' if self.dtype == torch.bfloat16 else 'float32'}"


class Case(NamedTuple):
    """What one time is of."""

    way: Way
    budget: float
    checkout: str


FLOAT32 = Way(torch.float32, False)


def forward_of(side: Side, way: Way, batch_size: int) -> Callable[[float], object]:
    """Returns what runs a forward at a budget."""
    side.model.to(way.dtype).eval().requires_grad_(False)
    x, t, y = side.inputs(batch_size)
    x = x.to(way.dtype)
    return lambda budget: side.model(x, t, y, budget=budget)


def compile_layers(library: Any, model: Any) -> None:
    """Compiles a model as its checkout does; one without :func:`elit.compile` only its blocks."""
    if hasattr(library, "compile"):
        library.compile(model)
        return
    for block in model.blocks:
        block.compile()


def training_of(side: Side, way: Way, batch_size: int) -> Callable[[float], object]:
    """Returns what runs a training step at a budget: forward, backward and AdamW."""
    parameters = [p for p in side.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    x, t, y = side.inputs(batch_size)
    target = torch.randn_like(x)

    def step(budget: float) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=way.dtype == torch.bfloat16):
            velocity: Tensor = side.model(x, t, y, budget=budget)
        F.mse_loss(velocity.float(), target).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def in_turns(runs: Mapping[Key, Callable[[], object]], turns: int, what: str) -> dict[Key, list[float]]:
    """Runs all of them in every turn, in alternating order, after a turn to warm up: processor seconds by turn."""
    seconds: dict[Key, list[float]] = {key: [] for key in runs}
    for turn in track(range(turns + 1), what):
        for key in list(runs) if turn % 2 else reversed(list(runs)):
            start = time.process_time()
            runs[key]()
            seconds[key].append(time.process_time() - start)
    return {key: found[1:] for key, found in seconds.items()}


def quartiles(values: Sequence[float]) -> list[float]:
    """Returns the lower quartile, the median and the upper quartile."""
    return statistics.quantiles(values, n=4)


def ratios(above: Sequence[float], below: Sequence[float], scale: float = 1) -> list[float]:
    """Returns the quartiles over turns of a ratio within a turn."""
    return quartiles([scale * a / b for a, b in zip(above, below, strict=True)])


def at_budgets(
    part: str, name: str, checkouts: Mapping[str, Any], ways: list[Way], batch: int, turns: int
) -> list[Row]:
    """Times a model's forward or training step at every budget, in every way, in every checkout."""
    prepare = forward_of if part == "forward" else training_of
    runs: dict[Case, Callable[[], object]] = {}
    weights, flops = None, {}
    for way in ways:
        for checkout, library in checkouts.items():
            side = Side(library, name, {}, weights)
            if weights is None:
                weights = {key: value.clone() for key, value in side.model.state_dict().items()}
                flops = {b: count_flops(side.model.config, side.model.level(b)).total for b in BUDGETS}
            run = prepare(side, way, batch)
            if way.compiled:
                compile_layers(library, side.model)
            runs.update({Case(way, budget, checkout): partial(run, budget) for budget in BUDGETS})
    seconds = in_turns(runs, turns, f"{name}, {part}")
    return [
        {
            "part": part,
            "model": name,
            "way": str(way),
            "budget": budget,
            "flops": flops[budget],
            "ms": [1000 * value for value in quartiles(seconds[Case(way, budget, "here")])],
            "speed-up": ratios(seconds[Case(FLOAT32, budget, "here")], seconds[Case(way, budget, "here")]),
            **{
                f"elastic efficiency {checkout}": ratios(
                    seconds[Case(way, budget, checkout)],
                    seconds[Case(way, 1.0, checkout)],
                    flops[1.0] / flops[budget],
                )
                for checkout in checkouts
            },
            "here / there": ratios(seconds[Case(way, budget, "here")], seconds[Case(way, budget, "there")])
            if "there" in checkouts
            else None,
        }
        for way in ways
        for budget in BUDGETS
    ]


def mixed(name: str, turns: int) -> Iterator[Row]:
    """Times a batch of several budgets over the sum of its parts, for every mix."""
    model = Side(elit, name, {}).model.eval().requires_grad_(False)
    for mix, budgets in MIXES.items():
        x, t = torch.randn(len(budgets), *model.input_shape()), torch.rand(len(budgets))
        y = torch.randint(model.config.num_classes, (len(budgets),))
        runs: dict[float, Callable[[], object]] = {0.0: partial(model, x, t, y, budgets)}
        for budget in set(budgets):
            rows = [i for i, of_sample in enumerate(budgets) if of_sample == budget]
            runs[budget] = partial(model, x[rows], t[rows], y[rows], budget)
        seconds = in_turns(runs, turns, f"{name}, mix of {mix}")
        whole = seconds.pop(0.0)
        parts = [sum(turn) for turn in zip(*seconds.values(), strict=True)]
        yield {
            "part": "mixed",
            "model": name,
            "mix": mix,
            "ms": [1000 * value for value in quartiles(whole)],
            "mixed / parts": ratios(whole, parts),
        }


def shown(values: Sequence[float] | None, digits: int = 3) -> str:
    """Writes a median and its quartiles."""
    if values is None:
        return "-"
    low, middle, high = (f"{value:.{digits}f}" for value in values)
    return f"{middle} ({low} to {high})"


def print_tables(console: Console, rows: list[Row]) -> None:
    """Prints what was measured: medians, with quartiles in brackets."""
    budgets = Table("part", "model", "way", "budget", "ms", "speed-up", "here / there", "elastic efficiency")
    mixes = Table("model", "mix", "ms", "mixed / sum of parts")
    for row in rows:
        if row["part"] == "mixed":
            mixes.add_row(row["model"], row["mix"], shown(row["ms"], 1), shown(row["mixed / parts"]))
        else:
            budgets.add_row(
                *(row["part"], row["model"], row["way"], str(Fraction(row["budget"])), shown(row["ms"], 1)),
                *(shown(row["speed-up"]), shown(row["here / there"]), shown(row["elastic efficiency here"])),
            )
    for table in (budgets, mixes):
        if table.row_count:
            console.print(table)


def benchmark(
    other: Path | None = None,
    parts: str = "forward,training,mixed",
    models: str = "ELIT-DiT-S/2,ELIT-DiT-B/2",
    dtypes: str = "float32,bf16",
    modes: Literal["eager", "eager,compiled"] = "eager,compiled",
    batch_size: int = 2,
    turns: int = 10,
    out: Path = Path("runs/cpu.json"),
) -> None:
    """Print the tables and write the numbers.

    Args:
        other: another checkout to compare with; none by default.
        parts: what to time, of forward, training and mixed; written with commas.
        models: named models with a latent interface, at 256px.
        dtypes: float32, or float32,bf16.
        modes: eager alone, or also with compiled layers.
        batch_size: images of a forward or a training step; a mix has its own.
        turns: how often each is timed.
        out: the JSON file.
    """
    if unknown := set(parts.split(",")) - {"forward", "training", "mixed"}:
        raise SystemExit(f"unknown parts {sorted(unknown)}; there are forward, training and mixed")
    if dtypes not in ("float32", "float32,bf16"):
        raise SystemExit(f"dtypes is {dtypes!r}; give float32 or float32,bf16")
    if torch.get_num_threads() != 1:
        raise SystemExit("processor time adds threads up: set OMP_NUM_THREADS=1")
    machine = environment()
    checkouts = {"here": elit} | ({} if other is None else {"there": imported_from(other.resolve())})
    kinds = [torch.float32] + [torch.bfloat16] * ("bf16" in dtypes)
    ways = [Way(dtype, compiled) for compiled in (False, True)[: len(modes.split(","))] for dtype in kinds]
    settings = {"batch_size": batch_size, "turns": turns}
    rows: list[Row] = []
    for name in models.split(","):
        for part in parts.split(","):
            rows += (
                mixed(name, turns) if part == "mixed" else at_budgets(part, name, checkouts, ways, batch_size, turns)
            )
            out.parent.mkdir(parents=True, exist_ok=True)
            write_json(out, {"environment": machine, "settings": settings, "rows": rows})
    console = Console(width=170)
    console.print(f"256px, batch {batch_size}, {turns} turns, {machine}", soft_wrap=True)
    print_tables(console, rows)


if __name__ == "__main__":
    auto_cli(benchmark)
