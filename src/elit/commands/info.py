"""`elit info`: what a model is and what each budget costs."""

from typing import Any

from rich.console import Console
from rich.table import Table

from elit.analysis import count_flops, count_parameters, on_meta
from elit.commands.budgets import halved_budgets
from elit.errors import ElitError
from elit.integrations import KNOWN_BASES
from elit.interface import listed, triple
from elit.models import Model, config_for
from elit.models.files import CONFIG, read_config, resolve
from elit.models.published import read, recover_config
from elit.models.registry import is_name


def info(model: str, resolution: int | None = None) -> None:
    """Print the parameters of a model, and the FLOPs and MACs of each budget; named models allocate no weights.

    Args:
        model: a name like ELIT-SiT-XL/2, a run directory, a saved model, a published .pt file or a Hub id; or a model
            of others that elit.elastify can make elastic: qwen-image, flux, sd3.5, pixart, dit-xl or wan.
        resolution: pixels of a side, for named models on autoencoder latents (8 pixels per latent); by default 256.

    Raises:
        ElitError: it is neither a name nor a model, or a resolution is given for a saved model.
    """
    console = Console(soft_wrap=True, highlight=False)
    if model in KNOWN_BASES:
        if resolution is not None:
            raise ElitError(f"resolution is for named models; {model} is counted at the one it was made for")
        return print_base(model, console)
    shapes = read_shapes(model, resolution)
    console.print(f"[bold]{model}[/bold]: {count_parameters(shapes) / 1e6:,.3f} M parameters, {architecture(shapes)}")
    console.print(input_text(shapes))
    if shapes.interface is not None:
        console.print(windows_text(shapes))
    console.print(cost_table(shapes))
    if is_name(model):
        console.print(f"next: elit train --model.name {model} --data DATA --out RUN")
    else:
        console.print(f"next: elit sample --model {model} --out samples.png")
    return None


def print_base(name: str, console: Console) -> None:
    """Prints what an elastic version of a well-known transformer would cost.

    Raises:
        ElitError: diffusers is missing.
    """
    try:
        from elit.integrations import cost
    except ImportError as error:
        raise ElitError(f"{name} is counted by {error.name}: pip install 'elit-diffusion[retrofit]'") from error
    known, (base, elastic) = cost.known_base(name), cost.on_meta(name)
    config, added = elastic.config, sum(p.numel() for p in elastic.elit.parameters())
    console.print(f"[bold]{name}[/bold]: {known.architecture}, {base.num_parameters() / 1e6:,.0f} M parameters")
    console.print(
        f"elastic: {added / 1e6:,.1f} M parameters more, Read after block {config['read_after']} and Write after block "
        f"{config['write_after']}, windows of {'x'.join(map(str, config['group_size']))} tokens"
    )
    words = f"{known.prompt} tokens of text, {known.negative_prompt} in the weak term" if known.prompt else "a class"
    console.print(f"input {known.input}: {'x'.join(map(str, known.grid))} tokens, and {words}")
    table = Table(
        *("budget", "TFLOPs", "of the base", "guided step", "of the base"),
        caption="one forward, and a step with CCFG beside the base with CFG; the weak term has the lowest budget",
    )
    for row in cost.count_costs(name):
        forward = (f"{row.forward / 1e12:,.4g}", f"{row.forward / row.forward_of_base:.3f}")
        guided = (f"{row.guided / 1e12:,.4g}", f"{row.guided / row.guided_of_base:.3f}")
        table.add_row(f"{row.budget:.4g}", *forward, *guided)
    for column in table.columns:
        column.justify = "right"
    console.print(table)
    console.print("next: docs/retrofit.md")


def read_shapes(model: str, resolution: int | None = None, fields: dict[str, Any] | None = None) -> Model:
    """Makes a model without weights, on the ``meta`` device.

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


def architecture(model: Model) -> str:
    """Describes the blocks of a model."""
    config = model.config
    split = f" as {config.head_depth}-{config.core_depth}-{config.tail_depth}" if model.levels else ""
    return f"{config.depth} blocks{split} of width {config.width} with {config.num_heads} heads"


def input_text(model: Model) -> str:
    """Describes what a model takes, and how many tokens it makes of it."""
    t, h, w = model.config.grid_size
    frames = f"x{t} frames" if t > 1 else ""
    return f"input {'x'.join(map(str, model.input_shape()))}, {t * h * w} tokens ({h}x{w}{frames})"


def windows_text(model: Model) -> str:
    """Describes the windows of a model, and the numbers of latents that it knows."""
    assert model.interface is not None
    _, height, width = triple(model.config.interface.group_size)
    count = len(model.levels)
    return (
        f"{model.interface.grid.num_windows} windows of {height}x{width} tokens, {listed(model.levels)} of "
        f"{model.num_latents} latents each ({count} budget{'s' if count > 1 else ''})"
    )


def cost_table(model: Model) -> Table:
    """Tabulates what one forward costs at full budget, a half, a quarter and so on."""
    table = Table(
        *("budget", "latents per window", "GFLOPs", "GMACs", "of full"),
        caption="one forward of one image; 1 MAC = 2 FLOPs",
    )
    full = count_flops(model.config, model.level(None)).total
    for budget in halved_budgets(model):
        level = model.level(budget)
        cost = count_flops(model.config, level)
        numbers = (f"{cost.total / 1e9:,.4g}", f"{cost.macs / 1e9:,.4g}", f"{cost.total / full:.1%}")
        table.add_row(f"{budget:.4g}", str(level or "-"), *numbers)
    for column in table.columns:
        column.justify = "right"
    return table
