"""One step, done in other ways: in micro-batches, with activations computed again, compiled, in half precision."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import elit
from elit.analysis import example_inputs
from elit.data import sample_indices
from elit.interface import BudgetByNoise
from elit.models import DFM
from elit.seeding import derive_seed
from elit.training import ElasticConfig, ModelChoice, OptimizerConfig, StepReport, Trainer, ValidationConfig
from elit.training.batch import TrainingDraws, draw, micro_batches, pad_micro_batches, share
from tests.helpers.models import randomize
from tests.helpers.runs import FIELDS, config, log

PUBLISHED = {"variant": "published", "tail_visible": True, "write_depth": 2, "positions": "sincos"}


def reports(out: Path, **changes: Any) -> list[StepReport]:
    # plain AdamW with its default epsilon would blow rounding up where gradients are zero; Muon's matrices do not
    return list(Trainer(config(out, steps=6, **changes)))


def agree(a: list[StepReport], b: list[StepReport], rel: float) -> None:
    for one, other in zip(a, b, strict=True):
        assert other.loss == pytest.approx(one.loss, rel=rel)
        assert other.grad_norm == pytest.approx(one.grad_norm, rel=10 * rel)


def test_shares_cover_the_batch() -> None:
    for count, processes in ((16, 2), (7, 3), (5, 5)):
        parts = [share(count, process, processes) for process in range(processes)]
        assert [i for part in parts for i in range(count)[part]] == list(range(count))
        assert {part.stop - part.start for part in parts} <= {count // processes, -(-count // processes)}


def test_micro_batches_have_one_level_each() -> None:
    parts = [(part.level, part.indices.tolist()) for part in micro_batches([4, 16, 4, 4, 16], 2)]
    assert parts == [(4, [0, 2]), (4, [3]), (16, [1, 4])]


def test_processes_with_less_to_do_join_with_samples_that_weigh_nothing() -> None:
    levels = [4, 4, 4, 16, 8, 4, 16]  # of two processes: two levels in 3 samples, three levels in 4
    shares = [levels[share(7, process, 2)] for process in range(2)]
    parts = [pad_micro_batches(micro_batches(of_process, 2), levels, 2, 2) for of_process in shares]
    assert len(parts[0]) == len(parts[1]) == 3
    for of_process, its_parts in zip(shares, parts, strict=True):
        weights = [0.0] * len(of_process)
        for part in its_parts:
            for place in part.indices:
                assert of_process[place] == part.level
                weights[place] += part.weight
        assert weights == [1.0] * len(of_process)


@pytest.mark.parametrize(
    "change",
    [{"micro_batch_size": 5}, {"checkpoint_activations": True}],
    ids=["micro-batches", "checkpointed activations"],
)
def test_the_same_step_in_other_ways(tmp_path: Path, change: dict[str, Any]) -> None:
    """Float32 sums in another order; after some steps the optimizer has blown their rounding up."""
    agree(reports(tmp_path / "a")[:3], reports(tmp_path / "b", **change)[:3], rel=1e-4)


def test_half_precision_stays_near(tmp_path: Path) -> None:
    single, half = reports(tmp_path / "a"), reports(tmp_path / "b", precision="bf16")
    agree(single, half, rel=1e-2)  # bf16 has 8 bits
    assert [r.loss for r in single] != [r.loss for r in half]
    assert elit.load(tmp_path / "b").dtype == torch.float32


GRAPHS = 16  # that a compiled run has at most: 2 of blocks and of the projection, and 6 of Read and of Write


def test_a_compiled_run_is_the_eager_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward at several budgets, with activations computed again; without the slow code generator."""
    compile_module = torch.nn.Module.compile

    def without_inductor(layer: torch.nn.Module, **options: Any) -> None:
        compile_module(layer, backend="aot_eager", **options)

    monkeypatch.setattr(torch.nn.Module, "compile", without_inductor)
    monkeypatch.setattr("elit.training.parallelize.missing_compiler", lambda device: None)
    settings: dict[str, Any] = {"steps": 6, "checkpoint_activations": True, "precision": "bf16"}
    assert graphs_of(tmp_path, 1e-2, **settings) <= GRAPHS


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "rel"), [("fp32", 1e-4), ("bf16", 1e-2)])
def test_a_run_that_is_really_compiled_is_the_eager_one(tmp_path: Path, precision: str, rel: float) -> None:
    """With the code that inductor generates."""
    settings: dict[str, Any] = {"steps": 6, "checkpoint_activations": True, "precision": precision}
    assert graphs_of(tmp_path, rel, **settings) <= GRAPHS


def graphs_of(folder: Path, rel: float, **settings: Any) -> int:
    """Compares a compiled run with an eager one, and returns the number of graphs that were compiled."""
    eager = list(Trainer(config(folder / "a", **settings)))
    torch.compiler.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    trainer = Trainer(config(folder / "b", compile=True, **settings))
    compiled = list(trainer)
    assert len({report.num_latents for report in compiled}) > 2
    agree(eager, compiled, rel)  # float32 sums in another order, which Muon enlarges; bf16 has 8 bits
    assert not counters["graph_break"]
    layers = [layer for layer in trainer.model.modules() if layer._compiled_call_impl is not None]
    assert len(layers) == FIELDS["depth"] + 3  # Read, Write and the projection
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("fields", [{}, PUBLISHED], ids=["paper", "published"])
def test_every_trainable_parameter_has_a_gradient(tmp_path: Path, fields: dict[str, Any]) -> None:
    """Distributed training waits for one of each, at every budget."""
    trainer = Trainer(config(tmp_path / "run", model=ModelChoice("ELIT-DiT-S/1", FIELDS | fields)))
    model = trainer.model
    for level in (1, 16):
        model.zero_grad()
        x, t, _ = example_inputs(model, 2)
        model(x, t, torch.tensor([1, 2]), level / 16).square().mean().backward()
        assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_budgets_by_noise_are_the_mean_over_samples_at_their_own_level(tmp_path: Path) -> None:
    by_noise = ElasticConfig(group_size=4, by_noise=BudgetByNoise([0.6, 0.3], [0.25, 0.5, 1.0]))
    trainer = Trainer(config(tmp_path / "run", elit=by_noise, micro_batch_size=3, label_dropout=0.5))
    randomize(trainer.model)
    x, y, draws, losses, levels = *first_batch(trainer), [], []
    assert y is not None
    y = torch.where(draws.dropped, 10, y)
    for i, t in enumerate(draws.t.tolist()):
        levels.append(4 if t > 0.6 else 8 if t > 0.3 else 16)
        x_t = (1 - t) * x[i] + t * draws.noise[0][i]
        v = trainer.model(x_t[None], draws.t[i, None], y[i, None], num_latents=levels[i])[0]
        losses.append((v - (draws.noise[0][i] - x[i])).square().mean())
    loss = torch.stack(losses).mean()
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])
    trainer.model.zero_grad()
    report = next(iter(trainer))
    assert set(levels) == {4, 8, 16}
    assert report.num_latents == pytest.approx(sum(levels) / 16)
    assert report.loss == pytest.approx(loss.item(), rel=1e-5)  # float32 sums in another order
    assert report.grad_norm == pytest.approx(gradient.norm().item(), rel=1e-4)


def test_several_levels_in_a_step_are_the_mean_over_samples_at_their_own(tmp_path: Path) -> None:
    several = ElasticConfig(group_size=4, levels=[2, 5, 16], levels_per_step=3)
    trainer = Trainer(config(tmp_path / "run", elit=several, label_dropout=0.0))
    randomize(trainer.model)
    x, y, draws = first_batch(trainer)
    levels = trainer.levels.draw_for(len(x), trainer.config.seed, 0, 3)
    losses = []
    for i, t in enumerate(draws.t.tolist()):
        x_t = (1 - t) * x[i] + t * draws.noise[0][i]
        v = trainer.model(x_t[None], draws.t[i, None], None if y is None else y[i, None], num_latents=levels[i])[0]
        losses.append((v - (draws.noise[0][i] - x[i])).square().mean())
    report = next(iter(trainer))
    assert levels[:2] == [16, 2]
    assert report.num_latents == pytest.approx(sum(levels) / len(levels))
    assert report.loss == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)  # float32 sums in another order


def first_batch(trainer: Trainer) -> tuple[Tensor, Tensor | None, TrainingDraws]:
    """Data and draws of the first step, on one process."""
    config, count = trainer.config, trainer.config.batch_size
    x, y = trainer.data.batch(
        sample_indices(config.seed, 0, count, len(trainer.data)), derive_seed(config.seed, "data", 0)
    )
    return x, y, draw(trainer.flow, config.label_dropout, derive_seed(config.seed, "step", 0), count)[0]


def test_budgets_by_noise_of_a_multi_scale_model_look_at_its_mean_noise(tmp_path: Path) -> None:
    fields = {**FIELDS, "patch_size": 2, "positions": "sincos"}
    elastic = ElasticConfig(group_size=2, by_noise=BudgetByNoise([0.86], [0.25, 1.0]))
    run = config(tmp_path / "run", model=ModelChoice("ELIT-DFM-SiT-S/2", fields), elit=elastic, steps=3)
    trainer = Trainer(run)
    times = first_batch(trainer)[2].t  # (B, 2), of stages with 16 and 64 pixels
    of_sample = [1 if (16 * coarse + 64 * fine) / 80 > 0.86 else 4 for coarse, fine in times.tolist()]
    assert set(of_sample) == {1, 4}
    assert next(iter(trainer)).num_latents == sum(of_sample) / 16
    trainer.run_to_end()
    assert elit.load(tmp_path / "run").levels == (1, 4)


def test_multi_scale_model(tmp_path: Path) -> None:
    fields = {**FIELDS, "patch_size": 2, "positions": "sincos"}
    run = tmp_path / "run"
    settings = {
        "model": ModelChoice("ELIT-DFM-SiT-S/2", fields),
        "elit": ElasticConfig(group_size=2, min_mask_prob=0.0, max_mask_prob=0.75),
        "optimizer": OptimizerConfig("muon", lr=2e-3, warmup_steps=0),
    }
    validation = ValidationConfig(every=20, budgets=[0.25, 1.0], samples=128)
    trainer = Trainer(config(run, steps=60, validation=validation, **settings))
    losses = [report.loss for report in trainer]
    held_out = [line["held_out_loss/0.25"] for line in log(run) if "held_out_loss/0.25" in line]
    assert len(held_out) == 3
    assert held_out[-1] < 0.9 * held_out[0]
    assert isinstance(trainer.model, DFM)
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    assert elit.sample(elit.load(run), [1], steps=2).shape == (1, 1, 8, 8)
    again = list(Trainer(config(tmp_path / "again", steps=6, micro_batch_size=3, **settings)))
    assert [r.loss for r in again] == pytest.approx(losses[:6], rel=1e-5)


def test_held_out_loss_is_logged_for_each_budget(tmp_path: Path) -> None:
    wanted = ValidationConfig(every=3, budgets=[0.25, 1.0], samples=32)
    trainer = Trainer(config(tmp_path / "run", steps=3, validation=wanted))
    trainer.run_to_end()
    losses = trainer.validation.losses(trainer.averaged(), trainer.accelerator)
    assert list(losses) == ["held_out_loss/0.25", "held_out_loss/1"]
    assert losses["held_out_loss/0.25"] != losses["held_out_loss/1"]
    assert trainer.last_speed is not None
    assert trainer.last_speed.images_per_second > 0
    assert trainer.last_speed.mfu is None  # the peak of a processor is not known


class Together:
    """Processes one after the other: the last one knows the sum."""

    device = torch.device("cpu")

    def __init__(self, processes: int) -> None:
        self.num_processes = processes
        self.process_index = 0
        self.total: Any = 0.0

    def reduce(self, value: torch.Tensor, kind: str) -> torch.Tensor:
        assert kind == "sum"
        self.total = self.total + value
        return self.total


def test_held_out_loss_is_the_same_for_any_number_of_processes(tmp_path: Path) -> None:
    wanted = ValidationConfig(every=3, budgets=[0.25, 1.0], samples=200)
    trainer = Trainer(config(tmp_path / "run", validation=wanted))
    randomize(trainer.model)
    seen = []
    for processes in (1, 3, 5):  # of 4 pieces
        together = Together(processes)
        for together.process_index in range(processes):
            losses = trainer.validation.losses(trainer.model, together)
        seen.append(losses)
    assert seen[0] == seen[1] == seen[2]
    assert trainer.validation.data is not None
    x, y = trainer.validation.data.batch(torch.arange(200))
    with torch.no_grad():  # at a level of noise of its own, but of the same size
        draws, _ = draw(trainer.flow, 0.1, 0, 200)
        direct = trainer.objective(x, y, draws, 4).mean()
    assert seen[0]["held_out_loss/0.25"] == pytest.approx(float(direct), rel=0.2)  # two draws of noise and times
