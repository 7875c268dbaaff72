"""The original pipelines of diffusers run elastic transformers, end to end."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import elit
from tests.helpers.small_pipelines import PIPELINES
from tests.helpers.small_retrofits import randomize_interface

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

STEPS = 2


@pytest.fixture(params=PIPELINES, scope="module")
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, dict[str, Any]]:
    """A pipeline that went through the disk in its real format, its folder, and what to call it with."""
    folder = tmp_path_factory.mktemp(request.param.lower())
    pipe, how = PIPELINES[request.param](folder / "parts")
    pipe.save_pretrained(folder / "base")
    return load(type(pipe), folder / "base"), folder, how


def load(kind: Any, folder: Path) -> Any:
    """A pipeline of parts on the disk; those that it went without stay away."""
    saved = json.loads((folder / "model_index.json").read_text())
    missing = {name: None for name, part in saved.items() if part == [None, None]}
    pipe = kind.from_pretrained(folder, **missing)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, how: dict[str, Any], **options: Any) -> np.ndarray:
    torch.manual_seed(0)
    settings = {"output_type": "np", **how, **options}
    made = pipe(**settings, num_inference_steps=STEPS, generator=torch.Generator().manual_seed(0))
    pictures = made.frames if hasattr(made, "frames") else made.images
    return np.asarray(pictures)


def test_a_pipeline_runs_at_every_budget_and_with_another_at_every_step(
    saved: tuple[Any, Path, dict[str, Any]],
) -> None:
    pipe, folder, how = saved
    of_base = draw(pipe, how)
    pipe.transformer = elit.elastify(pipe.transformer)
    assert np.array_equal(draw(pipe, how), of_base)  # also through guidance, scheduler and autoencoder

    pictures = {}
    for budget in (1 / 2, 1 / 8):
        pipe.transformer.set_budget(budget)
        pictures[budget] = draw(pipe, how)
        assert pictures[budget].shape == of_base.shape and np.isfinite(pictures[budget]).all()
    assert not np.array_equal(pictures[1 / 2], pictures[1 / 8])

    pipe.transformer.set_budget(elit.BudgetByNoise([0.9, 0.3], [1 / 8, 1 / 2, 1.0]))
    by_step = draw(pipe, how)
    assert not any(np.array_equal(by_step, other) for other in (of_base, *pictures.values()))

    pipe.transformer.set_budget(1.0, weak=1 / 8)
    cheap = draw(pipe, how)
    assert not any(np.array_equal(cheap, other) for other in (of_base, by_step, *pictures.values()))

    # saved as a pipeline, and loaded again
    randomize_interface(pipe.transformer).set_budget(1 / 2)
    expected = draw(pipe, how)
    pipe.save_pretrained(folder / "elastic")
    again = load(type(pipe), folder / "elastic")
    assert type(again.transformer) is type(pipe.transformer)
    again.transformer.set_budget(1 / 2)
    assert np.array_equal(draw(again, how), expected)


def test_a_pipeline_passes_a_budget_on_where_it_takes_attention_arguments(tmp_path: Path) -> None:
    for name, argument in (("SD3", "joint_attention_kwargs"), ("FLUX", "joint_attention_kwargs")):
        pipe, how = PIPELINES[name](tmp_path / name)
        pipe.set_progress_bar_config(disable=True)
        pipe.transformer = elit.elastify(pipe.transformer)
        by_argument = draw(pipe, how, **{argument: {"budget": 0.25}})
        pipe.transformer.set_budget(0.25)
        assert np.array_equal(draw(pipe, how), by_argument)


def test_a_callback_sets_the_budget_of_the_next_step(tmp_path: Path) -> None:
    pipe, how = PIPELINES["SD3"](tmp_path)
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer = elit.elastify(pipe.transformer)

    def full_from_now_on(pipe: Any, step: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        pipe.transformer.set_budget(1.0)
        return kwargs

    pipe.transformer.set_budget(1 / 8)
    called = draw(pipe, how, callback_on_step_end=full_from_now_on)
    pipe.transformer.set_budget(elit.BudgetByNoise([0.9], [1 / 8, 1.0]))
    assert np.array_equal(draw(pipe, how), called)
