"""Bases of captions (PixArt, Stable Diffusion 3), on latents and embedded captions of `elit prepare encode`."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from elit.cli import main
from elit.data import open_data
from elit.training import ElasticConfig, Trainer
from elit.training.distillation import RetrofitConfig, build_distillation
from tests.helpers.pictures import smooth
from tests.helpers.small_distillations import WIDTH, distillation
from tests.helpers.small_pipelines import autoencoder, sd3_pipeline, t5

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")
TEXT = 16
CAPTIONS = ("a three", "handwritten four", "A  handwritten THREE &amp; four", "four")  # pipelines clean prompts


def captioned_pictures(folder: Path) -> Path:
    """Eight pictures of 32x32 pixels with captions of two to four tokens."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for i in range(8):
        smooth(rng, 32, 32).save(folder / f"{i}.png")
    lines = [{"file_name": f"{i}.png", "text": CAPTIONS[i % len(CAPTIONS)]} for i in range(8)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small pipeline of PixArt, pictures with captions, and their latents with the captions embedded and without."""
    folder = tmp_path_factory.mktemp("pixart")
    torch.manual_seed(0)
    sizes = WIDTH | {"in_channels": 4, "out_channels": 8, "sample_size": 8, "cross_attention_dim": 16}
    transformer = diffusers.PixArtTransformer2DModel(**sizes, caption_channels=TEXT)
    for parameter in transformer.parameters():
        nn.init.normal_(parameter, std=0.3)
    text = t5(folder / "t5", TEXT)
    parts = {"vae": autoencoder(), "scheduler": diffusers.DDIMScheduler()}
    diffusers.PixArtAlphaPipeline(**text, **parts, transformer=transformer).save_pretrained(folder / "base")
    encode = ["prepare", "encode", str(captioned_pictures(folder / "pictures"))]
    how = ["--autoencoder", str(folder / "base/vae"), "--workers", "0"]
    assert main([*encode, str(folder / "latents"), *how, "--text-encoder", str(folder / "base")]) == 0
    assert main([*encode, str(folder / "words"), *how, "--text-encoder", "words"]) == 0
    assert main([*encode, str(folder / "without-text"), *how]) == 0
    shutil.copytree(folder / "latents", folder / "scaled")
    index = json.loads((folder / "scaled/index.json").read_text())
    (folder / "scaled/index.json").write_text(json.dumps(index | {"scaling_factor": 0.5}))
    return folder


def test_the_first_step_has_the_losses_of_a_plain_loop(world: Path, tmp_path: Path) -> None:
    """Captions of different lengths are masked, and dropped ones are the empty prompt."""
    how: dict[str, Any] = {"data": str(world / "latents"), "label_dropout": 0.5, "steps": 1}
    config = distillation(world / "base", tmp_path, retrofit=RetrofitConfig(start="paper"), **how)
    trainer = Trainer(config, build=build_distillation)
    (batch,) = (pending.result() for pending in trainer.loader.batches(0, 0))
    before: Any = trainer.averaged()
    student = before.transformer
    teacher = diffusers.PixArtTransformer2DModel.from_pretrained(world / "base/transformer").eval()
    scheduler = diffusers.DDPMScheduler.from_pretrained(world / "base/scheduler")
    (x, text), (noise,), t = batch.raw, batch.draws.noise, batch.draws.t
    empty = trainer.data.empty_prompt.tokens  # type: ignore[attr-defined]
    assert 0 < batch.draws.dropped.sum() < len(t)
    losses, distances = [], []
    with torch.no_grad():
        for i in range(config.batch_size):
            prompt = empty if batch.draws.dropped[i] else text.tokens[i : i + 1, text.mask[i]]
            given = {
                "hidden_states": scheduler.add_noise(x[i : i + 1], noise[i : i + 1], t[i : i + 1]),
                "encoder_hidden_states": prompt,
                "timestep": t[i : i + 1],
                "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
            }
            predicted = student(**given, num_latents=batch.levels[0]).sample
            losses.append(F.mse_loss(predicted[:, :4], noise[i : i + 1]).item())
            distances.append(F.mse_loss(predicted, teacher(**given).sample).item())
    (report,) = trainer
    assert report.loss == pytest.approx(np.mean(losses), rel=1e-4)
    assert report.terms["distance"] == pytest.approx(np.mean(distances), rel=1e-4)


def test_captions_are_embedded_as_the_pipeline_does(world: Path) -> None:
    pipe = diffusers.PixArtAlphaPipeline.from_pretrained(world / "base")
    _, text = open_data(str(world / "latents")).batch(torch.arange(4))
    with torch.no_grad():
        for i, caption in enumerate(CAPTIONS):
            how = {"do_classifier_free_guidance": False, "clean_caption": True}  # as its __call__ has it
            tokens, mask, *_ = pipe.encode_prompt(caption, **how)
            torch.testing.assert_close(text.tokens[i, text.mask[i]], tokens[0, mask[0].bool()])


@pytest.mark.parametrize("trainable", ["interface+core-lora", "all"])
def test_the_original_pipeline_samples_from_the_result(world: Path, tmp_path: Path, trainable: str) -> None:
    options = ["--trainable", trainable, "--out", str(tmp_path / "run"), "--steps", "2", "--batch-size", "4"]
    options += ["--precision", "bf16", "--checkpoint-activations", "true"]
    assert main(["distill", "--base", str(world / "base"), "--data", str(world / "latents"), *options]) == 0
    from elit.integrations.families import ElasticPixArtTransformer2DModel

    pipe = diffusers.PixArtAlphaPipeline.from_pretrained(world / "base")
    pipe.transformer = ElasticPixArtTransformer2DModel.from_pretrained(tmp_path / "run/transformer")
    check_pictures(pipe, use_resolution_binning=False, clean_caption=False)


def check_pictures(pipe: Any, **how: Any) -> None:
    """An original pipeline draws at several budgets."""
    pipe.set_progress_bar_config(disable=True)
    how |= {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "np"}
    pictures = {}
    for budget in (1, 1 / 2, 1 / 8):
        pipe.transformer.set_budget(budget)
        drawn = pipe("a three", **how, generator=torch.Generator().manual_seed(0))
        pictures[budget] = drawn.images
        assert drawn.images.shape == (1, 32, 32, 3) and np.isfinite(drawn.images).all()
    assert not np.array_equal(pictures[1], pictures[1 / 2]) and not np.array_equal(pictures[1 / 2], pictures[1 / 8])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("WORLD/without-text", "has captions that are not embedded, and the base"),
        ("WORLD/pictures@WORLD/base/vae", "embed captions by the text encoder of the base, with elit prepare encode"),
        ("digits", "has samples of shape (1, 16, 16), and the base"),
        ("WORLD/scaled", "has latents of another autoencoder than that of the base"),
        ("WORLD/words", "has text embeddings of width 32, and the base"),
    ],
)
def test_data_without_the_text_of_the_base_are_refused(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], data: str, message: str
) -> None:
    given = ["--data", data.replace("WORLD", str(world)), "--out", str(tmp_path / "run")]
    assert main(["distill", "--base", str(world / "base"), *given]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------ velocities


@pytest.fixture(scope="module")
def sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small pipeline of Stable Diffusion 3, and latents with captions embedded by its three encoders."""
    folder = tmp_path_factory.mktemp("sd3")
    sd3_pipeline(folder / "parts")[0].save_pretrained(folder / "base")
    encode = ["prepare", "encode", str(captioned_pictures(folder / "pictures")), str(folder / "latents")]
    how = ["--autoencoder", str(folder / "base/vae"), "--text-encoder", str(folder / "base"), "--workers", "0"]
    assert main([*encode, *how]) == 0
    return folder


def test_a_base_that_predicts_velocities(sd3: Path, tmp_path: Path) -> None:
    """At full budget the first loss is that of the base: of rectified flow, on what the pipeline makes of captions."""
    settings: dict[str, Any] = {"data": str(sd3 / "latents"), "steps": 1, "label_dropout": 0.0, "batch_size": 3}
    config = distillation(sd3 / "base", tmp_path / "run", elit=ElasticConfig(levels=[16]), **settings)
    trainer = Trainer(config, build=build_distillation)
    (batch,) = (pending.result() for pending in trainer.loader.batches(0, 0))
    (report,) = trainer
    (x, text), (noise,), t = batch.raw, batch.draws.noise, batch.draws.t
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(sd3 / "base")
    embedded = [pipe.encode_prompt(each, None, None, do_classifier_free_guidance=False) for each in CAPTIONS]
    losses = []
    with torch.no_grad():
        for i in range(3):
            fits = [torch.allclose(tokens[0], text.tokens[i, 1:], atol=1e-5) for tokens, *_ in embedded]
            tokens, _, pooled, _ = embedded[fits.index(True)]
            given = {"encoder_hidden_states": tokens, "pooled_projections": pooled, "timestep": 1000 * t[i : i + 1]}
            x_t = (1 - t[i]) * x[i : i + 1] + t[i] * noise[i : i + 1]
            losses.append(F.mse_loss(pipe.transformer(x_t, **given).sample, noise[i : i + 1] - x[i : i + 1]).item())
    assert report.loss == pytest.approx(np.mean(losses), rel=1e-4)
    assert report.terms == {"distillation": 0.0, "distance": 0.0}


def test_pictures_beyond_the_positions_of_the_base(
    sd3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(sd3 / "base", tmp_path / "base")
    file = tmp_path / "base/transformer/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"pos_embed_max_size": 3}))
    given = ["distill", "--base", str(tmp_path / "base"), "--data", str(sd3 / "latents")]
    assert main([*given, "--out", str(tmp_path / "run")]) == 2
    assert "has samples of 8x8, and the base" in (said := capsys.readouterr().err) and "up to 6 a side" in said


def test_stable_diffusion_3_samples_from_the_result(
    sd3: Path, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["distill", "--base", str(sd3 / "base"), "--out", str(tmp_path / "run"), "--steps", "2"]
    assert main([*given, "--data", str(world / "latents")]) == 2
    assert "has text embeddings of width 16, and the base" in capsys.readouterr().err
    how = ["--data", str(sd3 / "latents"), "--batch-size", "4", "--trainable", "interface+core-lora"]
    assert main([*given, *how, "--times.shift", "3.0", "--precision", "bf16"]) == 0
    from elit.integrations.families import ElasticSD3Transformer2DModel

    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(sd3 / "base")
    pipe.transformer = ElasticSD3Transformer2DModel.from_pretrained(tmp_path / "run/transformer")
    check_pictures(pipe, max_sequence_length=8)
