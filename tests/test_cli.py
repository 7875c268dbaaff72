"""The command line as a user meets it: real processes, real files."""

import json
import os
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from elit import cli

ROOT = Path(__file__).parents[1]

FIELDS = {"width": 32, "depth": 3, "num_heads": 2, "head_depth": 1, "tail_depth": 1, "patch_size": 1, "group_size": 4}


def elit(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "elit", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=os.environ | {"HF_HUB_OFFLINE": "1"})


def refused(*arguments: object, cwd: Path | None = None) -> str:
    """The one sentence of a refusal."""
    done = elit(*arguments, cwd=cwd)
    sentence = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2, done.stderr
    assert sentence.startswith("elit: ")
    assert "Traceback" not in done.stderr
    return sentence


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run."""
    out = tmp_path_factory.mktemp("runs") / "digits8"
    config = out.parent / "config.yaml"
    config.write_text(
        json.dumps(
            {
                "out": str(out),
                "data": "digits8",
                "model": {"name": "ELIT-DiT-S/1", "fields": FIELDS},
                "steps": 100,
                "batch_size": 16,
            }
        )
    )
    done = elit("train", "--config", config, "--steps", 5, "--model.fields.width", 16)
    assert done.returncode == 0, done.stderr
    assert "done: elit sample" in done.stdout
    return out


def test_sample(run: Path, tmp_path: Path) -> None:
    arguments = ("sample", "--model", run, "--num-images", 4, "--guidance", "ccfg", "--guidance-scale", 2, "--steps", 3)
    first, second = tmp_path / "a.png", tmp_path / "deep" / "b.png"
    for out in (first, second):
        done = elit(*arguments, "--budget", 0.25, "--out", out)
        assert done.returncode == 0, done.stderr
    picture = np.asarray(Image.open(first))
    assert picture.shape == (2 * 64 + 3 * 2 * 8, 2 * 64 + 3 * 2 * 8)
    assert (picture == np.asarray(Image.open(second))).all()
    assert json.loads(Image.open(first).info["elit"])["guidance"]["scale"] == 2
    elit(*arguments, "--budget", "0.25,0.5,1", "--out", tmp_path / "c.png")
    elit(*arguments, "--budget", "0.25@0.5,1", "--seed", 4, "--out", tmp_path / "d.png")
    assert len({p.read_bytes() for p in (first, tmp_path / "c.png", tmp_path / "d.png")}) == 3


def test_info(run: Path) -> None:
    named = elit("info", "ELIT-SiT-XL/2", "--resolution", 512)
    assert named.returncode == 0
    assert "705.122 M parameters" not in named.stdout  # the window positions grow with the resolution
    assert "16 windows of 8x8 tokens, 4 to 64 of 64 latents each (61 budgets)" in named.stdout
    own = elit("info", run)
    assert "3 blocks as 1-1-1 of width 16" in own.stdout


def test_published_checkpoint(tmp_path: Path) -> None:
    """A published file is converted, described and sampled from, and comes back as it was."""
    file = ROOT / "tests/data/published/elit_sit_tiny.pt"
    assert "leaves num_heads open" in refused("convert", file, tmp_path / "ours")
    done = elit("convert", file, tmp_path / "ours", "--num-heads", 4, "--tail-depth", 2)
    assert "wrote ELIT-SiT-8x96/2 with 2.1 M parameters, from ema" in done.stdout
    assert elit("convert", tmp_path / "ours", tmp_path / "back.pt").returncode == 0
    before, after = (load(path)["ema"] for path in (file, tmp_path / "back.pt"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)

    described = elit("info", tmp_path / "back.pt").stdout
    assert "8 blocks as 2-4-2 of width 96 with 4 heads" in described
    autoencoder = tmp_path / "autoencoder"
    AutoencoderKL(latent_channels=4, block_out_channels=(4,), norm_num_groups=2).save_pretrained(autoencoder)
    options = ("--num-images", 2, "--steps", 2, "--budget", 0.25, "--out", tmp_path / "x.png")
    sampled = elit("sample", "--model", tmp_path / "back.pt", "--autoencoder", autoencoder, *options)
    assert "is a published checkpoint: ema of ELIT-SiT-8x96/2" in sampled.stderr
    assert np.asarray(Image.open(tmp_path / "x.png")).ndim == 3
    assert "there is no autoencoder at" in refused("sample", "--model", tmp_path / "back.pt", "--autoencoder", tmp_path)


def load(path: Path) -> Any:
    with torch.serialization.safe_globals([Namespace]):
        return torch.load(path, weights_only=True)


def subcommands(verbs: dict[str, Any], before: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    nested = [words for name, verb in verbs.items() if isinstance(verb, dict) for words in subcommands(verb, (name,))]
    return [*((*before, name) for name in verbs), *nested]


@pytest.mark.parametrize("words", subcommands(cli.VERBS), ids=" ".join)
def test_every_option_is_described(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    """Each verb has a help, in which no option lacks a description and all have dashes."""
    with pytest.raises(SystemExit) as done:
        cli.main([*words, "--help"])
    assert done.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: elit {' '.join(words)} ")
    options = [" ".join(option.split()) for option in re.split(r"\n  (?=--)", text)[1:]]
    assert not [option for option in options if "_" in option.split()[0]]
    # What stands before "(type: ...)" is the description, or else a placeholder such as STEPS, {a,b} or [ITEM,...].
    assert not [option for option in options if re.search(r"[A-Z}\]] \((required, )?type:", option)]


def test_options_have_dashes_or_underscores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("num_images: 3\nguidance_scale: 2\n")
    settings = []
    for spelling in ("--num-images=3 --guidance-scale 2", "--num_images 3 --guidance_scale=2", f"--config {config}"):
        with pytest.raises(SystemExit):
            cli.main(["sample", "--model", "x", *spelling.split(), "--print-config"])
        settings.append(capsys.readouterr().out)
    assert "num_images: 3" in settings[0] and "guidance_scale: 2.0" in settings[0]
    assert settings[0] == settings[1] == settings[2]


def test_evaluate_alone_scores_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--samples", str(tmp_path / "none"), "--reference", "digits", "--extractor", "digits")
    for verb in (("evaluate",), ("evaluate", "samples")):
        assert cli.main([*verb, *options, "--weights", str(tmp_path / "none")]) == 2
        assert str(tmp_path / "none") in capsys.readouterr().err


@pytest.mark.parametrize("option", ["model", "elit.by_noise", "elit", "model.fields"])
def test_a_configuration_imports_nothing(option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "payload.py").write_text("open('marker', 'w')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert cli.main(["train", f"--{option}", '{"class_path": "payload.X"}', "--out", "run"]) == 2
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("content", ["model: {class_path: payload.X}", "elit: {class_path: payload.X}"])
def test_a_configuration_file_imports_nothing(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "payload.py").write_text("open('marker', 'w')")
    (tmp_path / "config.yaml").write_text(content)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert cli.main(["train", "--config", "config.yaml", "--out", "run"]) == 2
    expected = "elit: a configuration cannot name classes: Importing 'payload.X' is not allowed"
    assert capsys.readouterr().err.strip() == expected
    assert not (tmp_path / "marker").exists()


def test_a_configuration_that_is_no_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_bytes(bytes(range(256)))
    assert cli.main(["sample", "--config", str(tmp_path / "config.yaml"), "--model", "x"]) == 2
    assert capsys.readouterr().err.startswith("elit: the file of --config is no text ('utf-8' codec")


def test_help_imports_no_verb() -> None:
    code = "import sys, elit.cli\ntry: elit.cli.main(['--help'])\nfinally: print(*sys.modules, sep='\\n')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "elit.cli" in done.stdout.split()
    assert "elit.commands" not in done.stdout


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--budget", "0"), "budget is 0.0; it must be a number in (0, 1]"),
        (("--budget", "1.5"), "budget is 1.5"),
        (("--budget", "abc"), "budget is 'abc'"),
        (("--budget", "0.5,0.5"), "lists 2 values for 3 sampling steps"),
        (("--labels", "[10]", "--num-images", "1"), "label 10 does not exist; the model knows 0..9"),
        (("--labels", "[1,2]", "--num-images", "3"), "labels lists 2 classes for 3 images"),
        (("--num-images", "two"), "\"num_images\": Expected a <class 'int'>. Got value: two"),
        (("--num-images", "0"), "num_images and batch_size must be at least 1"),
        (("--guidance", "strong"), "guidance"),
        (("--guidance", "ccfg", "--guidance-budget", "2"), "the guidance budget is 2"),
        (("--guidance-interval", "[0,0.5]"), "guidance_interval is given without guidance; add --guidance cfg"),
        (("--cache-order", "1"), "cache_order is given without a cache; add --cache-threshold"),
        (("--out", "x.jpg"), "it must be a .png file, for clips .gif or .mp4, or a folder"),
        (("--colour", "red"), "unrecognized arguments: --colour red"),
        (("--num-image", "2"), "unrecognized arguments: --num_image 2"),
    ],
)
def test_wrong_options_of_sample(run: Path, tmp_path: Path, options: tuple[str, ...], words: str) -> None:
    assert words in refused("sample", "--model", run, "--steps", 3, *options, cwd=tmp_path)
    assert not list(tmp_path.iterdir())


def test_wrong_models(run: Path, tmp_path: Path) -> None:
    assert "there is no model at" in refused("sample", "--model", tmp_path / "nothing")
    assert "holds no model" in refused("sample", "--model", tmp_path)
    assert "no model at nope" in refused("info", "nope")
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (checkpoint,) = (run / "checkpoints").iterdir()
    (damaged / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    assert "does not exist" in refused("sample", "--model", damaged)
    (damaged / "model.safetensors").write_bytes((checkpoint / "model.safetensors").read_bytes()[:-100])
    assert "is damaged" in refused("sample", "--model", damaged)


def test_output_that_cannot_be_written(run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot write" in refused("sample", "--model", run, "--out", tmp_path / "file" / "x.png")
    assert "cannot write" in refused("train", "--data", "digits8", "--out", tmp_path / "file" / "run")
    assert "cannot write" in refused("quickstart", "--out", tmp_path / "file" / "quickstart")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_wrong_settings_of_train(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("stepz: 3\n")
    assert "stepz" in refused("train", "--config", config)
    config.write_text("model: {name: ELIT-DiT-S/2, fields: {group_sice: 3}}\ndata: digits8\n")
    assert "no field 'group_sice'" in refused("train", "--config", config, cwd=tmp_path)
    config.write_text("steps: [\n")
    assert "config" in refused("train", "--config", config)
    assert "missing.yaml" in refused("train", "--config", tmp_path / "missing.yaml")
    assert "unrecognized arguments: --model.nam" in refused("train", "--model.nam", "x")
    assert "\"steps\": Expected a <class 'int'>. Got value: many" in refused("train", "--steps", "many")
    fields = ("--model.fields", '{"group_size": 3}')
    assert "group size 3 does not divide" in refused("train", "--data", "digits", *fields, cwd=tmp_path)
    assert "invalid choice: 'foo' (choose from" in refused("foo")
    assert "{budgets,guidance,steps,attention,cost}" in refused("analyze")
    assert "evaluate.samples.reference" in refused("evaluate", "--samples", "x")
    assert "prepare.encode.out" in refused("prepare", "encode", "x")
    assert [p.name for p in tmp_path.iterdir()] == ["config.yaml"]


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    done = elit("--debug", "info", "nope")
    assert "Traceback" in done.stderr
    assert "there is no model at nope" in done.stderr
