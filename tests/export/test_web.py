"""The page in a real Chromium: its noise, its planner and its samples are those of Python."""

import functools
import http.server
import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import elit
from elit.analysis.calibration import STEP_COUNTS, Calibration, GuidanceTable, StepTable
from elit.analysis.plan import solve
from elit.commands.export import ExportOptions, export_model
from elit.errors import ElitError
from elit.export import web
from elit.seeding import normals
from tests.helpers.models import tiny
from tests.helpers.stacks import text_model

CHROMIUM = Path("/usr/bin/chromium")
PAGE = Path(web.__file__).parent / "web"


class Quiet(http.server.SimpleHTTPRequestHandler):
    extensions_map = http.server.SimpleHTTPRequestHandler.extensions_map | {".mjs": "text/javascript"}

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def serve() -> Iterator[Any]:
    """Serves folders on ports that are free, and gives their addresses."""
    servers = []

    def start(folder: Path) -> str:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}/"

    yield start
    for server in servers:
        server.shutdown()


@pytest.fixture
def tab() -> Iterator[Any]:
    """A tab of a browser."""
    sync_api = pytest.importorskip("playwright.sync_api")
    if not CHROMIUM.exists():
        pytest.skip("there is no Chromium here")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=str(CHROMIUM), args=["--no-sandbox", "--disable-gpu"], timeout=120_000
        )
        page = browser.new_page(viewport={"width": 900, "height": 1100})
        page.set_default_timeout(120_000)
        yield page
        browser.close()


def small() -> Any:
    """A model of grey pixels, as small as that of the quickstart is in every other respect."""
    return tiny(in_channels=1, depth=3, positions="sincos")


def test_noise_and_plans_are_those_of_python(serve: Any, tab: Any, tmp_path: Path) -> None:
    for name in ("random.js", "planner.js"):
        (tmp_path / name).write_text((PAGE / name).read_text())
    (tmp_path / "index.html").write_text(
        '<script type="module">import {startNoise} from "./random.js"; import {plan} from "./planner.js";'
        "window.found = {startNoise, plan};</script>"
    )
    tab.goto(serve(tmp_path))
    tab.wait_for_function("window.found")
    for seed in (0, 7, 123456789012, -3):
        found = tab.evaluate(f"Array.from(found.startNoise({seed}n, 5000))")
        wanted = normals([(seed, "start")], (5000,))[0]
        assert (torch.tensor(found) - wanted).abs().max() < 1e-6  # the last bit of a logarithm, far out

    calibration = Calibration(
        levels=[1, 4, 8, 16],
        num_latents=16,
        times=[1.0, 0.7, 0.4, 0.1],
        tables=[
            GuidanceTable(
                None,
                [[0.3, 0.2, 0.1, 0.0], [0.5, 0.3, 0.1, 0.0], [0.6, 0.5, 0.2, 0.0], [0.9, 0.5, 0.3, 0.0]],
                *([0.001] * 4, [1] * 4, [0.001] * 4, [1] * 4),
            )
        ],
        seconds=[0.002, 0.003, 0.005, 0.008],
        flops=[1] * 4,
        seconds_skipped=[0.002] * 4,
        flops_skipped=[1] * 4,
        overhead=0.0,
        step_tables=[StepTable(None, [0.5 / n for n in STEP_COUNTS], [])],
        solver="euler",
        stamp={"path": "linear"},
    )
    calibration = replace(calibration, tables=[replace(calibration.tables[0], seconds=calibration.seconds)])
    given = {
        "levels": calibration.levels,
        "times": calibration.times,
        "errors": calibration.tables[0].errors,
        "step_counts": STEP_COUNTS,
        "step_errors": calibration.step_tables[0].errors,
    }
    milliseconds = [1000 * s for s in calibration.seconds]
    for limit in (12, 30, 80, 200):
        found = tab.evaluate(f"found.plan({json.dumps(given)}, {milliseconds}, {limit})")
        wanted = solve(calibration, limit / 1000)
        assert found["error"] == pytest.approx(wanted.error, rel=0.02)  # both round costs up, to other units
        assert found["milliseconds"] <= limit
        assert sum(milliseconds[given["levels"].index(j)] for j in found["levels"]) == pytest.approx(  # type: ignore[attr-defined]
            found["milliseconds"]
        )
    assert tab.evaluate(f"found.plan({json.dumps(given)}, {milliseconds}, 7)") is None


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_the_folder_samples_as_python_does(precision: Any, serve: Any, tab: Any, tmp_path: Path) -> None:
    """It takes ONNX Runtime for the web from npm, once."""
    model = small()
    model.save_pretrained(tmp_path / "model")
    out = tmp_path / "page"
    export_model(ExportOptions(model=str(tmp_path / "model"), out=out, format="web", precision=precision, steps=4))
    broken: list[str] = []
    tab.on("pageerror", lambda error: broken.append(str(error)))
    tab.goto(serve(out))
    tab.wait_for_function("window.elit")
    tab.evaluate("window.elit.ready.then(() => 1)")
    if precision == "int8":
        file = tmp_path / "int8.onnx"
        elit.export(model, file, precision="int8")
        model = elit.load_exported(file)
    for level, scale in ((1, 1), (4, 1), (2, 3)):
        settings = f"seed: 5, label: 3, levels: [{level}, {level}, {level}, {level}], scale: {scale}, weakLevel: 1"
        found = tab.evaluate(f"window.elit.model.sample({{{settings}}}).then((x) => Array.from(x))")
        guidance = None if scale == 1 else elit.Guidance("ccfg", 3.0, 1 / 4)
        wanted = elit.sample(model, [3], seeds=[5], steps=4, budget=level / 4, guidance=guidance)
        assert (torch.tensor(found) - wanted.flatten()).abs().max() < 1e-3

    assert tab.locator("#one canvas").count() == 1
    assert tab.locator("#all canvas").count() == len(model.levels)
    tab.fill("#latency", "100000")
    tab.click("#plan")
    tab.wait_for_selector("#planned canvas")
    assert "of 4 latents" in tab.inner_text("#told")
    tab.fill("#latency", "0.001")
    tab.click("#plan")
    tab.wait_for_function("document.getElementById('told').textContent.includes('Nothing is that fast')")
    tab.locator("#one canvas").screenshot(path=tmp_path / "one.png")
    assert len(Image.open(tmp_path / "one.png").getcolors(10**6) or []) > 10  # a picture, not a blank
    assert broken == []


def test_what_the_page_cannot_show_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for model in (text_model(), tiny(in_channels=4), tiny(in_channels=1, interface=None)):
        with pytest.raises(ElitError, match="as onnx"):
            web.export_web(model, tmp_path / "page")
    monkeypatch.setenv("ELIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ElitError, match="there is no npm here"):
        web.export_web(small(), tmp_path / "page")
    assert not (tmp_path / "page").exists()
