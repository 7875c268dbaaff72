"""A wrong setting of `elit train` ends in one sentence that names its key, before anything is written."""

from pathlib import Path

import pytest
import torch

from elit.cli import main

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
