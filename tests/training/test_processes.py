"""Several processes train what one does, and survive what one survives. On processors, so with gloo."""

import json
import os
import random
import subprocess
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from elit.interface import BudgetByNoise
from elit.training import ElasticConfig, OptimizerConfig, Trainer, ValidationConfig
from runs import ALL_BUDGETS, STEPS, arguments, config, contents, kill, launch, log, wait_for_line

KILLS = int(os.environ.get("ELIT_TEST_KILLS", "1"))
"""Random moments at which a run is killed; the full test takes 20."""
BY_NOISE = ElasticConfig(group_size=4, by_noise=BudgetByNoise([0.7, 0.4], [0.25, 0.5, 1.0]))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shared run, on two processes."""
    run = tmp_path_factory.mktemp("pair") / "run"
    subprocess.run(arguments(run, 2), check=True, capture_output=True)
    return run


@pytest.mark.parametrize("workers", [None, 1], ids=["both", "one of two"])
def test_killed_processes_end_bit_identical(pair: Path, tmp_path: Path, workers: int | None) -> None:
    run = tmp_path / "run"
    moments = random.Random(f"{workers}")
    for line in sorted(moments.randrange(1, STEPS - 1) for _ in range(KILLS)):
        process = subprocess.Popen(arguments(run, 2), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for_line(run / "log.jsonl", line, process)
        kill(process, workers)
    subprocess.run(arguments(run, 2), check=True, capture_output=True)
    assert contents(run) == contents(pair)


@pytest.mark.parametrize(
    ("elit", "steps", "batch_size", "micro_batch_size"),
    [(ALL_BUDGETS, STEPS, 16, None), (BY_NOISE, 4, 7, 2)],
    ids=["all budgets", "by noise, uneven"],
)
def test_two_processes_have_the_loss_curve_of_one(
    tmp_path: Path, elit: ElasticConfig, steps: int, batch_size: int, micro_batch_size: int | None
) -> None:
    """Also where they have different numbers of micro-batches. AdamW: Muon iterates in bf16, where last bits grow."""
    one = config(
        tmp_path / "1",
        elit=elit,
        steps=steps,
        batch_size=batch_size,
        micro_batch_size=micro_batch_size,
        optimizer=OptimizerConfig(lr=1e-3, warmup_steps=5),
        validation=ValidationConfig(every=steps, images=2, sampling_steps=2),
    )
    Trainer(one).run_to_end()
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(json.loads(json.dumps(asdict(one))) | {"out": str(tmp_path / "2")}))
    done = subprocess.run([*launch(2), "train", "--config", str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "2 processes" in done.stdout
    alone, together = log(tmp_path / "1"), log(tmp_path / "2")
    for a, b in zip(alone, together, strict=True):
        # float32 sums in another order, through all steps before (seen after 60: 1e-5, and 1e-4 of the gradient's norm)
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
        assert b == pytest.approx(a, rel=1e-3)
    assert "held_out_loss/0.25" in alone[-1]
    assert (tmp_path / f"2/samples/step-{steps:08d}.png").exists()
