"""FLUX, Qwen-Image and Wan in `elit distill`: what their own pipelines do with latents and prompts, and ours alike."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from elit.cli import main
from elit.conditions import Text
from elit.training import ElasticConfig, Trainer
from elit.training.distillation import build_distillation
from tests.helpers.pictures import smooth
from tests.helpers.small_distillations import distillation
from tests.helpers.small_pipelines import PIPELINES, autoencoder
from tests.helpers.small_retrofits import FAMILIES, TEXT, make_base
from tests.integrations.test_distill_text import CAPTIONS, captioned_pictures, check_pictures

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")
PICTURES = ("FLUX", "Qwen-Image")


def save_clips(folder: Path) -> Path:
    """Eight clips, folders of five frames of 64x64 pixels, with captions."""
    rng = np.random.default_rng(0)
    for i in range(8):
        (folder / str(i)).mkdir(parents=True)
        for j in range(5):
            smooth(rng, 64, 64).save(folder / f"{i}/{j}.png")
    lines = [{"file_name": str(i), "text": CAPTIONS[i % len(CAPTIONS)]} for i in range(8)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


@pytest.fixture(scope="module", params=[*PICTURES, "Wan"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A small pipeline of a family, and latents with captions that its own parts embedded."""
    name: str = request.param
    folder = tmp_path_factory.mktemp(name)
    pipe = PIPELINES[name](folder / "parts")[0]
    pipe.save_pretrained(folder / "base")
    source = str(captioned_pictures(folder / "pictures") if name in PICTURES else save_clips(folder / "clips"))
    source += "" if name in PICTURES else "@5x64x64"
    encode = ["prepare", "encode", source, str(folder / "latents"), "--workers", "0"]
    how = ["--autoencoder", str(folder / "base/vae"), "--text-encoder", str(folder / "base")]
    assert main([*encode, *how]) == 0
    return name, folder


def given_by_pipeline(name: str, pipe: Any, x: torch.Tensor, t: torch.Tensor, caption: str) -> dict[str, Any]:
    """What the original pipeline gives its transformer for noisy latents (1, C, ..., H, W) and one caption."""
    height, width = x.shape[-2:]
    if name == "Wan":
        tokens, _ = pipe.encode_prompt(caption, do_classifier_free_guidance=False, max_sequence_length=512)
        return {"hidden_states": x, "timestep": 1000 * t, "encoder_hidden_states": tokens}
    packed = pipe._pack_latents(x, 1, x.shape[1], height, width)
    if name == "FLUX":
        tokens, pooled, text_ids = pipe.encode_prompt(caption, None)
        ids = pipe._prepare_latent_image_ids(1, height // 2, width // 2, x.device, x.dtype)
        places = {"img_ids": ids, "txt_ids": text_ids, "pooled_projections": pooled}
    else:
        tokens, mask = pipe.encode_prompt(caption, max_sequence_length=512)  # as its __call__ has it
        places = {"img_shapes": [[(1, height // 2, width // 2)]], "encoder_hidden_states_mask": mask}
    return {"hidden_states": packed, "timestep": t, "encoder_hidden_states": tokens, **places}


def test_the_first_loss_is_that_of_the_original_pipeline(world: tuple[str, Path], tmp_path: Path) -> None:
    """At full budget, with the pipeline's own embedding, packing and positions, one caption after the other."""
    name, folder = world
    settings: dict[str, Any] = {"data": str(folder / "latents"), "steps": 1, "label_dropout": 0.0, "batch_size": 3}
    full = ElasticConfig(levels=[8 if name == "Wan" else 16])
    config = distillation(folder / "base", tmp_path / "run", elit=full, **settings)
    trainer = Trainer(config, build=build_distillation)
    (batch,) = (pending.result() for pending in trainer.loader.batches(0, 0))
    (report,) = trainer
    (x, text), (noise,), t = batch.raw, batch.draws.noise, batch.draws.t
    assert x.std() > 0.1
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder / "base")
    losses = []
    with torch.no_grad():
        for i in range(3):
            x_t = (1 - t[i]) * x[i : i + 1] + t[i] * noise[i : i + 1]
            every = [given_by_pipeline(name, pipe, x_t, t[i : i + 1], caption) for caption in CAPTIONS]
            own = text.tokens[i, text.mask[i]]
            own = own[1:] if name == "FLUX" else own  # the first one is the vector for the whole prompt
            fits = [each["encoder_hidden_states"][0, : len(own)] for each in every]
            given = next(
                e for e, f in zip(every, fits, strict=True) if f.shape == own.shape and f.allclose(own, atol=1e-5)
            )
            velocity = noise[i : i + 1] - x[i : i + 1]
            target = velocity if name == "Wan" else pipe._pack_latents(velocity, 1, *velocity.shape[1:])
            losses.append(F.mse_loss(pipe.transformer(**given).sample, target).item())
    assert report.loss == pytest.approx(np.mean(losses), rel=1e-4)  # float32, other batches
    assert report.terms == {"distillation": 0.0, "distance": 0.0}


@pytest.mark.parametrize("trainable", ["interface+core-lora", "all"])
def test_the_original_pipeline_samples_from_the_result(world: tuple[str, Path], tmp_path: Path, trainable: str) -> None:
    from elit.integrations import families

    name, folder = world
    given = ["distill", "--base", str(folder / "base"), "--data", str(folder / "latents"), "--times.shift", "3.0"]
    how = ["--trainable", trainable, "--out", str(tmp_path / "run"), "--steps", "2", "--batch-size", "4"]
    assert main([*given, *how, "--precision", "bf16", "--checkpoint-activations", "true"]) == 0
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder / "base")
    kind = getattr(families, f"Elastic{type(pipe.transformer).__name__}")
    pipe.transformer = kind.from_pretrained(tmp_path / "run/transformer")
    if name in PICTURES:
        check_pictures(pipe, max_sequence_length=8)
    else:
        check_clips(pipe)


def check_clips(pipe: Any) -> None:
    pipe.set_progress_bar_config(disable=True)
    how = {"height": 64, "width": 64, "num_frames": 5, "num_inference_steps": 2, "guidance_scale": 1.0}
    clips = []
    for budget in (1, 1 / 8):
        pipe.transformer.set_budget(budget)
        clips.append(pipe("a three", **how, output_type="np", generator=torch.Generator().manual_seed(0)).frames)
    assert np.isfinite(clips[0]).all() and not np.array_equal(*clips)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_idle_layers_are_those_that_get_no_gradient(family: Any) -> None:
    from elit.integrations.families import FAMILIES as ELASTIC

    base = make_base(family)
    version = ELASTIC[type(base)]
    base(**family.inputs(2), return_dict=False)[0].square().sum().backward()
    last = f"{version.stacks[-1]}.{len(getattr(base, version.stacks[-1])) - 1}"
    without = {name for name, parameter in base.named_parameters() if parameter.grad is None}
    assert without == {
        name for name, _ in base.named_parameters() if name.startswith(tuple(f"{last}.{each}" for each in version.idle))
    }


def test_a_base_that_is_told_its_guidance(tmp_path: Path) -> None:
    """FLUX.1-dev: teacher and student see the scale of the settings."""
    from elit.integrations.student import Student, StudentConfig

    sizes = {"num_layers": 2, "num_single_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16}
    width = {"joint_attention_dim": TEXT, "pooled_projection_dim": 16, "axes_dims_rope": (4, 6, 6), "in_channels": 16}
    torch.manual_seed(0)
    base = diffusers.FluxTransformer2DModel(**sizes, **width, guidance_embeds=True).eval()
    base.save_pretrained(tmp_path / "transformer")
    about: dict[str, Any] = {"base": str(tmp_path / "transformer"), "trainable": "all", "num_classes": 0}
    about |= {"in_channels": 4, "input_size": (8, 8), "empty_shape": (6, TEXT)}
    x, t = torch.randn(2, 4, 8, 8), torch.rand(2)
    y = Text(torch.randn(2, 6, TEXT), torch.ones(2, 6, dtype=torch.bool))
    answers = {}
    for scale in (2.0, 5.0):
        student = Student(StudentConfig(**about, guidance_scale=scale))
        answers[scale] = student.as_base(x, t, y, base)
        torch.testing.assert_close(student(x, t, y), answers[scale])
        given = student.transformer.inputs(x, t, y) | {"guidance": torch.full((2,), scale)}
        expected = F.pixel_shuffle(base(**given).sample.transpose(1, 2).unflatten(2, (4, 4)), 2)
        torch.testing.assert_close(answers[scale], expected)
    assert not torch.allclose(answers[2.0], answers[5.0])


def said(capsys: pytest.CaptureFixture[str], *command: object) -> str:
    """What a command says that ends with 2, in one sentence."""
    assert main([str(each) for each in command]) == 2
    (line,) = [each for each in capsys.readouterr().err.splitlines() if each.startswith("elit: ")]
    return line


def test_prompts_of_other_encoders_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """FLUX needs the vector for the whole prompt, and of its own width; Wan needs none."""
    for name in ("FLUX", "Wan"):
        PIPELINES[name](tmp_path / "parts" / name)[0].save_pretrained(tmp_path / name)
    alone = tmp_path / "parts/FLUX/t5"
    diffusers.FluxPipeline.from_pretrained(tmp_path / "FLUX").text_encoder_2.save_pretrained(alone)
    pictures, clips = captioned_pictures(tmp_path / "pictures"), save_clips(tmp_path / "clips")
    for source, vae, encoder in ((pictures, "FLUX", alone), (f"{clips}@5x64x64", "Wan", tmp_path / "FLUX")):
        encode = ["prepare", "encode", str(source), str(tmp_path / f"latents-{vae}"), "--workers", "0"]
        assert main([*encode, "--autoencoder", str(tmp_path / vae / "vae"), "--text-encoder", str(encoder)]) == 0
    for name, message in (("FLUX", "has no vector for the whole prompt"), ("Wan", "has a vector of width 16 for the")):
        given = ["--base", tmp_path / name, "--data", tmp_path / f"latents-{name}", "--out", tmp_path / "run"]
        assert message in said(capsys, "distill", *given)
    assert not (tmp_path / "run").exists()


def test_images_are_no_clips(world: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, folder = world
    data = "moving-digits" if name in PICTURES else "digits"
    line = said(capsys, "distill", "--base", folder / "base", "--data", data, "--out", tmp_path / "run")
    assert f"takes latents of {'images' if name in PICTURES else 'clips'} with 4 channels" in line


def test_guidance_that_a_base_does_not_take_is_refused(
    world: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, folder = world
    given = ["--base", folder / "base", "--data", folder / "latents", "--out", tmp_path / "run"]
    assert "takes none as an input" in said(capsys, "distill", *given, "--guidance-scale", "7")


def changed(source: Path, target: Path, file: str, text: str) -> Path:
    shutil.copytree(source, target)
    (target / file).write_text(text)
    return target


def test_damaged_bases(world: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, folder = world
    given = ["--data", folder / "latents", "--out", tmp_path / "run"]
    for i, file in enumerate(("model_index.json", "vae/config.json")):
        base = changed(folder / "base", tmp_path / str(i), file, "{")
        assert f"{file} is damaged" in said(capsys, "distill", "--base", base, *given)
    assert not (tmp_path / "run").exists()


def test_versions_of_wan_that_distillation_does_not_know(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Wan 2.2: two experts, or a time for each token."""
    PIPELINES["Wan"](tmp_path / "parts")[0].save_pretrained(tmp_path / "base")
    index = json.loads((tmp_path / "base/model_index.json").read_text())
    for i, (change, message) in enumerate(
        (({"boundary_ratio": 0.875}, "has two transformers"), ({"expand_timesteps": True}, "each token its own time"))
    ):
        base = changed(tmp_path / "base", tmp_path / str(i), "model_index.json", json.dumps(index | change))
        assert message in said(capsys, "distill", "--base", base, "--data", "digits", "--out", tmp_path / "run")


def test_what_prepare_encode_cannot_use(
    world: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It says so before it encodes anything, and leaves nothing behind."""
    name, folder = world
    source = str(folder / "pictures") if name in PICTURES else f"{folder / 'clips'}@5x64x64"
    encode, own = ["prepare", "encode", source, tmp_path / "latents", "--workers", "0"], folder / "base/vae"
    text = ["--autoencoder", own, "--text-encoder"]
    assert "is no autoencoder whose scaling is known" in said(
        capsys, *encode, "--autoencoder", folder / "base/transformer"
    )
    index = json.loads((folder / "base/model_index.json").read_text())
    other = index["_class_name"].replace("Pipeline", "Img2ImgPipeline")
    for i, (change, message) in enumerate(
        (({"_class_name": None}, "is damaged: it names no class"), ({"_class_name": other}, "whose way with prompts"))
    ):
        base = changed(folder / "base", tmp_path / str(i), "model_index.json", json.dumps(index | change))
        assert message in said(capsys, *encode, *text, base)
    shutil.copytree(folder / "base", tmp_path / "bare")
    shutil.rmtree(tmp_path / "bare/tokenizer")
    assert "the text encoders of the pipeline" in said(capsys, *encode, *text, tmp_path / "bare")
    if name == "Wan":
        encode[2] = f"{folder / 'clips'}@4x64x64"
        assert "clips have 4 frames, of which AutoencoderKLWan drops the last 3; take 5 frames" in said(
            capsys, *encode, "--autoencoder", own
        )
    assert not (tmp_path / "latents").exists()


def test_clips_are_not_for_an_autoencoder_of_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    autoencoder().save_pretrained(tmp_path / "vae")
    source = f"{save_clips(tmp_path / 'clips')}@5x64x64"
    line = said(capsys, "prepare", "encode", source, tmp_path / "latents", "--autoencoder", tmp_path / "vae")
    assert "AutoencoderKL cannot encode samples of shape (3, 5, 64, 64)" in line
    assert not (tmp_path / "latents").exists()
