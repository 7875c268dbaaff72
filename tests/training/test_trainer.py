import json
import pickle
import signal
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from torch import Tensor, nn

import elit
from elit import ElitError
from elit.commands.quickstart import RECIPE
from elit.commands.train import show_progress
from elit.data import ImageData, digits8
from elit.models import create
from elit.training import ElasticConfig, OptimizerConfig, TrainConfig, Trainer
from elit.training.optim import MovingAverage, lr_factor, make_optimizers, named_groups
from tests.helpers.runs import config

ROOT = Path(__file__).parents[2]


def test_learns_and_loads(tmp_path: Path) -> None:
    run = tmp_path / "run"
    losses = [report.loss for report in Trainer(config(run, steps=120, checkpoint_every=50))]
    assert sum(losses[-20:]) < 0.7 * sum(losses[:20])
    ema, raw = elit.load(run), elit.load(run, weights="raw")
    assert not torch.equal(ema.blocks[0].mlp.fc1.weight, raw.blocks[0].mlp.fc1.weight)
    images = elit.sample(ema, [3, 4], steps=4, budget=0.25, guidance=elit.Guidance("ccfg", 2.0))
    assert images.shape == (2, 1, 8, 8)
    assert images.isfinite().all()


def test_run_directory(tmp_path: Path) -> None:
    run = tmp_path / "run"
    Trainer(config(run, steps=30, log_every=10, keep_checkpoints=2)).run_to_end()
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-00000020", "step-00000030"]
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [10, 20, 30]
    assert yaml.safe_load((run / "config.yaml").read_text())["batch_size"] == 16
    record = json.loads((run / "checkpoints/step-00000030/training.json").read_text())
    assert record["step"] == 30
    assert record["versions"]["torch"] == torch.__version__.split("+")[0]
    assert any((run / "tensorboard").iterdir())


def test_first_adam_step_has_the_size_of_the_learning_rate(tmp_path: Path) -> None:
    settings = OptimizerConfig("adamw", lr=1e-3, warmup_steps=0, clip=1e9)
    trainer = Trainer(config(tmp_path / "run", steps=2, optimizer=settings))
    before = {k: v.clone() for k, v in trainer.model.named_parameters()}
    steps = iter(trainer)
    next(steps)
    moved = {k: (v.detach() - before[k]).abs().max().item() for k, v in trainer.model.named_parameters()}
    assert max(moved.values()) == pytest.approx(1e-3, rel=1e-3)
    next(steps)


def test_unconditional_data(tmp_path: Path) -> None:
    data = ImageData(digits8().images[:64], torch.zeros(64, dtype=torch.long), 0)
    run = tmp_path / "run"
    Trainer(config(run, steps=3), data).run_to_end()
    assert elit.sample(elit.load(run), seeds=[1, 2], steps=2).shape == (2, 1, 8, 8)


def test_plain_transformer_trains(tmp_path: Path) -> None:
    fields = {"width": 32, "depth": 2, "num_heads": 2}
    plain = replace(
        config(tmp_path / "run", steps=3, elit=ElasticConfig()),
        model=replace(RECIPE.model, name="DiT-S/2", fields=fields),
    )
    reports = list(Trainer(plain))
    assert [r.num_latents for r in reports] == [0, 0, 0]


class Poisoned(ImageData):
    """Digits whose batches are not finite from some call on."""

    def __init__(self, good: int = 0) -> None:
        digits = digits8()
        super().__init__(digits.images, digits.labels, digits.num_classes)
        self.good = good

    def batch(self, indices: Tensor, seed: int | None = None) -> tuple[Tensor, Tensor]:
        x, y = super().batch(indices, seed)
        self.good -= 1
        return x * float("nan" if self.good < 0 else 1), y


def test_steps_without_a_finite_loss_change_nothing_and_stop_the_run(tmp_path: Path) -> None:
    trainer = Trainer(config(tmp_path / "run", max_skipped=3), Poisoned())
    before = [p.clone() for p in trainer.model.parameters()]
    with pytest.raises(ElitError, match=r"not finite for 3 steps in a row, .* lower --optimizer.lr .*: --out ANOTHER"):
        trainer.run_to_end()
    assert trainer.step == 3
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))


def test_steps_without_a_finite_loss_stop_the_run_one_step_later_where_no_log_is_due(tmp_path: Path) -> None:
    trainer = Trainer(config(tmp_path / "run", max_skipped=3, log_every=50, checkpoint_every=50), Poisoned(good=4))
    with pytest.raises(ElitError, match="not finite for 3 steps in a row, up to step 7"):
        trainer.run_to_end()
    assert not list((tmp_path / "run/checkpoints").glob("*"))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_skipped_step_leaves_weights_and_optimizer_as_they_are(
    tmp_path: Path, name: Literal["adamw", "muon"]
) -> None:
    settings = OptimizerConfig(name, lr=1e-3, warmup_steps=0, weight_decay=0.1)
    trainer = Trainer(config(tmp_path / "run", steps=4, optimizer=settings), Poisoned(good=2))
    steps = iter(trainer)
    next(steps), next(steps)
    before = {key: value.clone() for key, value in trainer.trained.tensors().items()}
    assert next(steps).skipped == 1
    assert all(torch.equal(before[key], value) for key, value in trainer.trained.tensors().items())


def test_a_report_is_read_when_it_is_wanted(tmp_path: Path) -> None:
    """Also long after, and the log has the same numbers."""
    reports = list(Trainer(config(tmp_path / "run", steps=5, log_every=2)))
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 5]
    for line in lines:
        report = reports[line["step"] - 1]
        assert (report.loss, report.grad_norm, report.skipped) == (line["loss"], line["grad_norm"], line["skipped"])
        assert report.alignment is None
    assert len({report.loss for report in reports}) == 5


def test_a_skipped_step_leaves_the_average_as_it_is(tmp_path: Path) -> None:
    trainer = Trainer(config(tmp_path / "run", steps=4), Poisoned(good=2))
    steps = iter(trainer)
    next(steps), next(steps)
    before = [value.clone() for value in trainer.ema.state_dict().values()]
    assert next(steps).skipped == 1
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.ema.state_dict().values(), strict=True))


def test_a_diverged_run_goes_on_as_its_message_says(tmp_path: Path) -> None:
    """With a lower learning rate from the last checkpoint, in another run directory."""
    run = tmp_path / "run"
    with pytest.raises(ElitError) as caught:
        Trainer(config(run, max_skipped=2), Poisoned(good=12)).run_to_end()
    checkpoint = run / "checkpoints/step-00000010"
    assert f"--resume {checkpoint} --out ANOTHER" in str(caught.value)
    slower = OptimizerConfig("muon", lr=1e-4, warmup_steps=5, decay="linear")
    other = config(tmp_path / "other", resume=str(checkpoint), steps=12, optimizer=slower)
    assert [report.step for report in Trainer(other)] == [11, 12]


def test_a_loss_that_is_not_finite_is_null_in_the_log_and_leaves_the_bar(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(token: str) -> None:
        raise AssertionError(f"JSON has no {token}")

    show_progress(Trainer(config(tmp_path / "run", steps=6), Poisoned(good=4)))
    lines = [json.loads(line, parse_constant=refuse) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [line["loss"] is None for line in lines] == [False] * 4 + [True] * 2
    assert [line["skipped"] for line in lines] == [0, 0, 0, 0, 1, 2]
    bar = capsys.readouterr().err.splitlines()[-1].split("\r")[-1]
    assert "skipped=2" in bar
    assert "nan" not in bar
    assert f"loss={sum_of_running(lines[:4]):.4f}" in bar


def sum_of_running(lines: list[dict[str, float]]) -> float:
    average = lines[0]["loss"]
    for line in lines:
        average = 0.98 * average + 0.02 * line["loss"]
    return average


def test_snapshots_of_the_average_stay(tmp_path: Path) -> None:
    run = tmp_path / "run"
    averages = {}
    trainer = Trainer(config(run, steps=9, snapshot_every=2, checkpoint_every=4, keep_checkpoints=1))
    for report in trainer:
        averages[report.step] = trainer.ema.module.final.linear.weight.clone()
        if report.step == 7:
            break
    assert [folder.name for folder in (run / "checkpoints").iterdir()] == ["step-00000004"]
    (run / "snapshots/step-00000006/model.safetensors").write_bytes(b"of a step that is trained again")
    Trainer(config(run, steps=9, snapshot_every=2, checkpoint_every=4, keep_checkpoints=1)).run_to_end()
    assert sorted(folder.name for folder in (run / "snapshots").iterdir()) == [f"step-{i:08d}" for i in (2, 4, 6, 8)]
    for step in (2, 4, 6):
        folder = run / f"snapshots/step-{step:08d}"
        assert {file.name for file in folder.iterdir()} == {"config.json", "model.safetensors"}
        assert torch.equal(elit.load(folder).final.linear.weight, averages[step])


def test_iterating_again_continues(tmp_path: Path) -> None:
    """From memory, although there is no checkpoint of that step; nothing is wrapped or compiled twice."""
    settings: dict[str, Any] = {"steps": 9, "checkpoint_every": 20, "checkpoint_activations": True}
    uninterrupted = [report.loss for report in Trainer(config(tmp_path / "a", **settings))]
    trainer = Trainer(config(tmp_path / "b", **settings))
    losses = []
    for stop in (2, 5, 9):
        for report in trainer:
            losses.append(report.loss)
            if report.step == stop:
                break
    assert losses == uninterrupted
    assert (tmp_path / "b/log.jsonl").read_text() == (tmp_path / "a/log.jsonl").read_text()


def test_a_requested_stop_saves_and_can_be_continued(tmp_path: Path) -> None:
    trainer = Trainer(config(tmp_path / "run", steps=6))
    for report in trainer:
        if report.step == 3:
            trainer.request_stop(signal.SIGTERM)
    assert (trainer.step, trainer.stopped_by) == (4, signal.SIGTERM)
    assert (tmp_path / "run/checkpoints/step-00000004").is_dir()
    assert [report.step for report in trainer] == [5, 6]
    assert not trainer.interrupted


def test_training_leaves_the_handlers_of_signals_alone(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    steps = iter(Trainer(config(tmp_path / "run", steps=2)))
    next(steps)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


@pytest.mark.parametrize("copy", [deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"])
def test_a_model_in_training_can_be_copied(tmp_path: Path, copy: Callable[[Any], Any]) -> None:
    trainer = Trainer(config(tmp_path / "run", steps=2, compile=True, checkpoint_activations=True))
    copied = copy(trainer.model)
    for a, b in zip(trainer.model.state_dict().items(), copied.state_dict().items(), strict=True):
        assert a[0] == b[0]
        assert torch.equal(a[1], b[1])


def test_another_setting_in_the_same_directory_is_refused(tmp_path: Path) -> None:
    run = tmp_path / "run"
    Trainer(config(run, steps=10)).run_to_end()
    with pytest.raises(ElitError, match="was started with batch_size = 16, not 32"):
        Trainer(config(run, steps=20, batch_size=32)).run_to_end()
    Trainer(config(run, micro_batch_size=4, steps=10, log_every=5)).run_to_end()  # what changes no result may change


def test_a_run_from_before_a_setting_came_continues(tmp_path: Path) -> None:
    """At any depth: the setting had its default."""
    run = tmp_path / "run"
    Trainer(config(run, steps=4)).run_to_end()
    before = yaml.safe_load((run / "config.yaml").read_text())
    del (
        before["flips"],
        before["optimizer"]["clip"],
        before["model"]["fields"]["patch_size"],
        before["stages"]["last"]["mean"],
    )
    (run / "config.yaml").write_text(yaml.safe_dump(before))
    with pytest.raises(ElitError, match="was started with model"):  # a field of the model has no default here
        Trainer(config(run, steps=4)).run_to_end()
    before["model"]["fields"]["patch_size"] = 1
    (run / "config.yaml").write_text(yaml.safe_dump(before))
    Trainer(config(run, steps=4)).run_to_end()


def test_steps_may_change_while_that_changes_no_learning_rate(tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = OptimizerConfig("adamw", warmup_steps=5, decay="cosine", decay_from=0.5)
    for report in Trainer(config(run, steps=20, optimizer=settings, checkpoint_every=8)):
        if report.step == 10:
            break
    Trainer(config(run, steps=18, optimizer=settings)).run_to_end()  # the decay begins at 9 or 10, and it is step 8
    with pytest.raises(ElitError, match=r"steps is 40 and was 18: .* would jump from 0 to 1 of its peak at step 18"):
        Trainer(config(run, steps=40, optimizer=settings)).run_to_end()
    constant = OptimizerConfig("adamw", warmup_steps=5)
    for steps in (3, 6):
        Trainer(config(tmp_path / "constant", steps=steps, optimizer=constant)).run_to_end()
    with pytest.raises(ElitError, match=r"steps is 3, and .*step-00000006 has done 6 already"):
        Trainer(config(tmp_path / "constant", steps=3, optimizer=constant))


def test_two_processes_in_one_directory(tmp_path: Path) -> None:
    first, second = Trainer(config(tmp_path / "run")), Trainer(config(tmp_path / "run"))
    steps = iter(first)
    next(steps)
    with pytest.raises(ElitError, match="another process is training"):
        next(iter(second))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"label_dropout": 1.5}, "label_dropout is 1.5"),
        ({"data": "mnist"}, "no data set is named 'mnist'"),
    ],
)
def test_wrong_settings(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ElitError, match=message):
        Trainer(config(tmp_path / "run", **change))
    assert not (tmp_path / "run").exists()


def test_learning_rate() -> None:
    settings = OptimizerConfig(warmup_steps=10, decay="linear", decay_from=0.5)
    factors = [lr_factor(settings, step, 100) for step in range(101)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[10:51] == [1.0] * 41
    assert factors[75] == pytest.approx(0.5)
    assert factors[100] == 0
    cosine = OptimizerConfig(warmup_steps=0, decay="cosine")
    assert lr_factor(cosine, 50, 100) == pytest.approx(0.5)
    assert lr_factor(OptimizerConfig(warmup_steps=0), 99, 100) == 1


def test_muon_takes_the_matrices_of_the_stack() -> None:
    model = create("ELIT-DiT-S/2", input_size=16, width=32, num_heads=2, depth=3, head_depth=1, tail_depth=1)
    groups = named_groups(model, OptimizerConfig("muon"))
    parameters = dict(model.named_parameters())
    assert set(groups["muon"]) | set(groups["adamw"]) == set(parameters)
    assert all(parameters[name].dim() == 2 for name in groups["muon"])
    assert "interface.read_layer.attention.kv.weight" in groups["muon"]
    ends = {"patch_embed.weight", "label_embed.weight", "final.linear.weight"}
    assert ends | {"interface.latents"} <= set(groups["adamw"])


def test_muon_orthogonalizes_queries_keys_and_values_one_by_one() -> None:
    fused = [nn.Parameter(torch.randn(24, 8)), nn.Parameter(torch.randn(16, 8)), nn.Parameter(torch.randn(16, 8))]
    apart = [[nn.Parameter(part.clone()) for part in p.detach().split(8)] for p in fused[:2]] + [[deepcopy(fused[2])]]
    names = ["blocks.0.attention.qkv.weight", "interface.read_layer.attention.kv.weight", "blocks.0.mlp.fc1.weight"]
    options = OptimizerConfig("muon", weight_decay=0.1)
    parameters = dict(zip(names, fused, strict=True)) | {"bias": nn.Parameter(torch.zeros(1))}
    muon = make_optimizers(parameters, {"muon": names, "adamw": ["bias"]}, options)["muon"]
    separate = torch.optim.Muon([p for parts in apart for p in parts], lr=options.muon_lr, weight_decay=0.1)
    for _ in range(3):
        for whole, parts in zip(fused, apart, strict=True):
            whole.grad = torch.randn_like(whole)
            for part, grad in zip(parts, whole.grad.split(len(parts[0])), strict=True):
                part.grad = grad.clone()
        muon.step()
        separate.step()
        for whole, parts in zip(fused, apart, strict=True):
            assert torch.equal(whole, torch.cat(parts))


def test_average_follows_its_definition() -> None:
    model = create("DiT-S/2", input_size=4, width=8, num_heads=2, depth=1)
    average = MovingAverage(model, 0.5)
    expected = None
    for i in range(8):
        with torch.no_grad():
            model.final.linear.weight.normal_()
        decay = min(0.5, (1 + i) / (10 + i))
        current = model.final.linear.weight.detach().clone()
        expected = current if expected is None else decay * expected + (1 - decay) * current
        average.update(model, i, torch.tensor(True))
    torch.testing.assert_close(average.module.final.linear.weight, expected)  # float32 rounding


def test_config_file_is_the_recipe() -> None:
    parser = ArgumentParser()
    parser.add_class_arguments(TrainConfig, "run")
    values = yaml.safe_load((ROOT / "configs/train/scenes.yaml").read_text())
    loaded = parser.instantiate(parser.parse_object({"run": values})).run
    # as JSON: what is a tuple in a dataclass is a list in YAML
    assert json.dumps(asdict(loaded)) == json.dumps(asdict(replace(RECIPE, out=loaded.out)))
