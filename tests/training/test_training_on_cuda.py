"""Training and sampling on a GPU: what is near, what is the same, and what is the same to the bit."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

import elit
from elit.data import ImageData, digits8
from elit.data.pixels import from_uint8
from elit.interface import BudgetByNoise
from elit.training import ElasticConfig, ModelChoice, OptimizerConfig, StepReport, Trainer, state
from tests.helpers.runs import FIELDS, config, contents, log, train_together

pytestmark = pytest.mark.cuda

ADAMW = OptimizerConfig(lr=1e-3, warmup_steps=5)
"""Not Muon, which iterates in bf16, where last bits grow."""


def reports(out: Path, steps: int = 6, **changes: Any) -> list[StepReport]:
    return list(Trainer(config(out, steps=steps, **({"optimizer": ADAMW} | changes))))


def agree(a: list[StepReport], b: list[StepReport], rel: float) -> None:
    for one, other in zip(a, b, strict=True):
        assert other.num_latents == one.num_latents
        assert other.loss == pytest.approx(one.loss, rel=rel)
        assert other.grad_norm == pytest.approx(one.grad_norm, rel=10 * rel)


def test_steps_in_half_precision_are_near_those_in_full(tmp_path: Path) -> None:
    single, half = reports(tmp_path / "a", precision="fp32"), reports(tmp_path / "b")
    agree(single, half, rel=1e-2)  # bf16, the default there, has 8 bits
    assert [report.loss for report in single] != [report.loss for report in half]


@pytest.mark.parametrize("checkpointed", [False, True], ids=["kept activations", "checkpointed activations"])
@pytest.mark.parametrize(("precision", "rel"), [("fp32", 1e-4), ("bf16", 1e-2)])
def test_compiled_steps_are_the_eager_ones(tmp_path: Path, precision: str, rel: float, checkpointed: bool) -> None:
    torch._dynamo.reset()
    eager = reports(tmp_path / "a", precision=precision)
    compiled = reports(tmp_path / "b", precision=precision, compile=True, checkpoint_activations=checkpointed)
    agree(eager, compiled, rel)


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_step_waits_for_nothing(tmp_path: Path, precision: str, name: Literal["adamw", "muon"]) -> None:
    """From the second step on, with batches of several levels; the numbers of the step before are waited for through
    an event, which torch does not count as a synchronisation."""
    by_noise = ElasticConfig(group_size=4, by_noise=BudgetByNoise([0.6], [0.25, 1.0]))
    optimizer = OptimizerConfig(name, lr=1e-3, warmup_steps=5)
    settings: dict[str, Any] = {"elit": by_noise, "optimizer": optimizer, "precision": precision}
    quiet: dict[str, Any] = {"steps": 12, "log_every": 12, "checkpoint_every": 12}
    found = []
    try:
        for report in Trainer(config(tmp_path / "run", **settings, **quiet)):
            torch.cuda.set_sync_debug_mode("error" if 2 <= report.step < 11 else "default")
            found.append(report)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(report.batch_size == 16 for report in found)
    assert [report.skipped for report in found][-1] < 12


def test_the_wait_for_data_is_that_of_the_gpu(tmp_path: Path) -> None:
    """Data that are read in time stop it; those that are read ahead do not."""
    waits = []
    for ahead in (0, 2):
        data = SlowDigits()
        trainer = Trainer(config(tmp_path / f"{ahead}", steps=20, log_every=20, prefetch=ahead), data)
        spin = torch.randn(2048, 2048, device="cuda")
        trainer.model.register_forward_hook(lambda *_, spin=spin: [spin @ spin for _ in range(100)] and None)
        trainer.run_to_end()
        assert trainer.last_speed is not None
        waits.append(trainer.last_speed.data_wait)
    assert waits[1] < waits[0] / 3
    assert 0 < waits[0] < 1


class SlowDigits(ImageData):
    """Digits that take 5 ms to read."""

    def __init__(self) -> None:
        digits = digits8()
        super().__init__(digits.images, digits.labels, digits.num_classes)

    def batch(self, indices: Tensor, seed: int | None = None) -> tuple[Tensor, Tensor]:
        time.sleep(0.005)
        return super().batch(indices, seed)


def test_bytes_become_the_same_numbers_on_every_device() -> None:
    pixels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(from_uint8(pixels.cuda()).cpu(), from_uint8(pixels))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_gpus_train_what_one_does(tmp_path: Path, parallel: Literal["ddp", "fsdp"]) -> None:
    """Over NCCL, in bf16, which has 8 bits."""
    settings: dict[str, Any] = {"steps": 6, "optimizer": ADAMW, "precision": "bf16"}
    alone = config(tmp_path / "alone", **settings)
    Trainer(alone).run_to_end()
    train_together(tmp_path, replace(alone, out=str(tmp_path / "pair"), parallel=parallel))
    for one, two in zip(log(tmp_path / "alone"), log(tmp_path / "pair"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-2)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-1)


@pytest.mark.parametrize("changes", [{}, {"compile": True}], ids=["eager", "compiled"])
def test_a_deterministic_run_continues_to_the_bit(tmp_path: Path, changes: dict[str, Any]) -> None:
    """In bf16, with attention over enough tokens that its gradients are summed in pieces."""
    settings: dict[str, Any] = {"deterministic": True, "checkpoint_every": 10, "batch_size": 64} | changes
    fields = FIELDS | {"width": 128, "num_heads": 2}
    settings["model"] = ModelChoice("ELIT-DiT-S/1", fields)
    Trainer(config(tmp_path / "whole", steps=20, **settings)).run_to_end()
    for report in Trainer(config(tmp_path / "run", steps=20, **settings)):
        if report.step == 14:
            break
    Trainer(config(tmp_path / "run", steps=20, **settings)).run_to_end()
    assert contents(tmp_path / "run", 20) == contents(tmp_path / "whole", 20)


def test_the_loss_scale_of_half_precision_is_continued(tmp_path: Path) -> None:
    """fp16 begins with a scale that is too large: some steps are skipped, and a continued run does not begin again."""
    run = tmp_path / "run"
    first = Trainer(config(run, steps=20, optimizer=ADAMW, precision="fp16"))
    first.scaler.load_state_dict(first.scaler.state_dict() | {"scale": 2.0**40})
    for report in first:
        if report.step == 20:
            break
    assert report.skipped > 0
    scale = first.scaler.get_scale()
    assert scale < 2.0**40
    saved = state.read_record(run / "checkpoints/step-00000020")["scaler"]
    assert saved["scale"] == scale
    again = Trainer(config(run, steps=24, optimizer=ADAMW, precision="fp16"))
    later = list(again)
    assert [report.step for report in later] == [21, 22, 23, 24]
    assert later[-1].skipped == report.skipped
    assert again.scaler.get_scale() == scale


def test_sampling_in_half_precision_is_near_full(tmp_path: Path) -> None:
    Trainer(config(tmp_path / "run", steps=200, checkpoint_every=200, precision="fp32")).run_to_end()
    model = elit.load(tmp_path / "run", device="cuda")
    guidance = elit.Guidance("ccfg", 2.0)
    full = elit.sample(model, [1, 2, 3], steps=8, budget=0.25, guidance=guidance)
    half = elit.sample(model.bfloat16(), [1, 2, 3], steps=8, budget=0.25, guidance=guidance)
    assert half.isfinite().all()
    error = (half.float() - full.float()).square().mean().sqrt() / full.float().std()
    assert 0 < error < 0.1  # 8 bits in each of 8 steps
