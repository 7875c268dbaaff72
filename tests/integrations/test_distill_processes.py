"""Two processes distil what one does, whole and in shards. On processors, so with gloo."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from elit.cli import main
from elit.training import Trainer
from elit.training.distillation import build_distillation
from tests.helpers.runs import log
from tests.helpers.small_distillations import distil_together, distillation, save_base
from tests.helpers.small_pipelines import qwen_pipeline
from tests.integrations.test_distill_text import captioned_pictures

pytest.importorskip("diffusers")
SETS = ("interface", "interface+core-lora", "all")


def test_two_processes_distil_what_one_does(tmp_path: Path) -> None:
    """Seven samples, three of which make a micro-batch: processes have different numbers of them."""
    base, uneven = save_base(tmp_path / "base"), {"steps": 3, "batch_size": 7, "micro_batch_size": 3}
    alone = [distillation(base, tmp_path / f"{name}-one", trainable=name, **uneven) for name in SETS]
    alone[0] = replace(alone[0], checkpoint_activations=True)
    for config in alone:
        Trainer(config, build=build_distillation).run_to_end()
    whole = [replace(config, out=config.out.replace("-one", "-ddp")) for config in alone]
    shards = [replace(config, out=config.out.replace("-one", "-fsdp"), parallel="fsdp") for config in alone]
    said = distil_together(tmp_path, *whole, *shards)
    assert said.count("2 processes") == 6 and said.count("on each of 2 devices") == 3
    for one, *others in zip(alone, whole, shards, strict=True):
        for two in others:
            for a, b in zip(log(Path(one.out)), log(Path(two.out)), strict=True):
                assert b == pytest.approx(a, rel=1e-3)  # float32 sums in another order
            last = "checkpoints/step-00000003/training.safetensors"
            same_tensors(Path(one.out) / last, Path(two.out) / last)
        same_tensors(*(Path(each.out) / "transformer/diffusion_pytorch_model.safetensors" for each in others))


@pytest.mark.slow
def test_layers_without_a_gradient_hold_nobody_up(tmp_path: Path) -> None:
    """The text that comes out of the last block of Qwen-Image is of no use to anyone."""
    qwen_pipeline(tmp_path / "parts")[0].save_pretrained(tmp_path / "base")
    encode = ["prepare", "encode", str(captioned_pictures(tmp_path / "pictures")), str(tmp_path / "latents")]
    how = ["--autoencoder", str(tmp_path / "base/vae"), "--text-encoder", str(tmp_path / "base"), "--workers", "0"]
    assert main([*encode, *how]) == 0
    settings = {"data": str(tmp_path / "latents"), "trainable": "all", "steps": 3, "batch_size": 4}
    alone = distillation(tmp_path / "base", tmp_path / "one", **settings)
    Trainer(alone, build=build_distillation).run_to_end()
    distil_together(tmp_path, replace(alone, out=str(tmp_path / "two")))
    for a, b in zip(log(tmp_path / "one"), log(tmp_path / "two"), strict=True):
        assert b == pytest.approx(a, rel=1e-3)  # float32 sums in another order


def same_tensors(one: Path, other: Path) -> None:
    """Sums in another order. AdamW makes whole steps of rounding where a gradient is zero, as of the biases of keys."""
    expected, found = load_file(one), load_file(other)
    assert expected.keys() == found.keys()
    for name, value in ((name, value) for name, value in expected.items() if "to_k.bias" not in name):
        torch.testing.assert_close(
            found[name], value, rtol=1e-3, atol=1e-4, msg=lambda why, name=name: f"{name}: {why}"
        )
