"""Zero-padded inputs (the paper's Fig. 2): who turns the compute of empty tokens into quality?

    python experiments/padding.py     # docs/results/experiments.md

A crop is 4x4 tokens, alone or in the middle of 8x8 tokens of zeros: the same content at four times the cost. It lies
across four windows, a quarter in each. ELIT runs at 3/4 of its latents, where it costs what DiT costs within 5 %. The
loss is that of the crop's pixels alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial

import torch
import torch.nn.functional as F
from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table
from torch import Tensor

from common import DIGITS, Point, Setting, Variant, above, interval, plot_losses, shown, train, write_json
from elit.analysis import attention_maps, count_flops
from elit.data import ImageData
from elit.flow import flow_matching_error, path_named
from elit.models import Model
from elit.seeding import generator, normal
from elit.training import ElasticConfig
from photographs import SIDE, photographs

PATCH = 4
BORDER = SIDE // 2  # of zeros, on each side
BUDGET = 0.75
ATTENTION_TIME = 0.5
INPUTS = {"crop": False, "padded": True}


def pad(data: ImageData) -> ImageData:
    return replace(data, images=F.pad(data.images, (BORDER,) * 4))


def crop(canvas: Tensor) -> Tensor:
    """The middle (..., 16, 16) of (..., 32, 32)."""
    return canvas[..., BORDER:-BORDER, BORDER:-BORDER]


def train_one(setting: Setting, name: str, padded: bool, seed: int) -> Model:
    """DiT or ELIT, on crops or on padded ones."""
    elit = ElasticConfig()
    if name == "ELIT":
        group_size = 4 if padded else 2
        elit = ElasticConfig(group_size=group_size, levels=[int(BUDGET * group_size**2)])
    variant = Variant(f"padding-{name}-{'padded' if padded else 'crop'}", elit=elit)
    data = pad(photographs()) if padded else photographs()
    return train(setting, variant, seed, data, f"{'ELIT-' if name == 'ELIT' else ''}DiT-S/{PATCH}")


def budget_of(model: Model) -> float | None:
    return None if model.interface is None else BUDGET


@torch.inference_mode()
def content_loss(model: Model, padded: bool, batch_size: int = 300) -> float:
    """Held-out loss of the crop's pixels; the crop has the same noise and times with and without its padding."""
    data = photographs(held_out=True)
    path = path_named(DIGITS.path)
    errors = []
    for indices in torch.arange(len(data)).split(batch_size):
        rng = generator("padding", int(indices[0]))
        t = DIGITS.times.draw(len(indices), path, rng)
        canvas = normal(rng, (len(indices), 3, SIDE + 2 * BORDER, SIDE + 2 * BORDER))
        x, y = (pad(data) if padded else data).batch(indices)
        x, y, t, noise = (v.to(model.device) for v in (x, y, t, canvas if padded else crop(canvas)))
        error = flow_matching_error(partial(model, y=y, budget=budget_of(model)), x, t, noise, path)
        errors.append((crop(error) if padded else error).flatten(1).mean(1))
    return torch.cat(errors).mean().item()


def content_attention(model: Model) -> float:
    """Share of Read's attention that goes to the tokens of the crop, a quarter of all, in padded held-out images."""
    data = pad(photographs(held_out=True))
    x, y = (v.to(model.device) for v in data.batch(torch.arange(0, len(data), 4)))
    noise = normal(generator("padding", "attention"), x.shape, model.device)
    maps = attention_maps(model, x, y, ATTENTION_TIME, noise, BUDGET)
    edge = BORDER // PATCH
    content = maps.attention[:, edge:-edge, edge:-edge]
    return (content.sum() / maps.attention.sum()).item()


def run(setting: Setting) -> None:
    points: dict[str, list[Point]] = {}
    for name in ("DiT", "ELIT"):
        points[name] = []
        for padded in INPUTS.values():
            models = [train_one(setting, name, padded, seed) for seed in range(setting.seeds)]
            budget = budget_of(models[0])
            losses = [content_loss(model, padded) for model in models]
            flops = count_flops(models[0].config, models[0].level(budget)).total
            points[name].append(Point(budget or 1.0, flops, losses))
    attention = [content_attention(model) for model in models]  # of the last: ELIT, padded
    results = {name: [asdict(p) for p in row] for name, row in points.items()} | {"attention to the crop": attention}
    write_json(setting, "padding", results)
    print_table(points, attention)
    label = "loss above that of DiT on crops"
    plot_losses(setting.out / "padding.png", points, points["DiT"][0].losses, label)


def print_table(points: Mapping[str, Sequence[Point]], attention: Sequence[float]) -> None:
    table = Table("model", "input", "MFLOPs", "loss of the crop", "above its own crop", "above DiT", title="padding")
    for name, row in points.items():
        for kind, point, plain in zip(INPUTS, row, points["DiT"], strict=True):
            table.add_row(
                name, kind, f"{point.flops / 1e6:.1f}", shown(interval(point.losses)),
                shown(above(point.losses, row[0].losses), sign="+") if kind == "padded" else "",
                shown(above(point.losses, plain.losses), sign="+") if name == "ELIT" else "",
            )  # fmt: skip
    console = Console(width=120)
    console.print(table)
    console.print(f"Read's attention to the crop, a quarter of the tokens: {shown(interval(attention), 2)}")


if __name__ == "__main__":
    run(auto_cli(Setting))
