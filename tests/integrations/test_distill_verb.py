"""`elit distill`: what it trains, that it continues exactly, and that the original pipeline runs its result."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import elit
from elit.cli import main
from elit.data import digits8
from elit.seeding import torch_seeded
from elit.training import ElasticConfig, HeldOutConfig, OptimizerConfig, Trainer
from elit.training.distillation import DistillConfig, RetrofitConfig, build_distillation, estimate_memory
from tests.helpers.runs import contents, kill, log, wait_for_line
from tests.helpers.small_distillations import STEPS, as_file, command, distillation, save_base

diffusers = pytest.importorskip("diffusers")
SETS = ("interface", "interface+core-lora", "all")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base") / "digits")


def trainer_of(config: DistillConfig) -> Trainer:
    return Trainer(config, build=build_distillation)


def load(folder: Path) -> Any:
    from elit.integrations.families import ElasticDiTTransformer2DModel

    return ElasticDiTTransformer2DModel.from_pretrained(folder).eval()


# ------------------------------------------------------------------------------------------------ what is trained


@pytest.mark.parametrize("trainable", SETS)
def test_each_set_changes_what_it_says_and_nothing_else(base: Path, tmp_path: Path, trainable: str) -> None:
    config = distillation(base, tmp_path / "run", trainable=trainable, steps=2, snapshot_every=2)
    config = replace(config, validation=HeldOutConfig(2, [1.0], 8))
    assert main(["distill", "--config", str(as_file(config, tmp_path / "run.yaml"))]) == 0
    result = load_file(tmp_path / "run/transformer/diffusion_pytorch_model.safetensors")
    of_base = load_file(base / "transformer/diffusion_pytorch_model.safetensors")
    assert result.keys() == of_base.keys() | {name for name in result if name.startswith("elit.")}
    changed = {name for name in of_base if not torch.equal(result[name], of_base[name])}
    in_core = {name for name in of_base if name.startswith(("transformer_blocks.1.", "transformer_blocks.2."))}
    layers = {name for name in in_core if name.endswith("weight") and (".attn1." in name or ".ff." in name)}
    expected: dict[str, Any] = {"interface": set(), "interface+core-lora": layers, "all": of_base.keys()}
    assert changed == expected[trainable]
    assert "held_out_loss/1" in log(tmp_path / "run")[-1]
    snapshot = load_file(tmp_path / "run/snapshots/step-00000002/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(snapshot[name], value) for name, value in result.items())

    # a checkpoint has what is trained, and nothing of the base
    kept = load_file(tmp_path / "run/checkpoints/step-00000002/training.safetensors")
    raw = {name.removeprefix("raw.transformer.") for name in kept if name.startswith("raw.")}
    interface = {name for name in result if name.startswith("elit.")}
    adapters = {f"{name[:-7]}.lora_{half}.distilled.weight" for name in layers for half in "AB"}
    expected = {"interface": interface, "interface+core-lora": interface | adapters, "all": result.keys()}
    assert raw == expected[trainable]


def test_merged_adapters_do_what_adapters_did(base: Path, tmp_path: Path) -> None:
    trainer = trainer_of(distillation(base, tmp_path / "run", trainable="interface+core-lora", steps=4))
    trainer.run_to_end()
    model: Any = trainer.averaged()
    x, t, y = torch.randn(3, 1, 8, 8), torch.tensor([900, 500, 20]), torch.tensor([1, 2, 1000])
    with torch.no_grad():
        expected = model(x, t, y, num_latents=4)
        model.save_result(tmp_path / "result")
        found = load(tmp_path / "result")(x, t, y, num_latents=4).sample
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(model(x, t, y, num_latents=4), expected)  # merging left the model as it was


# ------------------------------------------------------------------------------------------------ the loss


@pytest.mark.parametrize("trainable", SETS)
def test_the_first_step_has_the_losses_of_a_plain_loop(base: Path, tmp_path: Path, trainable: str) -> None:
    """The teacher is the base as diffusers loads it, and noise comes from the scheduler of diffusers."""
    weight = 0.5
    retrofit = RetrofitConfig(start="paper")  # whose first answers are far from those of the base
    config = distillation(base, tmp_path, trainable=trainable, retrofit=retrofit, distillation=weight)
    trainer = trainer_of(config)
    (batch, *_) = (pending.result() for pending in trainer.loader.batches(0, 0))
    report = next(iter(trainer))

    teacher = diffusers.DiTTransformer2DModel.from_pretrained(base / "transformer").eval()
    with torch_seeded(config.seed, "weights"):
        student = elit.elastify(teacher, start="paper")
    scheduler = diffusers.DDPMScheduler.from_pretrained(base / "scheduler")
    (x, labels), (noise,), t = batch.raw, batch.draws.noise, batch.draws.t
    losses, distances, scaled = [], [], []
    with torch.no_grad():
        for i in range(config.batch_size):
            label = torch.tensor([1000]) if batch.draws.dropped[i] else labels[i : i + 1]
            x_t = scheduler.add_noise(x[i : i + 1], noise[i : i + 1], t[i : i + 1])
            of_base = teacher(x_t, t[i : i + 1], label).sample
            predicted = student(x_t, t[i : i + 1], label, num_latents=int(report.num_latents)).sample
            losses.append(F.mse_loss(predicted[:, :1], noise[i : i + 1]).item())  # the rest are variances
            distances.append(F.mse_loss(predicted, of_base).item())
            scaled.append(distances[-1] * min(10.0, losses[-1] / distances[-1]))
    assert max(distances) > 0.1 * max(losses)  # not all at the largest scale
    assert report.loss == pytest.approx(np.mean(losses), rel=1e-4)
    assert report.terms == pytest.approx({"distillation": np.mean(scaled), "distance": np.mean(distances)}, rel=1e-4)


def test_full_budget_begins_as_the_base(base: Path, tmp_path: Path) -> None:
    (first, *_) = trainer_of(distillation(base, tmp_path, elit=ElasticConfig(levels=[16]), steps=2))
    assert first.terms == {"distillation": 0.0, "distance": 0.0}
    (alone,) = trainer_of(distillation(base, tmp_path / "alone", distillation=0.0, steps=1))
    assert alone.terms == {}


@pytest.mark.parametrize("trainable", ["interface", "all"])
def test_distillation_learns(trained_base: Path, tmp_path: Path, trainable: str) -> None:
    """At one low budget, on digits: it comes nearer to its base; and with all weights it goes on learning, too."""
    settings: dict[str, Any] = {"elit": ElasticConfig(levels=[2]), "steps": 60, "batch_size": 16}
    settings |= {"optimizer": OptimizerConfig(lr=3e-3, warmup_steps=0), "checkpoint_every": 99}
    config = distillation(trained_base, tmp_path, trainable=trainable, **settings)
    reports = [(report.loss, report.terms["distance"]) for report in trainer_of(config)]
    first, last = np.mean(reports[:10], axis=0), np.mean(reports[-10:], axis=0)
    assert last[1] < 0.5 * first[1]
    assert trainable == "interface" or last[0] < 0.8 * first[0]


@pytest.fixture(scope="module")
def trained_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base that has learned something, in the loop of every tutorial."""
    folder = save_base(tmp_path_factory.mktemp("trained") / "base", std=0.02)
    scheduler = diffusers.DDPMScheduler.from_pretrained(folder / "scheduler")
    model = diffusers.DiTTransformer2DModel.from_pretrained(folder / "transformer").eval()
    optimizer, data = torch.optim.AdamW(model.parameters(), lr=3e-3), digits8()
    torch.manual_seed(0)
    for _ in range(100):
        x, y = data.batch(torch.randint(len(data), (32,)))
        t, noise = torch.randint(1000, (32,)), torch.randn_like(x)
        F.mse_loss(model(scheduler.add_noise(x, noise, t), t, y).sample[:, :1], noise).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder / "transformer")
    return folder


# ------------------------------------------------------------------------------------------------ memory


def test_the_estimate_of_memory_is_what_a_trainer_holds(base: Path, tmp_path: Path) -> None:
    for name in SETS:
        config = distillation(base, tmp_path / name, trainable=name, steps=1)
        estimate = estimate_memory(config)[name]
        trainer = trainer_of(config)
        trainer.run_to_end()
        model, average, teacher = trainer.model, trainer.ema.module, trainer.objective.teacher  # type: ignore[attr-defined]
        own = {id(each): each for each in model.parameters()}
        assert estimate.weights == size(own.values())
        assert estimate.average == size(each for each in average.parameters() if id(each) not in own)
        assert estimate.teacher == (0 if teacher is None else size(teacher.parameters()))
        states = trainer.trained.optimizers["adamw"].state.values()
        assert estimate.optimizer == size(each for state in states for each in state.values() if each.dim())
        assert estimate.gradients == estimate.average == 4 * estimate.trained


def size(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes."""
    return sum(each.numel() * each.element_size() for each in tensors)


# ------------------------------------------------------------------------------------------------ a run


def test_a_killed_run_ends_bit_identical(base: Path, tmp_path: Path) -> None:
    """Saved after every third step, killed after the fifth or so."""
    for name in ("whole", "run"):
        as_file(distillation(base, tmp_path / name, trainable="interface+core-lora"), tmp_path / f"{name}.yaml")
    assert main(["distill", "--config", str(tmp_path / "whole.yaml")]) == 0
    process = subprocess.Popen(command(tmp_path / "run.yaml"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for_line(tmp_path / "run/log.jsonl", 5, process)
    kill(process)
    assert not (tmp_path / "run/transformer").exists()
    assert main(["distill", "--config", str(tmp_path / "run.yaml")]) == 0
    assert contents(tmp_path / "run", STEPS) == contents(tmp_path / "whole", STEPS)
    weights = [tmp_path / name / "transformer/diffusion_pytorch_model.safetensors" for name in ("whole", "run")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_the_original_pipeline_samples_from_the_result(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["distill", "--base", str(base), "--data", "digits8", "--out", str(tmp_path / "run"), "--steps", "2"]
    assert main([*arguments, "--batch-size", "4"]) == 0
    said = capsys.readouterr().out
    assert "GB of memory" in said and f"from_pretrained('{tmp_path / 'run/transformer'}')" in said
    pipe = diffusers.DiTPipeline.from_pretrained(base)
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer = load(tmp_path / "run/transformer")
    pictures = {}
    for budget in (1, 1 / 2, 1 / 8):
        pipe.transformer.set_budget(budget)
        drawn = pipe([3, 4], num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np")
        pictures[budget] = drawn.images
        assert drawn.images.shape == (2, 32, 32, 3) and np.isfinite(drawn.images).all()
    assert not np.array_equal(pictures[1], pictures[1 / 2]) and not np.array_equal(pictures[1 / 2], pictures[1 / 8])


@pytest.mark.cuda
@pytest.mark.parametrize("trainable", SETS)
def test_a_run_on_a_gpu(base: Path, tmp_path: Path, trainable: str) -> None:
    """In bf16, with activations computed again."""
    config = distillation(base, tmp_path / "run", trainable=trainable, checkpoint_activations=True)
    assert main(["distill", "--config", str(as_file(config, tmp_path / "run.yaml"))]) == 0
    assert all(np.isfinite(line["loss"]) and not line["skipped"] for line in log(tmp_path / "run"))
    predicted = load(tmp_path / "run/transformer")(torch.randn(1, 1, 8, 8), torch.tensor([9]), torch.tensor([3])).sample
    assert predicted.isfinite().all()


# ------------------------------------------------------------------------------------------------ wrong inputs


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--base", "runs/nothing"], "there is no base at runs/nothing: give the folder of a pipeline or transformer"),
        (["--base", "BASE/transformer"], "predicts noise at the steps of its scheduler; give the folder of its pipel"),
        (["--base", "BASE/vae"], "AutoencoderKL cannot be made elastic; take one of DiTTransformer2DModel"),
        (["--data", "digits"], r"digits has samples of 16x16; the base .* makes 8x8"),
        (["--data", "captioned-digits"], "captioned-digits has samples of 16x16"),
        (["--elit.group-size", "3"], "group size 3 does not divide the 8 tokens of the grid"),
        (["--retrofit.read-after", "3", "--retrofit.write-after", "2"], "read_after is 3 and write_after 2"),
        (["--elit.levels", "[4, 99]"], "elit.levels has 99"),
        (["--times.kind", "uniform"], "times is set, and a DiTTransformer2DModel sees the steps of its scheduler"),
        (["--optimizer.name", "muon"], "distillation takes adamw"),
        (["--elit.batching", "scaled"], "elit.batching is scaled"),
        (["--lora-rank", "0"], "lora_rank is 0; it must be at least 1"),
        (["--distillation", "-1"], "distillation is -1.0; it must be a number of at least 0"),
    ],
)
def test_wrong_inputs_end_in_one_sentence(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    out = tmp_path / "run"
    given = [option.replace("BASE", str(base)) for option in options]
    assert main(["distill", "--base", str(base), "--data", "digits8", "--out", str(out), *given]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("elit: ")
    assert re.search(message, line), line
    assert not out.exists()


def test_a_base_is_not_replaced_by_its_result(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(base.rglob("*"))
    for out in (base, base / ".." / base.name):
        assert main(["distill", "--base", str(base), "--data", "digits8", "--out", str(out)]) == 2
        assert "which holds the base; give another folder" in capsys.readouterr().err
    assert sorted(base.rglob("*")) == before


def test_a_continued_run_must_be_the_same(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = distillation(base, tmp_path / "run", steps=1)
    trainer_of(config).run_to_end()
    file = as_file(config, tmp_path / "run.yaml")
    assert main(["distill", "--config", str(file), "--trainable", "all"]) == 2
    assert "was started with trainable = 'interface', not 'all'" in capsys.readouterr().err


def test_a_base_under_its_old_name(base: Path, tmp_path: Path) -> None:
    """DiT and PixArt were published as Transformer2DModel."""
    shutil.copytree(base, tmp_path / "base")
    file = tmp_path / "base/transformer/config.json"
    described = json.loads(file.read_text())
    file.write_text(json.dumps(described | {"_class_name": "Transformer2DModel", "norm_type": "ada_norm_zero"}))
    configs = [distillation(place, tmp_path / "run") for place in (base, tmp_path / "base")]
    assert estimate_memory(configs[0]) == estimate_memory(configs[1])
    models: list[Any] = [trainer_of(config).averaged() for config in configs]
    weights = [model.transformer.state_dict() for model in models]
    assert all(torch.equal(weights[0][name], value) for name, value in weights[1].items())
