"""A wrong setting of `elit train` ends in one sentence that names its key, before anything is written."""

from pathlib import Path
from typing import Any

import pytest
import torch

from elit import ElitError
from elit.cli import main
from elit.training import ElasticConfig, OptimizerConfig, Trainer
from tests.helpers.runs import config

ELASTIC = ["--model.name", "ELIT-DiT-S/1", "--data", "digits8"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--elit.group-sice", "4"], "elit.group_sice"),
        (["--elit.max-mask-prob", "much"], "elit.max_mask_prob"),
        (["--elit.max-mask-prob", "1.5"], "elit.max_mask_prob is 1.5; it must be in [0, 1)"),
        (["--elit.group-size", "3"], "elit.group_size: group size 3 does not divide the 8 tokens"),
        (["--elit.group-size", "4", "--model.fields", '{"group_size": 4}'], "group_size is given twice"),
        (["--elit.batching", "some"], "elit.batching"),
        (["--elit.by-noise", '{"thresholds": [0.5], "budgets": [0.5]}'], "needs 2 budgets, not 1"),
        (["--data", "data/imagenet256-latents"], "data/imagenet256-latents"),
        (["--micro-batch-size", "0"], "micro_batch_size is 0; it must be at least 1"),
        (["--compile", "2"], "compile"),
        (["--resume", "runs/nothing"], "resume is runs/nothing, which is neither a checkpoint"),
        (["--validation.budgets", "[0.5, 2]"], "validation.budgets is 2.0; it must be a number in (0, 1]"),
        (["--validation.every", "-1"], "validation.every is -1"),
        (["--trackers", "[paper]"], "trackers"),
        (["--parallel", "fsdp", "--optimizer.name", "muon"], "parallel is fsdp, and optimizer.name muon needs whole"),
        (["--parallel", "fsdp", "--precision", "fp16"], "precision is fp16, whose loss scale parallel fsdp"),
        (["--snapshot-every", "-1"], "snapshot_every is -1; it must be at least 0"),
        pytest.param(
            ["--precision", "fp16"],
            "precision is fp16, which needs a GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
        (["--repa.encoder", "runs/no/encoder", "--repa.depth", "2"], "with --repa.encoder"),
        (["--repa.encoder", "runs/no/encoder"], "repa.depth is 8; the model has spatial tokens after its blocks 1 to"),
        (["--repa.decoder", "runs/no/encoder"], "repa.decoder"),
        (["--optimizer.clip", "0"], "optimizer.clip is 0.0; it must be above 0"),
        (["--optimizer.lr=-1e-4"], "optimizer.lr is -0.0001; it must be a number of at least 0"),
        (["--optimizer.lr", ".nan"], "optimizer.lr is nan; it must be a number of at least 0"),
        (["--optimizer.betas", "[0.9, 1.0]"], "optimizer.betas is (0.9, 1.0); it must be in [0, 1)"),
        (["--optimizer.decay-from", "1.5"], "optimizer.decay_from is 1.5; it must be in [0, 1]"),
        (["--optimizer.warmup-steps", "-1"], "optimizer.warmup_steps is -1; it must be at least 0"),
        (["--optimizer.muon-ns-steps", "0"], "optimizer.muon_ns_steps is 0; it must be in 1..99"),
        (["--prefetch", "-1"], "prefetch is -1; it must be at least 0"),
        (["--precision", "bf32"], "precision"),
        (["--model.fields", '{"width": "abc"}'], "model.fields.width is 'abc'; it must be a whole number"),
        (["--model.fields", '{"levels": 4}'], "model.fields.levels is 4; it must be of type"),
        (["--model.fields", '{"mlp_ratio": -1}'], "model.fields.mlp_ratio is -1; it must be at least 0"),
        (["--model.fields", '{"num_classes": 5}'], "model.fields.num_classes is 5, and the data have 10 classes"),
        (["--model.fields", '{"in_channels": 3}'], "model.fields.in_channels is 3, and the data have 1"),
        (["--model.fields", '{"width": 0}'], "width"),
        (["--model.fields", '{"colour": 3}'], "has no field 'colour'"),
        (["--model.name", "DiT-S/1", "--elit.min-mask-prob", "0.5"], "elit.min_mask_prob is set, but the model has no"),
    ],
)
def test_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", *ELASTIC, "--out", "run", *options]) == 2
    error = capsys.readouterr().err.strip()
    assert words in error
    assert error.startswith("elit: ")
    assert len(error.splitlines()) == 1
    assert not list(tmp_path.glob("run/log.jsonl"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"steps": 2.5}, "steps is 2.5; it must be a whole number"),
        ({"steps": True}, "steps is True; it must be a whole number"),
        ({"precision": "half"}, "precision is 'half'; it must be one of auto, fp32, bf16, fp16"),
        ({"flips": "yes"}, "flips is 'yes'; it must be true or false"),
        ({"micro_batch_size": 1.5}, "micro_batch_size is 1.5; it must be a whole number"),
        ({"optimizer": OptimizerConfig(betas=(0.9,))}, "optimizer.betas is "),  # type: ignore[arg-type]
        ({"elit": ElasticConfig(levels=[1.5])}, "elit.levels is "),  # type: ignore[list-item]
        ({"optimizer": {"lr": 1}}, "optimizer is "),
    ],
)
def test_one_sentence_in_python(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    with pytest.raises(ElitError, match=f"^{words}"):
        Trainer(config(tmp_path / "run", **change))
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_continued_is_told_before_anything_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fields = '{"width": 16, "depth": 3, "num_heads": 2, "head_depth": 1, "tail_depth": 1, "group_size": 4}'
    small = [*ELASTIC, "--out", "run", "--model.fields", fields, "--batch-size", "4"]
    assert main(["train", *small, "--steps", "2"]) == 0
    capsys.readouterr()
    assert main(["train", *small, "--steps", "4", "--seed", "1"]) == 2
    output = capsys.readouterr()
    assert "run was started with seed = 0, not 1" in output.err
    assert (output.out, len(output.err.splitlines())) == ("", 1)
