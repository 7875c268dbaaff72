"""Learning curves at equal training FLOPs, at a size where they show nothing."""

import json
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.optim import Muon

import at_scale
import claim
import learning
from curves import (
    OutOfTimeError,
    Scale,
    SelfDistillation,
    Variant,
    config_of,
    forward_flops,
    train,
    train_all,
)
from elit.data import ImageData, scenes
from elit.evaluation import train_classifier
from elit.flow import flow_of
from elit.training import Trainer
from elit.training.batch import TrainingDraws
from tests.helpers.models import tiny

FIELDS = {"width": 16, "depth": 4, "num_heads": 2, "label_std": 1.0, "positions": "rotary"}
NAMES = ("plain", "learned/1", "anchored/2", "anchored/2, self-distilled", "anchored/full")


def few(data: ImageData, count: int = 16) -> ImageData:
    return ImageData(data.images[:count], data.labels[:count], data.num_classes)


@pytest.fixture(scope="module")
def scale(tmp_path_factory: pytest.TempPathFactory) -> Scale:
    out = tmp_path_factory.mktemp("curves")
    return Scale(few(scenes()), few(scenes(held_out=True)), FIELDS, 4, 40, 4, out)


@pytest.mark.parametrize("name", [*NAMES, "anchored/1, full first", "plain, 8 blocks"])
def test_every_training_has_the_flops_of_the_plain_one(scale: Scale, name: str) -> None:
    """Steps are a multiple of the points of a curve: of some 800 steps that is at most a hundredth."""
    longer, plain = replace(scale, steps=800), learning.VARIANTS["plain"]
    variant, config = learning.VARIANTS[name], config_of(longer, learning.VARIANTS, name, 0)
    of_plain = forward_flops(longer, config_of(longer, learning.VARIANTS, "plain", 0), plain)[0] * 800
    assert forward_flops(longer, config, variant)[0] * config.steps == pytest.approx(of_plain, rel=0.015)


@pytest.mark.parametrize(
    ("names", "seeds", "steps", "said"),
    [
        (["learned/9"], 1, 40, "no variant is named 'learned/9'"),
        ([], 1, 40, r"names are \[\]"),
        (["plain"], 0, 40, "seeds 0"),
        (["plain"], 1, 7, "steps 7"),
        (["plain", "anchored/32"], 1, 40, "32 levels in a step of batch_size 4"),
    ],
)
def test_what_cannot_be_trained_is_told_first(
    scale: Scale, tmp_path: Path, names: list[str], seeds: int, steps: int, said: str
) -> None:
    with pytest.raises(SystemExit, match=said):
        train_all(replace(scale, steps=steps, out=tmp_path), learning.VARIANTS, names, seeds)
    assert not list(tmp_path.iterdir())


def test_trainings_of_other_scales_have_other_folders(scale: Scale, tmp_path: Path) -> None:
    there = replace(scale, out=tmp_path)
    for other in (there, replace(there, steps=16), replace(there, batch_size=2)):
        assert len(train(other, learning.VARIANTS, "plain", 0).losses["1"]) == 8
    assert {path.name for path in tmp_path.iterdir()} == {
        "32px-batch-4-steps-40",
        "32px-batch-4-steps-16",
        "32px-batch-2-steps-40",
    }


def test_full_budget_can_come_first(scale: Scale, tmp_path: Path) -> None:
    name = "anchored/1, full first"
    steps = config_of(scale, learning.VARIANTS, name, 0).steps
    curve = train(replace(scale, out=tmp_path), learning.VARIANTS, name, 0)
    drawn = [json.loads(line) for line in (Path(curve.run) / "log.jsonl").read_text().splitlines()]
    full = {line["num_latents"] == 16 for line in drawn if line["step"] <= steps / 2}
    assert full == {True} and any(line["num_latents"] < 16 for line in drawn)


def test_self_distillation_pays_for_its_teacher(scale: Scale) -> None:
    """Half of the samples have, beside their own forward and backward, one more forward at full budget."""
    names = ("anchored/2", "anchored/2, self-distilled")
    (own, _), (with_teacher, _), (full, _) = (
        forward_flops(scale, config_of(scale, learning.VARIANTS, name, 0), learning.VARIANTS[name])
        for name in (*names, "anchored/full")
    )
    taught = (with_teacher - own) / (full / 3)  # as a share of all samples
    assert 0.4 < taught < 0.5  # of the half that draws, one of 16 levels is full


def test_trainings_are_kept(scale: Scale) -> None:
    first = train_all(scale, learning.VARIANTS, NAMES, 1)
    states = {path: path.stat().st_mtime_ns for path in scale.out.rglob("*.safetensors")}
    assert states
    again = train_all(scale, learning.VARIANTS, NAMES, 1)
    assert first == again
    assert {path: path.stat().st_mtime_ns for path in scale.out.rglob("*.safetensors")} == states
    for name, (curve,) in first.items():
        assert len(curve.flops) == 8 and curve.flops[0] > 0
        assert curve.final(1.0) == curve.best
        assert (curve.final(1 / 16) is None) == (name in ("plain", "anchored/full"))


def test_a_training_that_is_out_of_time_goes_on(scale: Scale, tmp_path: Path) -> None:
    there = replace(scale, out=tmp_path)
    with pytest.raises(OutOfTimeError):
        train(there, learning.VARIANTS, "plain", 5, until=time.monotonic())
    whole = train(replace(scale, out=tmp_path / "whole"), learning.VARIANTS, "plain", 5)
    assert train(there, learning.VARIANTS, "plain", 5).losses == whole.losses


def test_the_distance_is_that_from_full_budget() -> None:
    """It moves the lower budget alone: full budget is not drawn towards it."""
    model = tiny(seed=3)
    flow = flow_of(model, "linear")
    objective = SelfDistillation(model, flow, 1.0)
    x, noise, t = torch.randn(3, *model.input_shape()), torch.randn(3, *model.input_shape()), torch.rand(3)
    y = torch.tensor([0, 1, 2])
    draws = TrainingDraws(t=t, noise=[noise], active=1, dropped=torch.zeros(3, dtype=torch.bool))
    x_t = (1 - t.view(-1, 1, 1, 1)) * x + t.view(-1, 1, 1, 1) * noise

    def velocity(level: int) -> Tensor:
        return model(x_t, t, y, num_latents=level)

    loss, distance = objective(x, y, draws, 1)
    torch.testing.assert_close(loss, (velocity(1) - (noise - x)).square().flatten(1).mean(1))
    torch.testing.assert_close(distance, (velocity(1) - velocity(4)).square().flatten(1).mean(1))
    weights = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(distance.sum(), weights, allow_unused=True)
    expected = torch.autograd.grad(
        (velocity(1) - velocity(4).detach()).square().flatten(1).mean(1).sum(), weights, allow_unused=True
    )
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other)
    assert not objective(x, y, draws, 4)[1].any()


def updates(scale: Scale, variant: Variant, out: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Returns random gradients, and what a step of the optimizers changes by them."""
    trainer = Trainer(config_of(replace(scale, out=out), {"": variant}, "", 0), scale.train, scale.held_out)
    variant.change(trainer)
    rng = torch.Generator().manual_seed(0)
    parameters = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in parameters.items()}
    for p in parameters.values():
        p.grad = torch.randn(p.shape, generator=rng)
    gradients = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}
    for optimizer in trainer.trained.optimizers.values():
        optimizer.step()
    return gradients, {name: p.detach() - before[name] for name, p in parameters.items()}


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_the_interface_alone_can_have_other_rates(scale: Scale, tmp_path: Path, factor: float) -> None:
    variant = learning.VARIANTS["learned/1"]
    _, usual = updates(scale, variant, tmp_path)
    _, other = updates(scale, learning.interface_at(factor, variant), tmp_path)
    assert any(name.startswith("interface.") for name in usual)
    for name, update in usual.items():
        assert update.any()
        expected = factor * update if name.startswith("interface.") else update
        torch.testing.assert_close(other[name], expected, rtol=1e-3, atol=1e-6)  # differences of rounded weights


def test_muon_can_take_matrices_whole(scale: Scale, tmp_path: Path) -> None:
    """Queries, keys and values are then one matrix, as for PyTorch's Muon."""
    variant = learning.VARIANTS["anchored/2, whole matrices"]
    config = config_of(scale, {"": variant}, "", 0).optimizer
    gradients, found = updates(scale, variant, tmp_path)
    _, usual = updates(scale, learning.VARIANTS["anchored/2"], tmp_path)
    name = "blocks.1.attention.qkv.weight"
    weight = torch.nn.Parameter(torch.zeros_like(gradients[name]))
    weight.grad = gradients[name]
    Muon(
        [weight], lr=config.muon_lr, weight_decay=0.0, momentum=config.muon_momentum, ns_steps=config.muon_ns_steps
    ).step()
    torch.testing.assert_close(found[name], weight.detach(), rtol=1e-3, atol=1e-6)
    assert not torch.allclose(usual[name], found[name], atol=1e-4)
    torch.testing.assert_close(usual["blocks.1.mlp.fc1.weight"], found["blocks.1.mlp.fc1.weight"])


def test_mosaics_are_scenes_of_one_class_beside_empty_ones() -> None:
    mosaics = claim.mosaics(2, held_out=True)
    assert mosaics.images.shape == (1024, 1, 64, 64) and len(claim.mosaics(2)) == 8000
    tiles = mosaics.images.unfold(2, 32, 32).unfold(3, 32, 32)[:, 0].flatten(1, 2)  # (M, 4, 32, 32)
    filled = (tiles != -1).flatten(2).any(2)
    assert filled.any(1).all()
    assert claim.mosaics(4, held_out=True).images.shape == (256, 1, 128, 128)
    assert 0.5 < filled.float().mean() < 0.7  # a half, and one at the least
    source = scenes(held_out=True)
    known = {image.numpy().tobytes(): label for image, label in zip(source.images, source.labels, strict=True)}
    for tile, label in zip(tiles[:40, 0][filled[:40, 0]], mosaics.labels[:40][filled[:40, 0]], strict=True):
        assert known[tile.contiguous().numpy().tobytes()] == label


def test_the_claim_is_judged_at_the_highest_budget(scale: Scale, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim, "train_classifier", partial(train_classifier, steps=3))
    names = ("plain", "learned, to 1/4")
    curves = train_all(scale, claim.VARIANTS, names, 1)
    claim.report(curves, scale, samples=12, guidance=2.0)
    written = json.loads((scale.out / "claim.json").read_text())
    assert set(written["samples"]) == set(names)
    ((ends,), (others,)) = (written["samples"][name] for name in names)
    assert len(ends["Frechet distance"]) == len(claim.QUARTERS)
    assert len({*ends["Frechet distance"], *others["Frechet distance"]}) == 2 * len(claim.QUARTERS)  # each its weights'
    assert curves["learned, to 1/4"][0].final(1.0) is None
    assert (scale.out / "claim.png").stat().st_size > 0


def test_at_scale_runs_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(claim, "mosaics", lambda side, held_out=False: few(scenes(held_out), 8))
    monkeypatch.setattr(claim, "train_classifier", partial(train_classifier, steps=3))
    sizes = {
        "width": 16,
        "depth": 4,
        "steps": 20,  # and 8 at 128 pixels
        "batch_size": 4,
        "compile": False,
        "out": tmp_path,
        "precision": "fp32",
        "samples": 12,
    }
    monkeypatch.setattr(at_scale, "SEEDS", 1)
    at_scale.run(minutes=0, **sizes)
    assert "the minutes are over; the same command goes on" in capsys.readouterr().out
    at_scale.run(**sizes)
    assert (tmp_path / "64px" / "learning.png").exists() and (tmp_path / "128px" / "claim.png").exists()
