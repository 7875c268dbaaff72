"""The group size.

    python experiments/windows.py     # docs/results/experiments.md

The same 64 tokens in 16 windows of 4 latents, 4 windows of 16, or 1 of 64.
"""

from dataclasses import replace

from jsonargparse import auto_cli

from common import DIGITS, ELASTIC, Setting, Variant, compare
from elit.commands.quickstart import BUDGETS

SMALL = Variant(
    "windows-of-2",
    elit=replace(DIGITS.elit, group_size=2, max_mask_prob=0.75),  # one latent of four is left
    budgets=[budget for budget in BUDGETS if budget >= 0.25],
)
LARGE = Variant("windows-of-8", elit=replace(DIGITS.elit, group_size=8))


def run(setting: Setting) -> None:
    series = {"4 windows of 4x4 tokens": [ELASTIC], "16 windows of 2x2": [SMALL], "1 window of 8x8": [LARGE]}
    compare(setting, "windows", series)


if __name__ == "__main__":
    run(auto_cli(Setting))
