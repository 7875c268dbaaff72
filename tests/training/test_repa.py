"""Alignment of hidden tokens with a pretrained encoder."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import elit
from elit import ElitError
from elit.data import ImageData, digits8
from elit.training import ElasticConfig, ModelChoice, OptimizerConfig, RepaConfig, TrainConfig, Trainer, repa
from elit.training.repa import AlignmentFeatures
from tests.helpers.runs import FIELDS, config, contents, small_encoder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(small_encoder(tmp_path_factory.mktemp("dino") / "encoder"))


@pytest.fixture(autouse=True)
def _narrow_projector(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repa, "HIDDEN", 64)  # for speed


def aligned(out: Path, encoder: str, **changes: Any) -> TrainConfig:
    settings = {"repa": RepaConfig(encoder, depth=1), "optimizer": OptimizerConfig(lr=1e-3, warmup_steps=0)}
    return config(out, **(settings | changes))


def test_tokens_come_to_resemble_the_features(tmp_path: Path, encoder: str) -> None:
    reports = list(Trainer(aligned(tmp_path / "run", encoder, steps=15)))
    seen = [report.alignment for report in reports]
    assert all(value is not None and -1 <= value <= 1 for value in seen)
    assert seen[-1] > seen[0] + 0.1  # type: ignore[operator]
    plain = aligned(tmp_path / "plain", encoder, repa=RepaConfig(), steps=1)
    (first,) = Trainer(plain)
    assert first.loss == reports[0].loss  # the loss of flow matching alone
    assert first.alignment is None


def test_alignment_is_the_mean_cosine_of_projected_tokens(tmp_path: Path, encoder: str) -> None:
    """Of the first step, against loops over samples and tokens."""
    from transformers import BitImageProcessor, Dinov2Model

    trainer = Trainer(aligned(tmp_path / "run", encoder, steps=1, batch_size=3, label_dropout=0.0, repa=RepaConfig(
        encoder, depth=1, coefficient=0.0)))  # fmt: skip
    from elit.data import sample_indices
    from elit.seeding import derive_seed
    from elit.training.batch import draw

    indices = sample_indices(0, 0, 3, len(trainer.data))
    x, y = trainer.data.batch(indices)
    draws, _ = draw(trainer.flow, 0.0, derive_seed(0, "step", 0), 3)
    hidden: list[torch.Tensor] = []
    trainer.model.blocks[0].register_forward_hook(lambda module, inputs, output: hidden.append(output))
    at = draws.t.view(3, 1, 1, 1)
    with torch.no_grad():
        trainer.model((1 - at) * x + at * draws.noise[0], draws.t, y)
        tokens = trainer.objective.projector(hidden[0])  # type: ignore[misc]
        # 8 x 8 tokens of patches of 6 pixels: 48 px
        processor = BitImageProcessor(size={"height": 48, "width": 48}, do_center_crop=False, resample=3)
        pixels = ((x + 1) * 127.5).round().byte().expand(-1, 3, -1, -1)
        images = processor(list(pixels), return_tensors="pt")["pixel_values"]
        features = Dinov2Model.from_pretrained(encoder).eval()(images).last_hidden_state[:, 1:]
    expected = [
        float(torch.dot(a, b)) / math.sqrt(float(a.square().sum() * b.square().sum()))
        for sample, seen in zip(tokens.double(), features.double(), strict=True)
        for a, b in zip(sample, seen, strict=True)
    ]
    (report,) = trainer
    # The processor resizes in bytes: rounding of 1/255, on features of a random network
    assert report.alignment == pytest.approx(sum(expected) / len(expected), abs=2e-3)


def test_resumes_bit_identically_and_leaves_the_model_alone(tmp_path: Path, encoder: str) -> None:
    first, again = tmp_path / "first", tmp_path / "again"
    Trainer(aligned(first, encoder, steps=6)).run_to_end()
    for report in Trainer(aligned(again, encoder, steps=6, checkpoint_every=3)):
        if report.step == 4:
            break
    Trainer(aligned(again, encoder, steps=6, checkpoint_every=3)).run_to_end()
    assert contents(again, 6) == contents(first, 6)
    assert any(key.startswith("training/repa.") for key in contents(first, 6))
    plain = elit.create("ELIT-DiT-S/1", input_size=8, in_channels=1, num_classes=10, group_size=4, **FIELDS)
    assert elit.load(first).state_dict().keys() == plain.state_dict().keys()
    with pytest.raises(ElitError, match="was started with repa"):
        Trainer(aligned(first, encoder, repa=RepaConfig(), steps=7)).run_to_end()
    with pytest.raises(ElitError, match=r"repa.encoder is set, but .*step-00000001 was trained without"):
        Trainer(aligned(tmp_path / "plain", encoder, repa=RepaConfig(), steps=1)).run_to_end()
        Trainer(aligned(tmp_path / "on", encoder, resume=str(tmp_path / "plain"))).run_to_end()


def test_images_of_the_published_layout(tmp_path: Path, encoder: str) -> None:
    """The features of a latent are those of its image."""
    import json

    import numpy as np

    draws = np.random.default_rng(0)
    root = tmp_path / "data"
    (root / "images/00000").mkdir(parents=True)
    (root / "vae-sd/00000").mkdir(parents=True)
    names = {}
    for i in range(4):
        names[f"00000/img{i:08d}.png"] = i % 2
        Image.fromarray(draws.integers(0, 256, (64, 64, 3), np.uint8)).save(root / f"images/00000/img{i:08d}.png")
        np.save(root / f"vae-sd/00000/img-mean-std-{i:08d}.npy", draws.random((8, 8, 8), np.float32))
    (root / "images/dataset.json").write_text(json.dumps({"labels": [list(item) for item in names.items()]}))
    settings = aligned(tmp_path / "run", encoder, data=str(root), steps=2, batch_size=2)
    trainer = Trainer(settings)
    assert isinstance(trainer.objective.features, AlignmentFeatures)
    images = ImageData(elit.data.ImageFolder(root / "images").batch(torch.arange(4))[0], torch.arange(4), 0)
    of_images = AlignmentFeatures(encoder, trainer.model, images, torch.device("cpu"))  # type: ignore[arg-type]
    indices = torch.tensor([2, 0])
    latents = trainer.data.batch(indices)[0]
    pixels = trainer.objective.features.read(indices, None)
    assert torch.equal(trainer.objective.features(pixels, latents), of_images(None, images.images[indices]))
    trainer.run_to_end()
    (root / "images/00000/img00000003.png").rename(root / "images/00000/img00000009.png")
    (root / "images/dataset.json").unlink()
    (root / "vae-sd/dataset.json").write_text(json.dumps({"labels": None}))
    with pytest.raises(ElitError, match="does not hold one image for each array"):
        Trainer(settings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"repa": RepaConfig("ENCODER", depth=2)}, "repa.depth is 2; the model has spatial tokens after its blocks 1 "),
        (
            {"repa": RepaConfig("runs/no/encoder", depth=1)},
            "no weights of DINOv2 at runs/no/encoder; .* with --repa.encoder",
        ),
        ({"repa": RepaConfig("ENCODER", coefficient=-1.0, depth=1)}, "repa.coefficient is -1.0"),
        (
            {"elit": ElasticConfig(), "model": ModelChoice("HDiT-S/2", {"width": 32, "num_heads": 2, "patch_size": 1})},
            "a HDiT of this kind cannot be aligned",
        ),
    ],
)
def test_refused(tmp_path: Path, encoder: str, changes: dict[str, Any], message: str) -> None:
    repa = changes.get("repa", RepaConfig("ENCODER", depth=1))
    changes["repa"] = RepaConfig(repa.encoder.replace("ENCODER", encoder), repa.coefficient, repa.depth)
    with pytest.raises(ElitError, match=message):
        Trainer(aligned(tmp_path / "run", encoder, **changes))
    assert not (tmp_path / "run").exists()


def test_latents_alone_are_refused(tmp_path: Path, encoder: str) -> None:
    data = ImageData(torch.randn(20, 4, 8, 8), digits8().labels[:20], 10)
    with pytest.raises(ElitError, match=r"repa.encoder looks at images, and the data has latents alone"):
        Trainer(aligned(tmp_path / "run", encoder), data)
