"""One elastic model for all budgets, or a model for each.

    python experiments/joint.py     # docs/results/experiments.md

Every model has the same number of steps.
"""

from jsonargparse import auto_cli

from common import ELASTIC, Setting, Variant, compare
from elit.training import ElasticConfig

LEVELS = (1, 4, 16)  # of 16 latents


def alone(level: int) -> Variant:
    """A model that is trained and run at one level."""
    return Variant(f"only-{level}", elit=ElasticConfig(group_size=4, levels=[level]), budgets=[level / 16])


def run(setting: Setting) -> None:
    compare(setting, "joint", {"one elastic model": [ELASTIC], "a model per budget": [alone(n) for n in LEVELS]})


if __name__ == "__main__":
    run(auto_cli(Setting))
