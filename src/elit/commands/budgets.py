"""Which budgets a verb shows."""

from collections.abc import Sequence

from elit.models import Model

HALVED = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)


def resolve_budgets(model: Model, given: Sequence[float] | None) -> list[float]:
    """Returns the given budgets as the model takes them, ascending and with its highest added; by default all levels.

    Raises:
        ElitError: a budget outside (0, 1], or below what the model was trained for.
    """
    if not model.levels:
        return [1.0]
    levels = model.levels if given is None else {model.level(None), *map(model.level, given)}
    return sorted(level / model.num_latents for level in levels)


def halved_budgets(model: Model) -> list[float]:
    """Returns full budget, a half, a quarter and so on to 1/16, as far down as the levels of the model go."""
    lowest = model.levels[0] / model.num_latents if model.levels else 1.0
    return resolve_budgets(model, [budget for budget in HALVED if budget >= lowest])
