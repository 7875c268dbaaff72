"""Which numbers of latents training uses: all of the model's, a range by mask probabilities, or those listed."""

import math
from typing import NamedTuple

from elit.analysis import count_flops
from elit.errors import ElitError
from elit.interface import draw_level, listed, to_level
from elit.models import Model
from elit.seeding import derive_seed
from elit.training.config import ElasticConfig


class TrainingLevels(NamedTuple):
    """What a step draws from: numbers of latents J~, ascending, and their weights (None: uniform)."""

    levels: tuple[int, ...]
    weights: tuple[float, ...] | None = None

    def draw(self, seed: int, step: int) -> int:
        """Draws J~ of one step; 0 where there are none, in a model without an interface."""
        return draw_level(self.levels, seed, step, self.weights) if self.levels else 0

    def draw_for(self, samples: int, seed: int, step: int, per_step: int = 1) -> list[int]:
        """Draws J~ of every sample of a step. Its levels take turns, so that every process has a share of each.

        Args:
            per_step: how many levels share the batch: see :class:`~elit.training.config.ElasticConfig`.
        """
        if not self.levels:
            return [0] * samples
        fixed = [self.levels[-1], self.levels[0]][: min(2, per_step - 1)]
        drawn = [self.draw(seed, step if i == 0 else derive_seed(step, i)) for i in range(per_step - len(fixed))]
        turns = fixed + drawn
        return [turns[i % per_step] for i in range(samples)]


def training_levels(config: ElasticConfig, model: Model) -> TrainingLevels:
    """Works out the levels that a configuration means, of those that a model has.

    Raises:
        ElitError: names the key that does not fit the model or another key.
    """
    if model.interface is None:
        given = [key for key, default in vars(ElasticConfig()).items() if getattr(config, key) != default]
        if given:
            raise ElitError(f"elit.{given[0]} is set, but the model has no latent interface; take its ELIT- name")
        return TrainingLevels(())
    chosen = _chosen(config)
    if config.batching == "scaled" and config.levels_per_step != 1:
        raise ElitError("elit.batching is scaled, which needs one budget a step; elit.levels_per_step gives several")
    if config.by_noise is not None:
        if config.batching == "scaled":
            raise ElitError("elit.batching is scaled, which needs one budget a step; elit.by_noise gives several")
        if config.weights is not None:
            raise ElitError("elit.weights is for levels that are drawn; elit.by_noise draws none")
        if config.levels_per_step != 1:
            raise ElitError("elit.levels_per_step is for levels that are drawn; elit.by_noise draws none")
        return TrainingLevels(tuple(sorted({model.level(budget) for budget in config.by_noise.budgets})))
    levels = _listed(config.levels, model) if chosen == "levels" else _from_mask_probs(config, model)
    if config.weights is None:
        return TrainingLevels(levels)
    if len(config.weights) != len(levels):
        raise ElitError(f"elit.weights lists {len(config.weights)} for {len(levels)} levels, {levels}")
    if min(config.weights) < 0 or not 0 < sum(config.weights) < math.inf:
        raise ElitError(f"elit.weights is {config.weights}; weights are at least 0, and not all 0")
    drawn = [(level, weight) for level, weight in zip(levels, config.weights, strict=True) if weight > 0]
    return TrainingLevels(tuple(level for level, _ in drawn), tuple(weight for _, weight in drawn))


def _chosen(config: ElasticConfig) -> str:
    masked = config.min_mask_prob is not None or config.max_mask_prob is not None
    ways = {"levels": config.levels is not None, "by_noise": config.by_noise is not None, "mask_prob": masked}
    given = [key for key, is_given in ways.items() if is_given]
    if len(given) > 1:
        raise ElitError(f"elit gives both {given[0]} and {given[1]}; give one of them")
    return given[0] if given else "mask_prob"


def _listed(levels: list[int] | None, model: Model) -> tuple[int, ...]:
    wrong = [level for level in levels or [0] if level not in model.levels]
    if wrong:
        raise ElitError(f"elit.levels has {wrong[0]}; the model knows {listed(model.levels)} latents a window")
    return tuple(sorted(set(levels or ())))


def _from_mask_probs(config: ElasticConfig, model: Model) -> tuple[int, ...]:
    """Finds the levels k with (1 - max) J <= k <= (1 - min) J; where none lies between, the nearest.

    Without a smallest probability nothing is dropped at the most, and without a largest one as much as the model can.
    """
    for key in ("min_mask_prob", "max_mask_prob"):
        value = getattr(config, key)
        if value is not None and not 0 <= value < 1:
            raise ElitError(f"elit.{key} is {value}; it must be in [0, 1), the fraction of latents to drop")
    lowest, num_latents = model.levels[0], model.num_latents
    low = 0.0 if config.min_mask_prob is None else config.min_mask_prob
    high = 1 - lowest / num_latents if config.max_mask_prob is None else config.max_mask_prob
    slack = 1e-6  # (1 - 0.9) * 10 is a little less than 1
    fewest, most = (1 - high) * num_latents - slack, (1 - low) * num_latents + slack
    for key, latents in (("max_mask_prob", math.ceil(fewest)), ("min_mask_prob", most)):
        if latents < lowest:
            raise ElitError(
                f"elit.{key} {getattr(config, key)} keeps fewer latents than the model's smallest level, {lowest} of "
                f"{num_latents}; lower it or set model.fields.min_latents"
            )
    if low > high:
        raise ElitError(f"elit.min_mask_prob is {low}, above elit.max_mask_prob, {high}")
    between = tuple(level for level in model.levels if fewest <= level <= most)
    return between or (to_level(1 - high, model.levels, num_latents),)


def scaled_batch_size(model: Model, level: int, batch_size: int) -> int:
    """Returns the batch at a level whose forward has the FLOPs of ``batch_size`` samples at full budget, to a whole
    sample."""
    full, at_level = (count_flops(model.config, each).total for each in (model.num_latents, level))
    return round(batch_size * full / at_level)
