"""The group size: 16 windows of 4 latents, 4 of 16, or 1 of 64, on the same 64 tokens.

    python experiments/windows.py     # docs/results/experiments.md
"""

from dataclasses import replace

from common import ELASTIC, Setting, Variant, compare
from jsonargparse import auto_cli

from elit.app.quickstart import BUDGETS, RECIPE

SMALL = Variant(
    "windows-of-2", elit=replace(RECIPE.elit, group_size=2, max_mask_prob=0.75), budgets=[b for b in BUDGETS if b >= 0.25]
)  # of 4 latents, one at least is left
LARGE = Variant("windows-of-8", elit=replace(RECIPE.elit, group_size=8))


def run(setting: Setting) -> None:
    series = {"4 windows of 4x4 tokens": [ELASTIC], "16 windows of 2x2": [SMALL], "1 window of 8x8": [LARGE]}
    compare(setting, "windows", series)


if __name__ == "__main__":
    run(auto_cli(Setting))
