"""Imports point down, also those inside functions."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import elit

SOURCE = Path(elit.__file__).parent
BASE = {"errors", "atomic", "tensors", "decode", "seeding", "digest", "launch", "conditions", "layers", "threads"}
"""Small modules that everything may use; among themselves as far as no circle arises."""
BESIDE_FLOW = {"interface", "models", "flow", "data"}
ALLOWED = {
    "interface": set[str](),
    "models": {"interface"},
    "flow": {"interface", "models"},
    "data": set[str](),
    "evaluation": BESIDE_FLOW,
    "analysis": BESIDE_FLOW,
    "export": BESIDE_FLOW,
    "integrations": BESIDE_FLOW,
    "training": BESIDE_FLOW | {"evaluation", "analysis", "integrations"},
    "serving": BESIDE_FLOW | {"evaluation", "analysis"},
    "commands": BESIDE_FLOW | {"evaluation", "analysis", "integrations", "training", "serving", "export"},
}
"""What each package may use, beside itself and the base modules."""


def imported(tree: ast.AST) -> Iterator[str]:
    """Yields the full names that a module imports from this library."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "elit")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            if node.module is not None and node.module.split(".")[0] == "elit":
                yield from (f"{node.module}.{alias.name}" for alias in node.names)


def violations(file: Path, allowed: set[str]) -> list[str]:
    tree = ast.parse(file.read_text())
    used = [(name, name.split(".")[1] if "." in name else "") for name in imported(tree)]
    at_root = {"__version__", ""}  # the library's version, and where it lies
    return [f"{file.relative_to(SOURCE)} imports {name}" for name, part in used if part not in allowed | at_root]


@pytest.mark.parametrize("package", ALLOWED)
def test_packages_use_those_below_them(package: str) -> None:
    files = sorted((SOURCE / package).rglob("*.py"))
    assert files
    assert [each for file in files for each in violations(file, ALLOWED[package] | BASE | {package})] == []


def test_base_modules_use_each_other_alone() -> None:
    assert [each for name in sorted(BASE) for each in violations(SOURCE / f"{name}.py", BASE)] == []


def test_every_package_has_its_place() -> None:
    packages = {file.parent.name for file in SOURCE.glob("*/__init__.py")}
    assert packages == ALLOWED.keys()
    assert {file.stem for file in SOURCE.glob("*.py")} - BASE == {"__init__", "__main__", "cli"}


def test_a_wrong_import_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.test_imports.SOURCE", tmp_path)
    (tmp_path / "x.py").write_text(
        "import elit.cli\ndef f():\n    from elit.training import Trainer\n    from elit import sample, __version__\n"
    )
    found = violations(tmp_path / "x.py", {"models"})
    assert sorted(found) == [f"x.py imports elit.{name}" for name in ("cli", "sample", "training.Trainer")]
