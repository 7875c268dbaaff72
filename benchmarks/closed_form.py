"""Do counted FLOPs and the closed form agree, for every named model? Nothing but shapes: no weights, no GPU.

python benchmarks/closed_form.py                    # 176 names at 256 and 512px, full and lowest budget: minutes
python benchmarks/closed_form.py --names '[ELIT-SiT-XL/2]'
"""

from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from elit.analysis import closed_form, count_flops, on_meta
from elit.models import config_for
from elit.models.registry import names as all_names


def compare(names: list[str] | None = None, resolutions: tuple[int, ...] = (256, 512)) -> None:
    """Print the largest difference in each family.

    Args:
        names: of models; default all.
        resolutions: in pixels of a side.
    """
    worst: dict[str, list[float]] = {}
    for name in tqdm(names or all_names(), dynamic_ncols=True):
        for resolution in resolutions:
            config = config_for(name, resolution)
            model = on_meta(config)
            for budget in (1.0, model.levels[0] / model.num_latents) if model.levels else (None,):
                counted = count_flops(model, budget)
                macs = sum(part.macs for part in closed_form(config, counted.num_latents))
                worst.setdefault(name.rpartition("-")[0], []).append(abs(macs / counted.macs - 1))
    table = Table("family", "configurations and budgets", "largest difference")
    for family, differences in worst.items():
        table.add_row(family, str(len(differences)), f"{max(differences):.2%}")
    Console(width=120).print(table)


if __name__ == "__main__":
    auto_cli(compare)
