"""Guidance and caches of diffusers around elastic transformers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import elit
from tests.helpers.small_pipelines import qwen_pipeline
from tests.helpers.small_retrofits import FAMILIES, make_base, predict

diffusers = pytest.importorskip("diffusers")
ElitGuider = pytest.importorskip("elit.integrations.guider", exc_type=ImportError).ElitGuider


def draw(pipe: Any, how: dict[str, Any]) -> np.ndarray:
    return pipe(**how, num_inference_steps=2, output_type="np", generator=torch.Generator().manual_seed(0))


@pytest.fixture
def original(tmp_path: Path) -> tuple[Any, dict[str, Any]]:
    pipe, how = qwen_pipeline(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer = elit.elastify(pipe.transformer)
    for name in ("prompt", "negative_prompt"):  # the modular pipeline begins after the text encoder
        tokens, mask = pipe.encode_prompt(how.pop(name))
        mask = torch.ones(tokens.shape[:2], dtype=torch.long) if mask is None else mask
        how |= {f"{name}_embeds": tokens.detach(), f"{name}_embeds_mask": mask}
    return pipe, how


def modular(pipe: Any, guider: Any) -> Any:
    """The modular pipeline of the same parts, beginning after the text encoder."""
    from diffusers.modular_pipelines.qwenimage import QwenImageAutoBlocks

    blocks = QwenImageAutoBlocks()
    for name in set(blocks.sub_blocks) - {"denoise", "decode"}:
        blocks.sub_blocks.pop(name)
    made = blocks.init_pipeline()
    made.update_components(transformer=pipe.transformer, vae=pipe.vae, scheduler=pipe.scheduler, guider=guider)
    return made


def test_a_modular_pipeline_guides_as_the_original_one_does(original: tuple[Any, dict[str, Any]]) -> None:
    pipe, how = original
    of_modular = {name: value for name, value in how.items() if name != "true_cfg_scale"}
    settings = {"ccfg": (1.0, 1 / 8), "cfg": (1.0, None)}
    pictures = {}
    for kind, budgets in settings.items():
        pipe.transformer.set_budget(*budgets)
        expected = draw(pipe, how).images
        pipe.transformer.set_budget(0.5)
        guider = ElitGuider(kind, weak_budget=1 / 8, budget=1.0, guidance_scale=2.0)
        pictures[kind] = draw(modular(pipe, guider), of_modular).values["images"]
        np.testing.assert_allclose(pictures[kind], expected, atol=1e-5)
        assert pipe.transformer.budgets == (0.5, None)  # as it was before
    assert np.abs(pictures["ccfg"] - pictures["cfg"]).max() > 1e-4


def test_autoguidance_keeps_the_prompt(original: tuple[Any, dict[str, Any]]) -> None:
    """It is cheap guidance away from the same prompt."""
    pipe, how = original
    of_modular = {name: value for name, value in how.items() if name != "true_cfg_scale"}
    guider = ElitGuider("ag", weak_budget=1 / 8, budget=1.0, guidance_scale=2.0)
    found = draw(modular(pipe, guider), of_modular).values["images"]
    pipe.transformer.set_budget(1.0, weak=1 / 8)
    same = {f"negative_{name}": how[name] for name in ("prompt_embeds", "prompt_embeds_mask")}
    np.testing.assert_allclose(found, draw(pipe, how | same).images, atol=1e-5)


def test_a_guider_comes_back_from_its_configuration_and_refuses_what_is_wrong(tmp_path: Path) -> None:
    ElitGuider("ag", 0.25, guidance_scale=3.0).save_pretrained(tmp_path)
    again = ElitGuider.from_pretrained(tmp_path)
    assert (again.kind, again.weak_budget, again.guidance_scale) == ("ag", 0.25, 3.0)
    with pytest.raises(elit.ElitError, match="no guidance is named 'apg'"):
        ElitGuider("apg")
    with pytest.raises(elit.ElitError, match="weak_budget is 0"):
        ElitGuider(weak_budget=0)


@pytest.mark.parametrize("name", ["FLUX", "Qwen-Image"])
@torch.no_grad()
def test_the_first_block_cache_of_diffusers_skips_blocks(name: str) -> None:
    """A second call like the first one is answered from the cache; one with other inputs is not."""
    family = next(each for each in FAMILIES if each.name == name)
    elastic, blocks = elit.elastify(make_base(family)), []
    torch.manual_seed(2)
    inputs, others = family.inputs(2), family.inputs(2)
    expected = predict(elastic, inputs, budget=0.25), predict(elastic, others, budget=0.25)
    core = next(block for block in elastic.transformer_blocks if block.reads)
    core.attn.register_forward_hook(lambda *_: blocks.append(1))
    elastic.enable_cache(diffusers.FirstBlockCacheConfig(threshold=1e-3))
    with elastic.cache_context("cond"):
        for given, answer, runs in ((inputs, expected[0], 1), (inputs, expected[0], 1), (others, expected[1], 2)):
            torch.testing.assert_close(predict(elastic, given, budget=0.25), answer, atol=1e-5, rtol=1e-5)
            assert len(blocks) == runs
