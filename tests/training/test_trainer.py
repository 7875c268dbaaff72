import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from torch import Tensor

import elit
from elit import ElitError
from elit.commands.quickstart import RECIPE
from elit.data import ImageData, digits8
from elit.models import create
from elit.training import ElasticConfig, OptimizerConfig, TrainConfig, Trainer
from elit.training.optim import lr_factor, make_ema, named_groups
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
    """Data whose batches are not finite from some call on."""

    def batch(self, indices: Tensor, seed: int | None = None) -> tuple[Tensor, Tensor]:
        x, y = super().batch(indices, seed)
        return x * float("nan"), y


def test_steps_without_a_finite_loss_change_nothing_and_stop_the_run(tmp_path: Path) -> None:
    data = digits8()
    trainer = Trainer(config(tmp_path / "run", max_skipped=3), Poisoned(data.images, data.labels, 10))
    before = [p.clone() for p in trainer.model.parameters()]
    with pytest.raises(ElitError, match="not finite for 3 steps in a row"):
        trainer.run_to_end()
    assert trainer.step == 3
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))


def test_another_setting_in_the_same_directory_is_refused(tmp_path: Path) -> None:
    run = tmp_path / "run"
    Trainer(config(run, steps=10)).run_to_end()
    with pytest.raises(ElitError, match="was started with batch_size = 16, not 32"):
        Trainer(config(run, steps=20, batch_size=32)).run_to_end()
    Trainer(config(run, steps=20)).run_to_end()  # going on for longer is allowed
    assert elit.models.files.checkpoints(run)[-1].name == "step-00000020"


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


def test_average_follows_its_definition() -> None:
    model = create("DiT-S/2", input_size=4, width=8, num_heads=2, depth=1)
    average = make_ema(model, 0.5)
    expected = None
    for i in range(8):
        with torch.no_grad():
            model.final.linear.weight.normal_()
        decay = min(0.5, (1 + i) / (10 + i))
        current = model.final.linear.weight.detach().clone()
        expected = current if expected is None else decay * expected + (1 - decay) * current
        average.update_parameters(model)
    torch.testing.assert_close(average.module.final.linear.weight, expected)  # float32 rounding


def test_config_file_is_the_recipe() -> None:
    parser = ArgumentParser()
    parser.add_class_arguments(TrainConfig, "run")
    values = yaml.safe_load((ROOT / "configs/train/digits.yaml").read_text())
    loaded = parser.instantiate(parser.parse_object({"run": values})).run
    # as JSON: what is a tuple in a dataclass is a list in YAML
    assert json.dumps(asdict(loaded)) == json.dumps(asdict(replace(RECIPE, out=loaded.out)))
