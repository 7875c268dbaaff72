"""Do counted FLOPs and the closed form agree, for every named model? Nothing but shapes: no weights, no GPU.

    python benchmarks/closed_form.py --out closed-form.json    # 176 names, 256px at full and 512px at the lowest budget
    python benchmarks/closed_form.py --names '[ELIT-SiT-XL/2]'

Counting takes minutes in all; a run that was stopped continues from its file.
"""

import json
from pathlib import Path

from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from elit.analysis import closed_form, count_flops, on_meta
from elit.atomic import write_json
from elit.models import config_for
from elit.models.registry import names as all_names


def difference(name: str, resolution: int, lowest: bool) -> float:
    """Relative, of the closed form from the count."""
    config = config_for(name, resolution)
    model = on_meta(config)
    counted = count_flops(model, model.levels[0] / model.num_latents if lowest and model.levels else None)
    return sum(part.macs for part in closed_form(config, counted.num_latents)) / counted.macs - 1


def compare(names: list[str] | None = None, out: Path = Path("runs/closed-form.json")) -> None:
    """Print the largest difference in each family.

    Args:
        names: of models; default all.
        out: where the differences are kept, by name.
    """
    found: dict[str, list[float]] = json.loads(out.read_text()) if out.exists() else {}
    for name in tqdm(names or all_names(), dynamic_ncols=True):
        if name not in found:
            found[name] = [difference(name, 256, lowest=False), difference(name, 512, lowest=True)]
            write_json(out, found, indent=1)
    table = Table("family", "names", "largest difference")
    for family in dict.fromkeys(name.rpartition("-")[0] for name in found):
        rows = [abs(value) for name, each in found.items() if name.rpartition("-")[0] == family for value in each]
        table.add_row(family, str(len(rows) // 2), f"{max(rows):.2%}")
    Console(width=120).print(table)


if __name__ == "__main__":
    auto_cli(compare)
