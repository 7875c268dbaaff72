"""Block allocation: how six blocks are split into head, core and tail.

    python experiments/split.py     # docs/results/experiments.md

The paper finds 67 to 71 % of the blocks in the core good; 1-4-1 has 67 %.
"""

from jsonargparse import auto_cli

from common import ELASTIC, Setting, Variant, compare


def split(head: int, tail: int) -> Variant:
    return Variant(f"split-{head}-{6 - head - tail}-{tail}", {"head_depth": head, "tail_depth": tail})


def run(setting: Setting) -> None:
    compare(setting, "split", {"1-4-1": [ELASTIC], "0-6-0": [split(0, 0)], "2-2-2": [split(2, 2)]})


if __name__ == "__main__":
    run(auto_cli(Setting))
