"""The page, as somebody with a browser sees it: a real Chromium without a screen."""

import base64
import io
import re
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import FastAPI
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

import elit
from elit.serving.http import HttpOptions, create_app
from elit.serving.page import mount_page
from elit.serving.parse import Defaults
from elit.serving.pipeline import Pipeline
from elit.serving.request import QueueFull
from tests.helpers.models import tiny
from tests.helpers.servers import pipeline_of, running, wait_until

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium browser, such as Debian's package chromium")

expect.set_options(timeout=30_000)  # a busy machine must not fail a test
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-dev-shm-usage"]


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return pipeline_of(tiny(), queue_limit=8)


@pytest.fixture(scope="module")
def app(pipeline: Pipeline) -> FastAPI:
    names = [f"kind {i}" for i in range(10)]
    return mount_page(create_app(pipeline, Defaults("tiny", steps=5, class_names=names), HttpOptions()))


@pytest.fixture(scope="module")
def address(pipeline: Pipeline, app: FastAPI) -> Iterator[str]:
    with running(app) as address:
        wait_until(lambda: pipeline.status().ready)
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser, address: str) -> Iterator[Page]:
    """The page at the width of a desktop. It asks nobody but its own server, and its console stays quiet."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    asked: list[str] = []
    said: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(address)
    page.get_by_role("button", name="Generate").wait_for()
    yield page
    assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []
    assert said == []
    page.close()


def picture(page: Page, place: str, index: int = 0) -> Image.Image:
    source = page.locator(f"{place} img").nth(index).get_attribute("src") or ""
    return Image.open(io.BytesIO(base64.b64decode(source.partition("base64,")[2])))


def drawn(model: Any, budget: float, label: int = 0) -> Image.Image:
    return elit.to_pil(elit.sample(model, [label], seeds=[0], steps=5, budget=budget))[0]


def test_an_image_forms(page: Page, pipeline: Pipeline) -> None:
    page.get_by_label("Class").click()
    page.get_by_role("option", name="4: kind 4").click()
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#image")).to_contain_text("budget 1 · seed 0 · 5 steps")
    assert picture(page, "#image").tobytes() == drawn(pipeline.model, 1.0, label=4).tobytes()


def test_all_budgets_side_by_side(page: Page, pipeline: Pipeline) -> None:
    page.get_by_role("button", name="All budgets").click()
    expect(page.locator("#budgets img")).to_have_count(4)
    for index, budget in enumerate((0.25, 0.5, 0.75, 1.0)):
        ours, again = (bytes(p.tobytes()) for p in (picture(page, "#budgets", index), drawn(pipeline.model, budget)))
        assert max(abs(a - b) for a, b in zip(ours, again, strict=True)) <= 1  # of another batch: rounding
    captions = page.locator("#budgets figcaption").all_inner_texts()
    found = [re.fullmatch(r"(\S+)\s+(\S+) GFLOPs\s+(\S+) ms", caption) for caption in captions]
    assert [each[1] for each in found if each] == ["0.25", "0.5", "0.75", "1"]
    flops = [float(each[2]) for each in found if each]
    assert flops == sorted(flops) and flops[0] < flops[-1]


def test_the_cost_follows_the_settings(page: Page) -> None:
    expect(page.locator("#cost")).to_contain_text(re.compile(r"GFLOPs · .* ms an image"))
    full = page.locator("#cost").inner_text()
    page.get_by_label("number input for Budget").fill("0.25")
    page.get_by_label("number input for Budget").press("Enter")
    expect(page.locator("#cost")).not_to_have_text(full)
    page.get_by_label("Let the server choose").check()
    expect(page.locator("#cost")).to_contain_text("between")


def test_the_load_is_shown_live(page: Page, pipeline: Pipeline) -> None:
    finished = f"finished\n{pipeline.status().finished + 1}"
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#load .tile", has_text="finished")).to_have_text(finished, use_inner_text=True)
    assert page.locator("#load .chart div").count() == 4


def test_a_full_queue_is_told(page: Page, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise QueueFull(8, 3.0)

    monkeypatch.setattr(pipeline.engine, "submit", full)
    page.get_by_role("button", name="Generate").click()
    expect(page.get_by_text("8 requests are waiting already")).to_be_visible()


def test_that_the_server_stops_is_told(page: Page, app: FastAPI) -> None:
    app.state.service.is_draining = True
    for button in ("Generate", "All budgets"):
        page.get_by_role("button", name=button).click()
        expect(page.get_by_text("the server is stopping; try again later").last).to_be_visible()
        page.reload()
    app.state.service.is_draining = False


def test_a_phone_sees_all_of_it(browser: Browser, address: str) -> None:
    page = browser.new_page(viewport={"width": 390, "height": 844})
    page.goto(address)
    page.get_by_role("button", name="All budgets").click()
    expect(page.locator("#budgets img")).to_have_count(4)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.close()


def test_the_key_opens_the_page(browser: Browser) -> None:
    pipeline = pipeline_of(tiny())
    app = mount_page(create_app(pipeline, options=HttpOptions(api_key="secret")))
    with running(app) as address:
        wait_until(lambda: pipeline.status().ready)
        page = browser.new_page()
        page.goto(address)
        page.get_by_label("username").fill("me")
        page.get_by_label("password").fill("wrong")
        page.get_by_role("button", name="Login").click()
        expect(page.get_by_text("Incorrect")).to_be_visible()
        page.reload()
        page.get_by_label("username").fill("me")
        page.get_by_label("password").fill("secret")
        page.get_by_role("button", name="Login").click()
        expect(page.get_by_role("button", name="Generate")).to_be_visible()
        page.close()
