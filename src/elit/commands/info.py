"""`elit info`: what a model is and what each budget costs."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from elit.analysis import count_flops, count_parameters, on_meta
from elit.errors import ElitError
from elit.interface import triple
from elit.models import Model, config_for
from elit.models.files import CONFIG, read_config, resolve
from elit.models.published import read, recover_config
from elit.models.registry import is_name

SHOWN_BUDGETS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)


def describe(model: Model, budgets: Sequence[float] = SHOWN_BUDGETS) -> dict[str, Any]:
    """Parameters, and FLOPs and MACs of one forward of one sample at budgets."""
    levels = {budget: model.level(budget) for budget in (budgets if model.levels else (1.0,))}
    costs = [(budget, level, count_flops(model.config, level)) for budget, level in levels.items()]
    return {
        "parameters": count_parameters(model),
        "input": model.input_shape(),
        "tokens": model.config.grid_size,
        "levels": model.levels,
        "costs": [{"budget": b, "num_latents": level, "flops": c.total, "macs": c.macs} for b, level, c in costs],
    }


def info(model: str, resolution: int | None = None) -> None:
    """Print the parameters of a model, and the FLOPs and MACs of each budget; named models allocate no weights.

    Args:
        model: a name like ELIT-SiT-XL/2, a run directory, a saved model, a published .pt file or a Hub id.
        resolution: pixels of a side, for named models on autoencoder latents (8 pixels per latent); default 256.

    Raises:
        ElitError: it is neither a name nor a model, or a resolution is given for a saved model.
    """
    print_description(model, read_shapes(model, resolution))


def read_shapes(model: str, resolution: int | None = None, fields: dict[str, Any] | None = None) -> Model:
    """A model without weights, on the ``meta`` device.

    Args:
        resolution, fields: of a named model, pixels of a side and fields of its configuration to change.

    Raises:
        ElitError: it is neither a name nor a model, or either is given for a saved model.
    """
    if is_name(model):
        return on_meta(config_for(model, resolution or 256, **(fields or {})))
    if resolution is not None or fields:
        raise ElitError(f"resolution and fields are for named models; {model} has its own")
    path = resolve(model)
    return on_meta(recover_config(read(path)) if path.is_file() else read_config(path / CONFIG))


def print_description(title: str, model: Model) -> None:
    console, facts = Console(soft_wrap=True, highlight=False), describe(model)
    t, h, w = facts["tokens"]
    console.print(f"[bold]{title}[/bold]: {facts['parameters'] / 1e6:,.3f} M parameters, {_architecture(model)}")
    console.print(
        f"input {'x'.join(map(str, facts['input']))}, {t * h * w} tokens ({h}x{w}{f'x{t} frames' if t > 1 else ''})"
    )
    if model.interface is not None:
        grid, levels = model.interface.grid, facts["levels"]
        group = triple(model.config.interface.group_size)[1:]
        console.print(
            f"{grid.num_windows} windows of {group[0]}x{group[1]} tokens, "
            f"{levels[0]} to {levels[-1]} latents each ({len(levels)} budgets)"
        )
    table = Table(
        "budget",
        "latents per window",
        "GFLOPs",
        "GMACs",
        "of full",
        caption="one forward of one image; 1 MAC = 2 FLOPs",
    )
    full = facts["costs"][-1]["flops"]
    for cost in facts["costs"]:
        flops = cost["flops"]
        latents = str(cost["num_latents"]) if facts["levels"] else "-"
        table.add_row(
            f"{cost['budget']:.4g}", latents, f"{flops / 1e9:,.4g}", f"{flops / 2e9:,.4g}", f"{flops / full:.1%}"
        )
    for column in table.columns:
        column.justify = "right"
    console.print(table)


def _architecture(model: Model) -> str:
    config = model.config
    split = f" as {config.head_depth}-{config.core_depth}-{config.tail_depth}" if model.levels else ""
    return f"{config.depth} blocks{split} of width {config.width} with {config.num_heads} heads"
