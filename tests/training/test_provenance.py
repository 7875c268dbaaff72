"""Where a checkpoint comes from is written down where that can be known, and is never a reason to fail."""

import json
import os
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

import pytest

import elit
from elit.training.provenance import library_commit, provenance
from tests.helpers.runs import arguments


def test_training_needs_no_git(tmp_path: Path) -> None:
    """It trains, saves and continues from the command line where there is no such program."""
    run, empty = tmp_path / "run", tmp_path / "empty"
    empty.mkdir()
    environment = os.environ | {"PATH": str(empty)}
    constant = ("--optimizer.decay", "constant")  # so that a run may go on for longer
    for steps in (2, 4):
        command = [*arguments(run), *constant, "--steps", str(steps)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    record = json.loads((run / "checkpoints/step-00000004/training.json").read_text())
    assert record["commit"] is None
    assert record["versions"]["elit-diffusion"] == elit.__version__
    assert [json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines()] == [1, 2, 3, 4]


def test_packages_without_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    assert provenance()["versions"]["torch"] is None


@pytest.mark.skipif(shutil.which("git") is None, reason="makes a repository")
@pytest.mark.parametrize(("place", "own"), [("src/elit", True), (".venv/lib/site-packages/elit", False)])
def test_the_commit_is_that_of_the_library_and_of_no_repository_around_it(
    tmp_path: Path, place: str, own: bool
) -> None:
    package = tmp_path / place
    package.mkdir(parents=True)
    settings = ("-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false")
    for command in (["init", "-q"], [*settings, "commit", "-q", "--allow-empty", "-m", "m"]):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    head = subprocess.run(["git", "-C", str(tmp_path), "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    assert library_commit(package) == (head.strip() if own else None)
