"""What the documentation shows runs: its Python blocks, its links, its verbs, and the options of its commands."""

import re
import shlex
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import elit
import elit.cli
from elit.flow import SOLVERS
from elit.models import registry
from elit.models.published import save_published
from tests.helpers.models import randomize
from tests.helpers.small_autoencoder import save_autoencoder
from tests.helpers.small_pipelines import sd3_pipeline
from tests.helpers.small_text_encoder import save_text_encoder

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\((?!https?:)([^)#\s]+)[^)]*\)")
COMMAND = re.compile(r"^    (elit (?:.*\\\n)*.*)$", re.MULTILINE)
SLOW = {"planning"}  # it measures hundreds of forwards, and tests/analysis/test_plan.py does the same
PUBLISHED = ROOT / "tests" / "data" / "published"


def blocks(page: Path) -> list[tuple[int, str]]:
    """The Python blocks of a page, each with the number of lines before it."""
    text = page.read_text()
    return [(text.count("\n", 0, found.start(1)), found[1]) for found in BLOCK.finditer(text)]


def commands(page: Path) -> list[str]:
    """The commands of a page that begin with ``elit`` and stand on lines of their own."""
    return [command.replace("\\\n", " ") for command in COMMAND.findall(page.read_text())]


@pytest.fixture(autouse=True)
def tables_as_they_were() -> Iterator[None]:
    """Takes out again what pages add to the tables of models and solvers."""
    tables: list[dict[str, Any]] = [registry.ARCHITECTURES, SOLVERS]
    before = [dict(table) for table in tables]
    yield
    for table, entries in zip(tables, before, strict=True):
        table.clear()
        table.update(entries)


@pytest.fixture
def small_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory with everything that the pages name, in miniature, and narrow models behind the names."""
    monkeypatch.chdir(tmp_path)
    for size, (depth, _, _) in registry.SIZES.items():
        monkeypatch.setitem(registry.SIZES, size, (depth, 16, 2))
    for name, file, fields in (
        ("elit_sit_tiny", "mali6/elit/FILE.pt", {"num_heads": 4, "tail_depth": 2}),
        ("dfm_sit_tiny", "mali6/elit/DFM-FILE.pt", {"num_heads": 4}),
    ):
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        save_published(elit.load(PUBLISHED / f"{name}.pt", **fields), file)
    run = Path("runs/quickstart/run/checkpoints/step-00000001")
    size: dict[str, Any] = {"resolution": 32, "downsample": 1, "in_channels": 1, "num_classes": 10}
    randomize(elit.create("ELIT-SiT-S/2", **size, width=32, depth=4, head_depth=1, tail_depth=1)).save_pretrained(run)
    save_autoencoder(Path("stabilityai/sd-vae-ft-ema"))
    save_text_encoder(Path("google/flan-t5-base"))


@pytest.fixture(scope="module")
def small_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small pipeline of Stable Diffusion 3."""
    pytest.importorskip("diffusers")
    folder = tmp_path_factory.mktemp("pipeline")
    sd3_pipeline(folder / "parts")[0].save_pretrained(folder / "sd3")
    return folder / "sd3"


@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page) and page.stem not in SLOW], ids=lambda page: page.stem
)
@pytest.mark.usefixtures("small_world")
def test_the_python_blocks_of_a_page_run_in_order(page: Path, request: pytest.FixtureRequest) -> None:
    if "StableDiffusion3Pipeline" in page.read_text():
        Path("stabilityai/stable-diffusion-3.5-medium").symlink_to(request.getfixturevalue("small_pipeline"))
    names: dict[str, Any] = {"__name__": "docs"}
    for line, code in blocks(page):
        try:
            exec(compile("\n" * line + code, page, "exec"), names)
        except Exception:
            pytest.fail(f"{page.name}, the block at line {line + 1}:\n{traceback.format_exc(limit=-3)}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    text = BLOCK.sub("", page.read_text())
    lost = [link for link in LINK.findall(text) if not (page.parent / link).exists()]
    assert lost == []


def test_the_readme_has_every_verb() -> None:
    table = (ROOT / "README.md").read_text()
    missing = [verb for verb in elit.cli.VERBS if f"| `elit {verb}" not in table]
    assert missing == []


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=lambda page: page.stem)
def test_commands_have_the_options_that_a_page_gives_them(
    page: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are parsed, with their configuration files, and not run."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(elit.cli, "run", lambda parser, arguments: parser.parse_args(arguments))
    wrong = [command for command in commands(page) if elit.cli.main(shlex.split(command, comments=True)[1:])]
    assert wrong == [], capsys.readouterr().err
