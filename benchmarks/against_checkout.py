"""Did a change move a bit, or make anything slower? This checkout against another one, in one process.

    git worktree add ../before 8d1947a && OMP_NUM_THREADS=1 python benchmarks/against_checkout.py ../before

First it holds the two against each other bit by bit, on small models of every backbone with random weights and inputs:
forwards at several levels, a training step (loss, gradients, weights after AdamW), and samples from given noise. Then
it times both in turns: the ratio is the median over turns of (here / there), below 1 is faster here. Times are
processor time, which other work on the machine changes little; set OMP_NUM_THREADS=1, for it adds threads up.
"""

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table
from torch import Tensor

import elit
import elit.conditions
import elit.flow

BUDGETS = (1 / 16, 1 / 4, 1 / 2, 3 / 4, 1.0)
SMALL: dict[str, Any] = {"width": 64, "depth": 6, "num_heads": 4, "head_depth": 2, "tail_depth": 2}
CASES: dict[str, tuple[str, dict[str, Any]]] = {  # name, fields
    "DiT": ("DiT-S/2", {}),
    "ELIT-DiT": ("ELIT-DiT-S/2", {}),
    "ELIT-DiT, video": ("ELIT-DiT-S/2", {"input_size": (4, 16, 16), "patch_size": (1, 2, 2), "group_size": (2, 4, 4)}),
    "ELIT-SiT (tail visible)": ("ELIT-SiT-S/2", {"tail_visible": True, "write_depth": 2}),
    "UViT": ("UViT-S/2", {"depth": 8}),
    "ELIT-UViT": ("ELIT-UViT-S/2", {"depth": 8}),
    "HDiT": ("HDiT-S/2", {"inner_depth": 2}),
    "ELIT-HDiT": ("ELIT-HDiT-S/2", {"inner_depth": 2}),
    "MMDiT": ("MMDiT-S/2", {"text_width": 24}),
    "ELIT-MMDiT": ("ELIT-MMDiT-S/2", {"text_width": 24}),
    "ELIT-DFM-SiT": ("ELIT-DFM-SiT-S/2", {}),
}
GUIDANCE: dict[str, dict[str, Any] | None] = {
    "none": None,
    "cfg": {"kind": "cfg", "scale": 2.5, "interval": (0.0, 0.8)},
    "ccfg": {"kind": "ccfg", "scale": 2.5, "budget": 0.25},
    "ag": {"kind": "ag", "scale": 2.5, "budget": 0.25},
}


def imported_from(checkout: Path) -> Any:
    """Imports the ``elit`` of another checkout, beside the one that is imported already."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "elit"]:
        del sys.modules[name]
    checkout = checkout.resolve()
    sys.path.insert(0, str(checkout / "src"))
    import elit as other
    import elit.conditions
    import elit.flow.pyramid

    if not str(other.__file__).startswith(str(checkout)):
        raise SystemExit(f"{checkout} has no src/elit")
    return other


class Side:
    """One checkout with a model, given the same weights and inputs as the other."""

    def __init__(
        self, library: Any, name: str, fields: dict[str, Any], weights: dict[str, Tensor] | None = None
    ) -> None:
        self.library = library
        self.model = library.create(name, **fields).train()
        self.model.load_state_dict(random_weights(self.model) if weights is None else weights)
        self.multi_scale = bool(getattr(self.model, "stage_shapes", None))

    def inputs(self, batch_size: int) -> tuple[Any, Tensor, Any]:
        """Draws x, t and y; text is padded."""
        torch.manual_seed(1)
        x, t = example(self.model, batch_size)
        if hasattr(self.model.config, "text_width"):
            tokens = torch.randn(batch_size, 6, self.model.config.text_width)
            mask = torch.arange(6) < torch.randint(1, 7, (batch_size, 1))
            return x, t, self.library.conditions.Text(tokens, mask)
        return x, t, torch.randint(self.model.config.num_classes, (batch_size,))

    def run(self, inputs: tuple[Any, ...]) -> Any:
        return self.model(*inputs)

    def sample(self, y: Any, noise: Tensor) -> Tensor:
        return self.library.sample(self.model, y, noise=noise, steps=2)

    def forward(self, budget: float) -> list[Tensor]:
        with torch.no_grad():
            v = self.model(*self.inputs(3), budget=budget)
        return list(v) if self.multi_scale else [v]

    def training_step(self, budget: float) -> list[Tensor]:
        """Returns the loss, all gradients, and all weights after a step of AdamW."""
        start = {name: value.clone() for name, value in self.model.state_dict().items()}
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-3)
        loss = self.losses(budget).mean()
        loss.backward()
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]
        optimizer.step()
        found = [loss.detach(), *gradients, *(p.detach().clone() for p in parameters)]
        optimizer.zero_grad()
        self.model.load_state_dict(start)
        return found

    def losses(self, budget: float) -> Tensor:
        """Returns losses on fixed data, times and noise; of a multi-scale model with one stage masked."""
        flow = self.library.flow
        path = flow.path_named("linear")
        _, t, y = self.inputs(4)
        data = torch.randn(4, *self.model.input_shape())
        if not self.multi_scale:
            noise = torch.randn(4, *self.model.input_shape())
            return flow.flow_matching_loss(partial(self.model, y=y, budget=budget), data, t, noise, path)
        noises = [torch.randn(4, *shape) for shape in self.model.stage_shapes]
        if hasattr(flow, "flow_of"):
            return flow.flow_of(self.model).loss(partial(self.model, y=y, budget=budget), data, t, noises, active=1)
        model = lambda stages, t, active: self.model(stages, t, y, budget, active)  # noqa: E731
        return flow.pyramid_loss(model, data, t, noises, path, 1)

    def samples(self, solver: str, guidance: dict[str, Any] | None, budget: float) -> list[Tensor]:
        """Returns samples from given noise, after a few steps."""
        _, _, y = self.inputs(3)
        shapes = self.model.stage_shapes if self.multi_scale else [self.model.input_shape()]
        noise = torch.cat([torch.randn(3, *shape).flatten(1) for shape in shapes], dim=1)
        if not self.multi_scale:
            noise = noise.view(3, *shapes[0])
        chosen = None if guidance is None else self.library.Guidance(**guidance)
        with torch.no_grad():
            return [
                self.library.sample(
                    self.model, y, noise=noise, steps=4, solver=solver, guidance=chosen, budget=budget
                ).clone()
            ]


def example(model: Any, batch_size: int) -> tuple[Any, Tensor]:
    """Draws x and t of the shapes that a forward takes."""
    stages = getattr(model, "stage_shapes", None)
    if stages:
        return [torch.randn(batch_size, *shape) for shape in stages], torch.rand(batch_size, len(stages))
    return torch.randn(batch_size, *model.input_shape()), torch.rand(batch_size)


def random_weights(model: Any) -> dict[str, Tensor]:
    """Draws every weight, also those that start at zero, so that each path carries signal of about unit size."""
    torch.manual_seed(2)
    return {
        name: value if not value.requires_grad and name.endswith("positions") else drawn(name, value)
        for name, value in model.state_dict(keep_vars=True).items()
    }


def drawn(name: str, value: Tensor) -> Tensor:
    noise = torch.randn(value.shape)
    if "norm" in name:
        return 1 + 0.3 * noise
    return noise / value.shape[-1] ** 0.5 if value.dim() > 1 else 0.3 * noise


def checks(here: Side, there: Side) -> Iterator[tuple[str, Callable[[Side], list[Tensor]]]]:
    """Lists what is compared of a model, by name."""
    budgets = [b for b in BUDGETS if here.model.levels and b * here.model.num_latents >= here.model.levels[0]] or [1.0]
    for budget in budgets:
        yield f"forward at {budget:g}", partial(Side.forward, budget=budget)
    for budget in {budgets[0], budgets[-1]}:
        yield f"training step at {budget:g}", partial(Side.training_step, budget=budget)
    for kind, guidance in GUIDANCE.items():
        if kind in ("ccfg", "ag") and not here.model.levels:
            continue
        for solver in ("euler", "heun"):
            yield (
                f"samples by {solver}, guidance {kind}",
                partial(Side.samples, solver=solver, guidance=guidance, budget=budgets[-1]),
            )


def largest_difference(a: list[Tensor], b: list[Tensor]) -> float:
    """Returns the largest difference, relative to the largest value of its tensor; 0 where all bits are equal."""
    if all(torch.equal(x, y) for x, y in zip(a, b, strict=True)):
        return 0.0
    return max(
        float((x - y).abs().max() / y.abs().max().clamp_min(1e-30)) for x, y in zip(a, b, strict=True) if x.numel()
    )


def compare_bits(console: Console, other: Any) -> None:
    """Prints a line per model: how many checks are bit-equal, and which are not."""
    table = Table("model", "bit-equal", "others: largest relative difference", title="Bits", title_justify="left")
    for title, (name, fields) in CASES.items():
        fields = {"num_classes": 0 if "MMDiT" in name else 10, "input_size": 32} | SMALL | fields
        here = Side(elit, name, fields)
        there = Side(other, name, fields, {k: v.clone() for k, v in here.model.state_dict().items()})
        differences = {what: largest_difference(run(here), run(there)) for what, run in checks(here, there)}
        moved = {what: value for what, value in differences.items() if value}
        table.add_row(
            title,
            f"{len(differences) - len(moved)} of {len(differences)}",
            "\n".join(f"{what}: {value:.1e}" for what, value in moved.items()) or "-",
        )
    console.print(table)


def compare_times(console: Console, other: Any, models: list[str], batch_size: int, turns: int) -> None:
    """Prints the ratio of processor times (here / there) of forwards, training steps and sampling steps."""
    table = Table("model", "what", "here / there", "quartiles", title="Processor time", title_justify="left")
    for name in models:
        here = Side(elit, name, {})
        there = Side(other, name, {}, {k: v.clone() for k, v in here.model.state_dict().items()})
        inputs = here.inputs(batch_size)
        noise = torch.randn(batch_size, *here.model.input_shape())
        runs: dict[str, Callable[[Side], Any]] = {
            "forward": partial(Side.run, inputs=inputs),
            "training step": lambda side: side.losses(1.0).mean().backward(),
            "2 sampling steps": partial(Side.sample, y=inputs[2], noise=noise),
        }
        for what, run in runs.items():
            with torch.set_grad_enabled(what == "training step"):
                ratios = timed(run, here, there, turns)
            low, middle, high = statistics.quantiles(ratios, n=4)
            table.add_row(name, what, f"{middle:.3f}", f"{low:.3f} to {high:.3f}")
    console.print(table)


def timed(run: Callable[[Side], Any], here: Side, there: Side, turns: int) -> list[float]:
    """Runs both in turns, after one turn to warm up: the ratio of processor times of each turn."""
    ratios = []
    for turn in range(turns + 1):
        seconds = {}
        for side in (here, there) if turn % 2 else (there, here):
            start = time.process_time()
            run(side)
            seconds[side] = time.process_time() - start
            side.model.zero_grad()
        ratios.append(seconds[here] / seconds[there])
    return ratios[1:]


def compare(
    checkout: Path,
    models: list[str] | None = None,
    batch_size: int = 2,
    turns: int = 20,
    bits: bool = True,
    times: bool = True,
) -> None:
    """Print what is bit-equal, and the ratio of times.

    Args:
        checkout: the other one.
        models: named models to time; default ELIT-DiT-B/2.
        batch_size: images in a forward that is timed.
        turns: how often each is timed.
        bits: whether to compare results.
        times: whether to compare times.
    """
    console = Console(soft_wrap=True, highlight=False)
    other = imported_from(checkout)
    if bits:
        compare_bits(console, other)
    if times:
        compare_times(console, other, models or ["ELIT-DiT-B/2"], batch_size, turns)


if __name__ == "__main__":
    auto_cli(compare)
