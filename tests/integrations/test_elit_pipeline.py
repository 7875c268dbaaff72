"""Models of this library as a pipeline of diffusers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import elit
from elit.cli import main
from tests.helpers.models import randomize
from tests.helpers.small_autoencoder import save_autoencoder

pytest.importorskip("diffusers")
ElitPipeline = pytest.importorskip("elit.integrations.pipeline", exc_type=ImportError).ElitPipeline

PUBLISHED = Path(__file__).parents[1] / "data" / "published" / "elit_sit_tiny.pt"
FAST: dict[str, Any] = {"num_inference_steps": 3, "seeds": [5, 7]}


def small(channels: int = 1, **fields: Any) -> elit.Model:
    size = {"width": 32, "num_heads": 2, "depth": 3, "head_depth": 1, "tail_depth": 1}
    data = {"resolution": 16, "downsample": 1, "in_channels": channels, "num_classes": 10}
    return randomize(elit.create("ELIT-DiT-S/2", **size, **data, **fields)).eval()


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_pictures_are_those_of_elit_sample(tmp_path: Path) -> None:
    model = small()
    pipe = quiet(ElitPipeline.from_elit(model))
    how = {"budget": [1.0, 0.5, 0.25], "guidance": "ccfg", "weak_budget": 1 / 16, "guidance_scale": 2.0}
    guidance = elit.Guidance("ccfg", 2.0, 1 / 16)
    expected = elit.sample(model, [3, 4], seeds=[5, 7], steps=3, budget=how["budget"], guidance=guidance)
    assert torch.equal(pipe([3, 4], **FAST, **how, output_type="latent").images, expected)

    pictures = pipe([3, 4], **FAST, **how).images
    assert all(np.array_equal(a, b) for a, b in zip(pictures, elit.to_pil(expected), strict=True))
    (pixels,) = pipe([3, 4], **FAST, **how, output_type="np", return_dict=False)
    assert pixels.shape == (2, 16, 16, 1) and pixels.min() >= 0 and pixels.max() <= 1

    pipe.save_pretrained(tmp_path)
    again = quiet(ElitPipeline.from_pretrained(tmp_path))
    assert torch.equal(again([3, 4], **FAST, **how, output_type="latent").images, expected)


def test_generators_are_seeds() -> None:
    pipe = quiet(ElitPipeline.from_elit(small()))
    how: dict[str, Any] = {"num_inference_steps": 2, "output_type": "latent"}
    expected = pipe([3, 4], seeds=[8, 9], **how).images
    assert torch.equal(pipe([3, 4], generator=torch.Generator().manual_seed(8), **how).images, expected)
    each = [torch.Generator().manual_seed(seed) for seed in (8, 9)]
    assert torch.equal(pipe([3, 4], generator=each, **how).images, expected)


def test_a_callback_sees_every_step() -> None:
    pipe, seen = quiet(ElitPipeline.from_elit(small())), []
    pipe(
        [3, 4], **FAST, callback_on_step_end=lambda pipe, step, t, kwargs: seen.append((step, kwargs["latents"].shape))
    )
    assert seen == [(step, (2, 1, 16, 16)) for step in range(3)]


def test_a_model_of_latents_is_decoded(tmp_path: Path) -> None:
    save_autoencoder(tmp_path / "vae")
    pipe = quiet(ElitPipeline.from_elit(small(channels=4), tmp_path / "vae"))
    pipe.save_pretrained(tmp_path / "pipe")
    again = quiet(ElitPipeline.from_pretrained(tmp_path / "pipe"))
    pictures = pipe([3], num_inference_steps=2, seeds=[5]).images
    assert pictures[0].size == (64, 64)
    assert np.array_equal(pictures[0], again([3], num_inference_steps=2, seeds=[5]).images[0])


def test_published_files_and_runs_convert(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    heads = {"num_heads": 4, "tail_depth": 2}
    options = ["--num-heads", "4", "--tail-depth", "2"]
    assert main(["convert", str(PUBLISHED), str(tmp_path / "pipe"), "--format", "diffusers", *options]) == 0
    model, pipe = elit.load(PUBLISHED, **heads), quiet(ElitPipeline.from_pretrained(tmp_path / "pipe"))
    expected = elit.sample(model, [1, 2], seeds=[5, 7], steps=2, budget=0.5)
    found = pipe([1, 2], num_inference_steps=2, seeds=[5, 7], guidance_scale=1, budget=0.5, output_type="latent").images
    assert torch.equal(found, expected)

    small().save_pretrained(tmp_path / "ours")
    assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "pipe2"), "--format", "diffusers"]) == 0
    assert (tmp_path / "pipe2" / "model_index.json").exists()
    assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "pipe2"), "--format", "diffusers"]) == 2
    assert "exists already" in capsys.readouterr().err


def test_wrong_inputs_are_told() -> None:
    pipe = quiet(ElitPipeline.from_elit(small(channels=4)))
    for call, message in (
        ({"class_labels": [3]}, "give the pipeline an autoencoder"),
        ({"class_labels": [3], "output_type": "gif"}, "output_type is 'gif'"),
        ({"class_labels": [30], "output_type": "latent"}, "label 30"),
        ({"class_labels": [3], "output_type": "latent", "budget": 2.0}, "budget"),
        ({"class_labels": [3], "output_type": "latent", "generator": []}, "0 generators for 1 pictures"),
    ):
        with pytest.raises(elit.ElitError, match=message):
            pipe(**call)
