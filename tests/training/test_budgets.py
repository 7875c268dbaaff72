import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from elit import ElitError, load, sample
from elit.analysis import count_flops
from elit.interface import BudgetByNoise
from elit.models import create
from elit.training import ElasticConfig, Trainer, ValidationConfig
from elit.training.budgets import TrainingLevels, training_levels
from tests.helpers.runs import config

SMALL = {"width": 32, "depth": 3, "num_heads": 2, "head_depth": 1, "tail_depth": 1}


def model(name: str = "ELIT-DiT-S/2", **fields: Any) -> Any:
    with torch.device("meta"):
        return create(name, **(SMALL | fields))


@pytest.mark.parametrize(
    ("settings", "levels"),
    [
        ({}, tuple(range(1, 17))),
        ({"max_mask_prob": 0.75}, tuple(range(4, 17))),  # from nothing dropped
        ({"min_mask_prob": 0.75}, (1, 2, 3, 4)),  # to the lowest level of the model
        ({"min_mask_prob": 0.9}, (1,)),  # 1.6
        ({"max_mask_prob": 0.0}, (16,)),
        ({"levels": [16]}, (16,)),
        ({"min_mask_prob": 0.75, "max_mask_prob": 0.75}, (4,)),
        ({"min_mask_prob": 0.0, "max_mask_prob": 0.9375}, tuple(range(1, 17))),
        ({"min_mask_prob": 0.75, "max_mask_prob": 0.9375}, (1, 2, 3, 4)),
        ({"min_mask_prob": 0.1, "max_mask_prob": 0.9}, tuple(range(2, 15))),  # 1.6 and 14.4 latents: inside them
        ({"min_mask_prob": 0.9, "max_mask_prob": 0.9}, (2,)),  # 1.6: the nearest
        ({"levels": [16, 4, 1]}, (1, 4, 16)),
        ({"by_noise": BudgetByNoise([0.5], [0.25, 1.0])}, (4, 16)),
    ],
)
def test_levels(settings: dict[str, Any], levels: tuple[int, ...]) -> None:
    assert training_levels(ElasticConfig(**settings), model()).levels == levels


def test_every_mask_probability_of_a_level_gives_that_level() -> None:
    """k / J in floating point is often a little off; J = 25 and 100 are where int(J * (1 - p)) loses levels."""
    for side in (2, 4, 5, 10):
        elastic = model(input_size=side * 8, group_size=side, min_latents=1)
        for level in elastic.levels:
            mask = 1 - level / elastic.num_latents
            assert training_levels(ElasticConfig(None, mask, mask), elastic).levels == (level,)
            above = training_levels(ElasticConfig(max_mask_prob=mask), elastic).levels
            assert above == tuple(range(level, elastic.num_latents + 1))
            below = training_levels(ElasticConfig(min_mask_prob=mask), elastic).levels
            assert below == tuple(range(1, level + 1))


def test_drawn_levels_follow_their_weights() -> None:
    levels = training_levels(ElasticConfig(levels=[1, 8, 16], weights=[1, 0, 3]), model())
    drawn = [levels.draw(0, step) for step in range(2000)]
    assert drawn == [levels.draw(0, step) for step in range(2000)]
    assert set(drawn) == {1, 16}
    assert drawn.count(16) / 2000 == pytest.approx(0.75, abs=4 * math.sqrt(0.75 * 0.25 / 2000))  # 4 standard errors


@pytest.mark.parametrize("per_step", [1, 2, 3, 4])
def test_levels_of_a_step_take_turns(per_step: int) -> None:
    levels = training_levels(ElasticConfig(max_mask_prob=0.75), model())  # 4 to 16 of 16
    for step in range(20):
        drawn = levels.draw_for(13, 5, step, per_step)
        turns = drawn[:per_step]
        assert drawn == [turns[i % per_step] for i in range(13)]
        assert drawn == levels.draw_for(13, 5, step, per_step)
        assert turns[:2] == ([levels.draw(5, step)], [16, levels.draw(5, step)], [16, 4], [16, 4])[per_step - 1]
        assert set(turns) <= set(range(4, 17))
    assert len({tuple(levels.draw_for(per_step, 5, step, per_step)) for step in range(20)}) > 5
    assert TrainingLevels(()).draw_for(3, 5, 0, 1) == [0, 0, 0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_mask_prob": 1.0}, r"elit.min_mask_prob is 1.0; it must be in \[0, 1\)"),
        ({"min_mask_prob": 0.5, "max_mask_prob": 0.25}, "elit.min_mask_prob is 0.5, above elit.max_mask_prob, 0.25"),
        ({"levels": [4, 17]}, "elit.levels has 17; the model knows 1 to 16 latents"),
        ({"levels": []}, "elit.levels has 0"),
        ({"levels": [4], "max_mask_prob": 0.5}, "elit gives both levels and mask_prob"),
        ({"levels": [4, 8], "weights": [1.0]}, "elit.weights lists 1 for 2 levels"),
        ({"levels": [4, 8], "weights": [0.0, 0.0]}, "weights are at least 0, and not all 0"),
        ({"by_noise": BudgetByNoise([0.5], [0.25, 1.0]), "batching": "scaled"}, "elit.batching is scaled"),
        ({"by_noise": BudgetByNoise([0.5], [0.25, 1.0]), "weights": [1.0, 1.0]}, "elit.weights"),
        ({"by_noise": BudgetByNoise([0.5], [0.25, 1.0]), "levels_per_step": 2}, "elit.levels_per_step is for levels"),
        ({"batching": "scaled", "levels_per_step": 2}, "elit.levels_per_step gives several"),
    ],
)
def test_wrong_budgets(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ElitError, match=message):
        training_levels(ElasticConfig(**settings), model())


@pytest.mark.parametrize(
    ("elit", "levels"),
    [
        (ElasticConfig(group_size=4), None),  # all
        (ElasticConfig(group_size=4, levels=[16]), (16,)),
        (ElasticConfig(group_size=4, max_mask_prob=0.75), tuple(range(4, 17))),
        (ElasticConfig(group_size=4, by_noise=BudgetByNoise([0.5], [0.25, 1.0])), (4, 16)),
    ],
)
def test_a_saved_model_knows_its_levels(tmp_path: Path, elit: ElasticConfig, levels: tuple[int, ...] | None) -> None:
    trainer = Trainer(config(tmp_path / "run", steps=2, elit=elit))
    trainer.run_to_end()
    loaded = load(tmp_path / "run")
    assert loaded.config.interface.levels == levels
    assert loaded.levels == trainer.levels.levels == (levels or tuple(range(1, 17)))
    if levels is not None and levels[0] > 1:
        with pytest.raises(ElitError, match="the model was trained with"):
            sample(loaded, [1], steps=1, budget=1 / 16)


@pytest.mark.parametrize(
    ("levels", "budgets"),
    [(None, [0.0625, 0.25, 0.5, 1.0]), ([16], [1.0]), ([4, 9, 16], [0.25, 0.5625, 1.0]), ([2, 3], [0.125, 0.1875])],
)
def test_validation_is_at_trained_levels(tmp_path: Path, levels: list[int] | None, budgets: list[float]) -> None:
    trainer = Trainer(config(tmp_path / "run", elit=ElasticConfig(group_size=4, levels=levels)))
    assert trainer.validation.budgets == budgets
    if levels == [16]:
        with pytest.raises(ElitError, match="the model was trained with 16"):
            Trainer(replace(trainer.config, validation=ValidationConfig(budgets=[0.25])))


def test_budgets_below_the_smallest_level_of_the_model() -> None:
    with pytest.raises(ElitError, match=r"elit\.min_mask_prob 0\.99 keeps fewer latents than the model's smallest"):
        training_levels(ElasticConfig(min_mask_prob=0.99), model(resolution=512))
    with pytest.raises(ElitError, match=r"smallest level, 4 of 64; lower it or set model.fields.min_latents"):
        training_levels(ElasticConfig(max_mask_prob=0.99, min_mask_prob=0.0), model(resolution=512))


def test_a_plain_model_has_no_budgets() -> None:
    plain = model("DiT-S/2")
    assert training_levels(ElasticConfig(), plain).draw(0, 1) == 0
    with pytest.raises(ElitError, match=r"elit.max_mask_prob is set, but the model has no latent interface"):
        training_levels(ElasticConfig(max_mask_prob=0.5), plain)


def test_scaled_batches_have_the_flops_of_full_budget(tmp_path: Path) -> None:
    elit = ElasticConfig(group_size=4, levels=[1, 4, 16], batching="scaled")
    trainer = Trainer(config(tmp_path / "run", elit=elit, steps=12))
    reports = list(trainer)
    full = count_flops(trainer.model.config, 16).total * 16
    for report in reports:
        one = count_flops(trainer.model.config, int(report.num_latents)).total
        assert report.batch_size * one == pytest.approx(full, abs=one)  # to a whole sample
    assert {r.batch_size for r in reports if r.num_latents == 16} == {16}
    assert min(r.batch_size for r in reports if r.num_latents == 1) > 20
    assert trainer.seen == sum(report.batch_size for report in reports)


def test_a_level_that_is_never_drawn_is_not_trained() -> None:
    levels = training_levels(ElasticConfig(levels=[2, 4, 16], weights=[0, 1, 3]), model())
    assert levels.levels == (4, 16)
    assert levels.weights == (1, 3)
