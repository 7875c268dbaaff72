"""Make a pretrained transformer elastic: a DiT that diffusers alone trained, before and after a short distillation.

    python experiments/retrofit.py     # docs/results/retrofit.md
    python experiments/retrofit.py --table_only true     # what is there so far

The base is a small ``DiTTransformer2DModel`` of digits that predicts noise, trained with the loop of every tutorial and
the scheduler of diffusers. :func:`elit.elastify` makes it elastic with each of the two starts, and both are distilled
alike. Everything is continued where it was interrupted.
"""

import copy
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMScheduler, DiTTransformer2DModel
from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import elit
from common import interval, shown
from elit import atomic
from elit.analysis.environment import environment
from elit.analysis.plots import GREY, STYLE, STYLES, budget_label, save
from elit.data import digits, sample_indices
from elit.evaluation import Judge, train_classifier
from elit.integrations.distillation import distillation_loss
from elit.interface import draw_level
from elit.seeding import generator, integers, normal, normals, permutation, torch_seeded

NULL = 1000  # the label that pipelines of DiT mean by "no class"
BUDGETS = (1.0, 1 / 2, 1 / 4, 1 / 8)
MARKS = (0, 100, 500, 2000)
STARTS = ("base", "paper")
SAMPLES, SAMPLING_STEPS, GUIDANCE_SCALE = 300, 20, 2.0
NOISE = DDPMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2")
DATA = digits()


@dataclass(frozen=True)
class Setting:
    """How large the experiment is.

    Attributes:
        seeds: distillations with each start. There is one base.
        base_steps: of the training of the base, each of 64 images.
        batch_size: of the distillation, which takes 2,000 steps.
        out: where everything is kept.
        table_only: train nothing, and show what is there.
    """

    seeds: int = 3
    base_steps: int = 1200
    batch_size: int = 32
    out: Path = Path("runs/retrofit")
    table_only: bool = False


# ------------------------------------------------------------------------------------------------ training


class Average(nn.Module):
    """A moving average of weights."""

    model: Any

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__()
        self.model, self.decay = copy.deepcopy(model).eval().requires_grad_(False), decay

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        for average, value in zip(self.model.parameters(), model.parameters(), strict=True):
            average.lerp_(value, 1 - decay)


class Optimizers:
    """Muon for the matrices of the blocks, of Read and of Write, and AdamW for the rest, as in the quickstart."""

    def __init__(self, model: Any) -> None:
        named = dict(model.named_parameters())
        inside = {name for name in named if name.startswith(("transformer_blocks.", "elit."))}
        matrices = [v for name, v in named.items() if name in inside and v.dim() == 2 and "embedder" not in name]
        others = [value for value in named.values() if not any(value is matrix for matrix in matrices)]
        muon: dict[str, Any] = {"momentum": 0.9, "weight_decay": 0.0, "ns_steps": 4, "adjust_lr_fn": "original"}
        self.each = [
            (3e-2, torch.optim.Muon(matrices, **muon)),
            (2e-3, torch.optim.AdamW(others, betas=(0.9, 0.99), weight_decay=0.0)),
        ]

    def step(self, factor: float) -> None:
        """Takes a step at a fraction of the learning rates."""
        for lr, optimizer in self.each:
            for group in optimizer.param_groups:
                group["lr"] = lr * factor
            optimizer.step()
            optimizer.zero_grad()

    def state_dict(self) -> list[Any]:
        return [optimizer.state_dict() for _, optimizer in self.each]

    def load_state_dict(self, states: list[Any]) -> None:
        for (_, optimizer), state in zip(self.each, states, strict=True):
            optimizer.load_state_dict(state)


def fit(
    model: Any, loss: Callable[[int], Tensor], steps: int, lr: Callable[[int], float], decay: float, folder: Path
) -> Any:
    """Trains a model, continuing what is in a folder, and returns the average of its weights.

    The averages after the steps of ``MARKS``, and the last one, are saved as diffusers saves models.
    """
    last = folder / f"step-{steps}"
    average = Average(model, decay)
    optimizer = Optimizers(model)
    state, first = folder / "state.pt", 0
    if state.exists() and not last.exists():
        kept = torch.load(state, weights_only=True)
        model.load_state_dict(kept["model"])
        average.load_state_dict(kept["average"])
        optimizer.load_state_dict(kept["optimizer"])
        first = kept["step"]
    if last.exists():
        return type(model).from_pretrained(last).eval()
    for step in range(first, steps):
        if step in MARKS:
            average.model.save_pretrained(folder / f"step-{step}")
        value = loss(step)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(lr(step))
        average.update(model, step)
        if step % 50 == 0:
            print(f"{folder} step {step} loss {value.item():.4f}", flush=True)
        if (step + 1) % 200 == 0:
            kept = {"model": model.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict()}
            with atomic.atomic_file(state) as path:
                torch.save(kept | {"step": step + 1}, path)
    average.model.save_pretrained(last)
    return average.model


def batch(seed: int, step: int, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns noisy images, their times, labels (a tenth of them dropped), and the noise."""
    x, y = DATA.batch(sample_indices(seed, step * size, size, len(DATA)))
    rng = generator(seed, "retrofit", step)
    noise, t = normal(rng, x.shape), integers(rng, NOISE.config.num_train_timesteps, len(x))
    dropped = torch.from_numpy(rng.random(len(x)) < 0.1)
    return NOISE.add_noise(x, noise, t), t, y.masked_fill(dropped, NULL), noise


def train_base(setting: Setting) -> Any:
    """Trains the base: noise prediction, as any tutorial of diffusers does."""
    with torch_seeded(0, "weights"):
        model = DiTTransformer2DModel(
            num_attention_heads=4, attention_head_dim=12, in_channels=1, num_layers=6, sample_size=16, patch_size=2
        ).eval()  # in training mode each block would drop labels of its own
    for layer in (model.proj_out_2, *(block.norm1.linear for block in model.transformer_blocks)):
        nn.init.zeros_(layer.weight)  # adaLN-Zero, which diffusers leaves to the checkpoint
        nn.init.zeros_(layer.bias)

    def loss(step: int) -> Tensor:
        x, t, y, noise = batch(0, step, 64)
        return F.mse_loss(model(x, t, y).sample, noise)

    def lr(step: int) -> float:
        return min(1, (step + 1) / 50, 2 * (1 - step / setting.base_steps))

    return fit(model, loss, setting.base_steps, lr, 0.99, setting.out / "base")


def distil(setting: Setting, base: Any, start: Any, seed: int) -> None:
    """Makes the base elastic with a start, and distils it into itself at random budgets."""
    base = copy.deepcopy(base).requires_grad_(False)
    with torch_seeded(seed, "weights"):
        model = elit.elastify(copy.deepcopy(base).requires_grad_(True), start=start)

    def loss(step: int) -> Tensor:
        x, t, y, noise = batch(seed + 1, step, setting.batch_size)
        with torch.no_grad():
            of_base = base(x, t, y).sample
        predicted = model(x, t, y, num_latents=draw_level(model.levels, seed, step)).sample
        return distillation_loss(predicted, noise, of_base)

    folder = setting.out / f"{start}-{seed}"
    fit(model, loss, MARKS[-1], lambda step: 0.3 * min(1, (step + 1) / 50), 0.99, folder)


# ------------------------------------------------------------------------------------------------ measuring


@torch.inference_mode()
def sample(model: Any, steps: int, **budget: Any) -> tuple[Tensor, Tensor]:
    """Draws samples with the scheduler of diffusers and classifier-free guidance, both terms at one budget.

    Returns:
        Images (M, 1, 16, 16) and the labels asked for (M,).
    """
    scheduler = DDIMScheduler.from_config(NOISE.config, timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    labels = torch.arange(SAMPLES) % 10
    both = torch.cat((labels, torch.full_like(labels, NULL)))
    x = normals([(seed, "retrofit") for seed in range(SAMPLES)], (1, 16, 16))
    for t in scheduler.timesteps:
        strong, weak = model(torch.cat((x, x)), t.expand(len(both)), both, **budget).sample.chunk(2)
        x = scheduler.step(weak + GUIDANCE_SCALE * (strong - weak), t, x).prev_sample
    return x.clamp(-1, 1), labels


def measured(
    setting: Setting,
    name: str,
    judge: Callable[[], Judge],
    load: Callable[[], Any],
    draw: Callable[..., tuple[Tensor, Tensor]] = sample,
    **how: Any,
) -> None:
    """Samples and judges once, and keeps the result in a file."""
    path = setting.out / "points" / f"{name}.json"
    if not path.exists():
        quality = judge()(*draw(load(), **how))
        atomic.write_json(path, {"accuracy": quality.accuracy, "frechet_distance": quality.frechet_distance})
        print(name, quality, flush=True)


def flops(model: Any, **budget: Any) -> int:
    """Counts the FLOPs of one forward of one sample."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 1, 16, 16), torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long), **budget)
    return counter.get_total_flops()


@torch.inference_mode()
def milliseconds(model: Any, **budget: Any) -> float:
    """Measures the time of a forward of 64 samples: the median of 15."""
    inputs = torch.randn(64, 1, 16, 16), torch.full((64,), 500), torch.arange(64) % 10
    times = []
    for _ in range(18):
        begin = time.perf_counter()
        model(*inputs, **budget)
        times.append(time.perf_counter() - begin)
    return 1e3 * float(torch.tensor(times[3:]).median())


def steps_of_base(base: Any, elastic: Any) -> list[int]:
    """Returns the steps of the base that cost what all steps of the elastic model cost at its budgets, falling."""
    shares = (flops(elastic, budget=budget) / flops(base) for budget in BUDGETS[1:])
    return sorted({SAMPLING_STEPS, *(round(SAMPLING_STEPS * share) for share in shares)}, reverse=True)


def run(setting: Setting) -> None:
    if setting.table_only:
        return report(setting)
    base = train_base(setting)
    judges: list[Judge] = []

    def judge() -> Judge:
        if not judges:
            judges.append(Judge(train_classifier(DATA), DATA))
        return judges[0]

    elastic = elit.elastify(base)
    real = permutation(generator("held-out"), len(held_out := digits(held_out=True)))[:SAMPLES]
    measured(setting, "held-out", judge, lambda: None, draw=lambda _: held_out.batch(real))
    for steps in steps_of_base(base, elastic):
        measured(setting, f"base-{steps}", judge, lambda: base, steps=steps)
    for seed in range(setting.seeds):
        for start in STARTS:
            distil(setting, base, start, seed)
            for mark in MARKS:
                folder = setting.out / f"{start}-{seed}" / f"step-{mark}"
                for budget in BUDGETS:
                    name = f"{start}-{seed}-{mark}-{budget:g}"
                    load = lambda folder=folder: type(elastic).from_pretrained(folder).eval()  # noqa: E731
                    measured(setting, name, judge, load, steps=SAMPLING_STEPS, budget=budget)
    return report(setting)


# ------------------------------------------------------------------------------------------------ the report


def point(setting: Setting, name: str) -> dict[str, float] | None:
    path = setting.out / "points" / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def report(setting: Setting) -> None:
    """Prints the tables, and writes results and figure."""
    base = DiTTransformer2DModel.from_pretrained(setting.out / "base" / f"step-{setting.base_steps}").eval()
    elastic, console = elit.elastify(base), Console(width=120)
    full = flops(base)
    cost = Table("", "budget", "MFLOPs", "of base", "ms (64 samples)", title="one forward")
    cost.add_row("base", "", f"{full / 1e6:.2f}", "1.000", f"{milliseconds(base):.1f}")
    for budget in BUDGETS:
        of_budget = flops(elastic, budget=budget)
        duration = milliseconds(elastic, budget=budget)
        shares = (f"{of_budget / 1e6:.2f}", f"{of_budget / full:.3f}", f"{duration:.1f}")
        cost.add_row("elastic", budget_label(budget), *shares)
    console.print(cost)

    quality = Table("", "steps of training", "budget", "accuracy", "Frechet distance", "seeds", title="samples")
    singles = {"held-out": "held-out images"}
    singles |= {f"base-{steps}": f"base, {steps} sampling steps" for steps in steps_of_base(base, elastic)}
    for name, title in singles.items():
        if (found := point(setting, name)) is not None:
            quality.add_row(title, "", "", f"{found['accuracy']:.3f}", f"{found['frechet_distance']:.2f}", "")
    series: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for start in STARTS:
        for mark in MARKS:
            for budget in BUDGETS:
                names = [f"{start}-{seed}-{mark}-{budget:g}" for seed in range(setting.seeds)]
                points = [each for each in (point(setting, name) for name in names) if each is not None]
                if not points:
                    continue
                accuracy = interval(each["accuracy"] for each in points)
                distance = interval(each["frechet_distance"] for each in points)
                alone = len(points) == 1  # no interval
                values = (
                    (f"{accuracy[0]:.3f}", f"{distance[0]:.2f}") if alone else (shown(accuracy, 3), shown(distance, 2))
                )
                cells = (budget_label(budget), *values, str(len(points)))
                quality.add_row(f"start {start}", f"{mark:,}", *cells)
                series.setdefault(start, {}).setdefault(budget_label(budget), []).append((mark, distance[0]))
    console.print(quality)
    atomic.write_json(setting.out / "results.json", {"environment": environment(), "frechet distance": series})
    plot(setting, series)


@mpl.rc_context(STYLE)
def plot(setting: Setting, series: dict[str, dict[str, list[tuple[float, float]]]]) -> None:
    """Draws the Frechet distance over the steps of distillation, one panel per start."""
    figure, panels = plt.subplots(1, len(STARTS), figsize=(8.4, 3.4), sharey=True)
    reference = point(setting, f"base-{SAMPLING_STEPS}")
    for panel, start in zip(panels, STARTS, strict=True):
        for (budget, points), (colour, marker) in zip(series.get(start, {}).items(), STYLES, strict=False):
            marks, distances = zip(*points, strict=True)
            panel.plot([MARKS.index(mark) for mark in marks], distances, color=colour, marker=marker, label=budget)
        if reference is not None:
            panel.axhline(reference["frechet_distance"], color=GREY, linewidth=0.8)
        panel.set_xticks(range(len(MARKS)), [f"{mark:,}" for mark in MARKS])
        panel.set_xlabel("steps of distillation")
        panel.set_title(f"start: {start}", fontsize=10)
        panel.set_yscale("log")
    panels[0].set_ylabel("Frechet distance")
    panels[0].legend(fontsize=8, title="budget")
    save(figure, setting.out / "retrofit.png")


if __name__ == "__main__":
    run(auto_cli(Setting))
