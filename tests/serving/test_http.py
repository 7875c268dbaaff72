"""The HTTP interface, as clients see it: curl, the openai package, and those who send nonsense or go away."""

import asyncio
import base64
import io
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from PIL import Image

import elit
from elit.analysis import Calibration, calibrate
from elit.cli import main
from elit.commands.serve import ServeOptions, make_pipeline
from elit.conditions import Text
from elit.data.autoencoder import load_autoencoder
from elit.data.captions import WordVectors
from elit.interface import InterfaceConfig
from elit.models import MMDiT, MMDiTConfig
from elit.serving.answers import Answer
from elit.serving.http import EventStream, HttpOptions, create_app
from elit.serving.parse import Defaults
from elit.serving.pipeline import Pipeline
from elit.serving.points import OperatingPoint
from elit.serving.schema import ImagesRequest
from tests.helpers.models import randomize, tiny
from tests.helpers.servers import pipeline_of, running, serving, wait_until
from tests.helpers.small_autoencoder import save_autoencoder

GENERATIONS = "/v1/images/generations"
LONG = 250  # steps of an image that somebody waits for


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return pipeline_of(tiny(), queue_limit=50)


@pytest.fixture(scope="module")
def address(pipeline: Pipeline) -> Iterator[str]:
    with serving(pipeline, class_names=[f"class {i}" for i in range(10)]) as address:
        yield address


def generate(address: str, **body: Any) -> httpx.Response:
    return httpx.post(address + GENERATIONS, json=body, timeout=60)


def picture(b64_json: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(b64_json)))


def made_again(model: Any, recipe: dict[str, Any], autoencoder: Any = None) -> Image.Image:
    """What `elit.sample` makes of what an answer says about an image."""
    samples = elit.sample(
        model,
        [recipe["label"]],
        seeds=[recipe["seed"]],
        steps=recipe["steps"],
        solver=recipe["solver"],
        budget=recipe["budgets"],
        guidance=recipe["guidance"] and elit.Guidance(**recipe["guidance"]),
    )
    return elit.to_pil(samples, autoencoder)[0]


# ------------------------------------------------------------------------------------------------ images


@pytest.mark.parametrize(
    ("body", "budget"),
    [
        ({"prompt": "3", "seed": 7}, 1.0),
        ({"prompt": "class 3", "quality": "low"}, 0.25),
        ({"prompt": "9", "quality": "medium", "steps": 6, "solver": "heun"}, 0.5),
        ({"labels": 4, "budget": 0.75, "guidance": "ccfg", "guidance_scale": 2.0}, 0.75),
        ({"labels": [1], "prompt": "", "guidance_scale": 1.5, "solver": "sde", "size": "8x8", "n": None}, 1.0),
    ],
)
def test_an_image_is_made_again_offline_to_the_bit(
    pipeline: Pipeline, address: str, body: dict[str, Any], budget: float
) -> None:
    answer = generate(address, **body).json()
    (data,) = answer["data"]
    assert data["budgets"] == [budget] * data["steps"]
    assert data["steps"] == body.get("steps", 4)
    assert data["seed"] == body.get("seed", data["seed"])
    assert answer["usage"]["output_tokens"] == 4 * 4 * budget * data["steps"]  # windows x latents
    assert picture(data["b64_json"]).tobytes() == made_again(pipeline.model, data).tobytes()


def test_images_of_one_request_have_seeds_in_a_row_and_their_own_labels(pipeline: Pipeline, address: str) -> None:
    data = generate(address, labels=[1, 2, 3], n=3, seed=40).json()["data"]
    assert [(each["label"], each["seed"]) for each in data] == [(1, 40), (2, 41), (3, 42)]
    for each in data:  # by eye the same: rounding may differ in another batch
        ours, theirs = (
            torch.tensor(list(p.tobytes())).int() for p in (picture(each["b64_json"]), made_again(pipeline.model, each))
        )
        assert (ours - theirs).abs().max() <= 1


@pytest.mark.parametrize(("output_format", "found"), [("png", "PNG"), ("jpeg", "JPEG"), ("webp", "WEBP")])
def test_formats(address: str, output_format: str, found: str) -> None:
    answer = generate(address, prompt="3", output_format=output_format, output_compression=80).json()
    image = picture(answer["data"][0]["b64_json"])
    assert (image.format, image.size, answer["output_format"]) == (found, (8, 8), output_format)


def test_latents_are_decoded(tmp_path: Path) -> None:
    save_autoencoder(tmp_path)
    model, autoencoder = tiny(in_channels=4), load_autoencoder(tmp_path, 4)
    with serving(pipeline_of(model, autoencoder)) as address:
        answer = generate(address, prompt="3", size="32x32").json()
    assert answer["size"] == "32x32"
    assert (
        picture(answer["data"][0]["b64_json"]).tobytes() == made_again(model, answer["data"][0], autoencoder).tobytes()
    )


def text_model() -> MMDiT:
    return randomize(
        MMDiT(
            MMDiTConfig(
                input_size=8,
                in_channels=3,
                text_width=32,
                width=32,
                depth=4,
                num_heads=2,
                head_depth=1,
                tail_depth=1,
                interface=InterfaceConfig(group_size=2),
            )
        )
    ).eval()


def test_a_model_of_text_takes_prompts() -> None:
    model = text_model()
    with serving(pipeline_of(model, text_encoder=WordVectors())) as address:
        answer = generate(address, prompt="a small three", seed=5).json()
        refused = [generate(address, labels=3), generate(address)]
    again = elit.to_pil(elit.sample(model, WordVectors()(["a small three"]), seeds=[5], steps=4))[0]
    assert picture(answer["data"][0]["b64_json"]).tobytes() == again.tobytes()
    assert answer["usage"]["input_tokens"] == 3
    assert [each.status_code for each in refused] == [400, 422]


def test_steps_and_budgets_that_are_left_open_follow_the_load() -> None:
    points = (OperatingPoint(2, 0.25), OperatingPoint(2), OperatingPoint(4))
    pipeline = pipeline_of(tiny(), latency_objective=0.02, points=points, refuse_late=False)  # a step costs 1 ms
    with serving(pipeline, steps=40, min_steps=4) as address:
        left_open, *fixed = (
            generate(address, prompt="3", **body).json()["data"][0]
            for body in ({}, {"steps": 40}, {"quality": "high"}, {"budget": 1.0})
        )
    assert (left_open["steps"], left_open["budgets"]) == (10, [0.5] * 10)
    assert [each["steps"] for each in fixed] == [40] * 3
    assert picture(left_open["b64_json"]).tobytes() == made_again(pipeline.model, left_open).tobytes()


# ------------------------------------------------------------------------------------------------ the openai package


def test_the_openai_package_gets_images(pipeline: Pipeline, address: str) -> None:
    client = openai.OpenAI(base_url=address + "/v1", api_key="any")
    assert [model.id for model in client.models.list()] == ["tiny"]
    answer = client.images.generate(model="tiny", prompt="3", n=2, size="auto", quality="high", extra_body={"seed": 1})
    assert answer.data is not None and answer.usage is not None
    assert [each.to_dict()["seed"] for each in answer.data] == [1, 2]
    assert picture(str(answer.data[0].b64_json)).size == (8, 8)
    with pytest.raises(openai.BadRequestError, match="class 11 does not exist"):
        client.images.generate(model="tiny", prompt="11")
    with pytest.raises(openai.NotFoundError, match="this server has tiny"):
        client.images.generate(model="dall-e-3", prompt="3")


def test_the_openai_package_streams(pipeline: Pipeline, address: str) -> None:
    client = openai.OpenAI(base_url=address + "/v1", api_key="any")
    *partial, last = client.images.generate(
        model="tiny", prompt="3", stream=True, partial_images=3, quality="low", extra_body={"seed": 7}
    )
    assert [event.type for event in partial] == ["image_generation.partial_image"] * 3
    assert [getattr(event, "partial_image_index") for event in partial] == [0, 1, 2]  # noqa: B009  # of this kind alone
    assert last.type == "image_generation.completed" and last.usage.output_tokens == 4 * 4
    whole = picture(last.b64_json)
    assert whole.tobytes() == made_again(pipeline.model, last.to_dict()).tobytes()
    assert len({picture(event.b64_json).tobytes() for event in [*partial, last]}) > 1
    with pytest.raises(openai.BadRequestError, match="class 11 does not exist"):
        client.images.generate(model="tiny", prompt="11", stream=True)


def test_a_stream_of_several_images(address: str) -> None:
    with httpx.stream(
        "POST", address + GENERATIONS, json={"prompt": "3", "n": 3, "stream": True, "partial_images": 1, "seed": 0}
    ) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line]
    names, data = lines[::2], [json.loads(line.removeprefix("data: ")) for line in lines[1::2]]
    assert [name.removeprefix("event: ") for name in names] == [each["type"] for each in data]
    completed = {each["image_index"]: each["seed"] for each in data if each["type"].endswith("completed")}
    assert completed == {0: 0, 1: 1, 2: 2}
    assert len(data) == 6


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({}, 422, "prompt is missing"),
        ({"prompt": "a cat"}, 400, r"takes a class: a number in 0\.\.9, or its name"),
        ({"prompt": "10"}, 400, r"knows 0\.\.9"),
        ({"labels": [1, 2], "n": 3}, 400, "2 labels for 3 images"),
        ({"labels": -1}, 400, r"knows 0\.\.9"),
        ({"prompt": "3", "labels": 3}, 400, "not both"),
        ({"prompt": "3", "n": 11}, 400, "n: .*10"),
        ({"prompt": "3", "n": "1"}, 400, "n: "),
        ({"prompt": "3", "n": True}, 400, "n: "),
        ({"prompt": "3", "size": "1024x1024"}, 400, "images of 8x8"),
        ({"prompt": "3", "quality": "hd"}, 400, "quality: "),
        ({"prompt": "3", "response_format": "url"}, 400, "response_format: "),
        ({"prompt": "3", "budget": 1.5}, 400, "budget: "),
        ({"prompt": "3", "budget": 0.5, "quality": "low"}, 400, "not both"),
        ({"prompt": "3", "budget": 0.5, "min_budget": 0.25}, 400, "min_budget"),
        ({"prompt": "3", "steps": 251}, 400, "at most 250"),
        ({"prompt": "3", "steps": 0}, 400, "steps: "),
        ({"prompt": "3", "seed": -1}, 400, "seed: "),
        ({"prompt": "3", "seed": 2**63}, 400, "seed: "),
        ({"prompt": "3", "guidance": "cfg", "guidance_budget": 0.5}, 400, "take ccfg"),
        ({"prompt": "3", "guidance": "none", "guidance_scale": 2.0}, 400, "without guidance"),
        ({"prompt": "3", "guidance_scale": 101}, 400, "guidance_scale: "),
        ({"prompt": "3", "promt": "4"}, 400, "does not exist"),
        ({"prompt": "3" * 5000}, 400, "prompt: "),
        ({"prompt": "3", "model": "other"}, 404, "has tiny"),
    ],
)  # fmt: skip
def test_wrong_values_are_told(address: str, body: dict[str, Any], status: int, said: str) -> None:
    answer = generate(address, **body)
    error = answer.json()["error"]
    assert answer.status_code == status, error
    assert re.search(said, error["message"])
    assert error["type"] == "invalid_request_error"


def test_wrong_requests_are_told(address: str) -> None:
    def status(method: str, path: str, **given: Any) -> int:
        answer = httpx.request(method, address + path, **given)
        assert "message" in answer.json()["error"]
        return answer.status_code

    json_type = {"content-type": "application/json"}
    assert status("POST", GENERATIONS, content=b"{", headers=json_type) == 400
    assert status("POST", GENERATIONS, content=b"\xff\xfe", headers=json_type) == 400
    assert status("POST", GENERATIONS, content=b"[1]", headers=json_type) == 400
    assert status("POST", GENERATIONS, content=b"") == 422
    assert status("POST", GENERATIONS, content=b" " * 300_000, headers=json_type) == 413
    assert status("GET", GENERATIONS) == 404
    assert status("POST", "/v1/images/edits", json={}) == 404
    assert status("GET", "/v1/models/other") == 404
    assert httpx.get(address + "/v1/models/tiny").json()["budgets"] == [0.25, 0.5, 0.75, 1.0]


def test_a_body_must_arrive_in_time() -> None:
    with serving(pipeline_of(tiny()), HttpOptions(body_seconds=0.2)) as address:
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as client:
            client.sendall(f"POST {GENERATIONS} HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{{".encode())
            assert client.recv(1000).startswith(b"HTTP/1.1 408")


def test_the_key_is_asked_for() -> None:
    with serving(pipeline_of(tiny()), HttpOptions(api_key="secret")) as address:
        headers = [
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "Basic x"},
            {"Authorization": "Bearer secret"},
        ]
        found = [httpx.get(address + "/v1/models", headers=each).status_code for each in headers]
        assert found == [401, 401, 401, 200]
        assert generate(address, prompt="3").status_code == 401
        client = openai.OpenAI(base_url=address + "/v1", api_key="secret")
        assert client.images.generate(prompt="3").data
        assert httpx.get(address + "/health").status_code == 200  # for probes


def test_a_full_queue_refuses_with_the_time_to_wait() -> None:
    pipeline = pipeline_of(tiny(), queue_limit=5, max_work=1)
    with serving(pipeline) as address, ThreadPoolExecutor() as pool:
        waiting = pool.submit(generate, address, prompt="3", n=5, steps=100)
        wait_until(lambda: pipeline.status().queued >= 4)
        refused = generate(address, prompt="3", n=5)
        client = openai.OpenAI(base_url=address + "/v1", api_key="any", max_retries=0)
        with pytest.raises(openai.RateLimitError):
            client.images.generate(prompt="3", n=5, stream=True)
        assert waiting.result().status_code == 200
        wait_until(lambda: pipeline.status().queued + pipeline.status().in_flight == 0)
        assert generate(address, prompt="3").status_code == 200
        never = generate(address, prompt="3", n=6)
    assert never.status_code == 400 and "n is 6; at most 5 images can wait here" in never.json()["error"]["message"]
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["type"] == "rate_limit_error"


def test_an_answer_that_takes_too_long_is_given_up() -> None:
    pipeline = pipeline_of(tiny())
    with serving(pipeline, HttpOptions(request_seconds=0.1)) as address:
        answer = generate(address, prompt="3", n=10, steps=LONG)
        with httpx.stream(
            "POST", address + GENERATIONS, json={"prompt": "3", "n": 10, "steps": LONG, "stream": True}
        ) as stream:
            said = stream.read().decode()
        wait_until(lambda: pipeline.status().in_flight == 0)
    assert answer.status_code == 503 and answer.json()["error"]["code"] == "timeout"
    assert said.startswith("event: error") and "timeout" in said
    assert pipeline.status().cancelled == 20


# ------------------------------------------------------------------------------------------------ reliability


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_is_cancelled(pipeline: Pipeline, address: str, stream: bool) -> None:
    before = pipeline.status()
    with httpx.Client() as client, pytest.raises(httpx.ReadTimeout):
        body = {"prompt": "3", "n": 10, "steps": LONG, "stream": stream}
        client.post(address + GENERATIONS, json=body, timeout=0.2)
    wait_until(lambda: pipeline.status().in_flight + pipeline.status().queued == 0)
    after = pipeline.status()
    assert after.cancelled - before.cancelled == 10
    assert after.finished == before.finished
    assert generate(address, prompt="3").status_code == 200


def test_a_stream_that_is_cancelled_while_it_sends_cancels_its_images() -> None:
    pipeline, told = pipeline_of(tiny()), list[Any]()

    async def cancelled_while_sending() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
        body, sending = ImagesRequest(prompt="3", n=10, steps=LONG, stream=True, partial_images=3), asyncio.Event()

        async def send(message: Any) -> None:
            if message["type"] == "http.response.body":
                sending.set()
                await asyncio.Event().wait()  # a client that does not read

        wanted = Defaults("tiny").wanted(body, pipeline.model, pipeline.size)
        stream = await EventStream.begin(Answer(body, wanted, pipeline, "tiny"), 60)
        scope: Any = {"type": "http", "asgi": {"spec_version": "2.4"}}
        task = asyncio.create_task(stream(scope, asyncio.Event().wait, send))  # type: ignore[arg-type]
        await asyncio.wait_for(sending.wait(), 30)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert pipeline.status().queued + pipeline.status().in_flight == 0

    with pipeline.engine:
        assert pipeline.engine.wait_until_ready(30)
        asyncio.run(cancelled_while_sending())
    assert pipeline.status().cancelled == 10
    assert told == []


def test_an_image_that_fails_fails_alone() -> None:
    model = tiny()
    with torch.no_grad():
        model.label_embed.weight[9] = torch.nan
    with serving(pipeline_of(model)) as address, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda label: generate(address, prompt=str(label), steps=20), [3, 9, 4, 9, 5]))
    assert [answer.status_code for answer in answers] == [200, 500, 200, 500, 200]
    assert answers[1].json()["error"]["type"] == "server_error"
    assert "Traceback" not in answers[1].text


def test_health_says_when_it_is_warm(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline, warm = pipeline_of(tiny()), threading.Event()
    warm_up = pipeline.engine.warm_up
    monkeypatch.setattr(pipeline.engine, "warm_up", lambda: (warm.wait(30), warm_up()))
    with running(create_app(pipeline)) as address:
        cold, refused = httpx.get(address + "/health"), generate(address, prompt="3")
        warm.set()
        wait_until(lambda: pipeline.status().ready)
        ready = httpx.get(address + "/health")
    assert (cold.status_code, cold.json()["status"], cold.json()["live"]) == (503, "starting", True)
    assert refused.status_code == 503 and "retry-after" in refused.headers
    assert (ready.status_code, ready.json()["status"], ready.json()["ready"]) == (200, "ok", True)


def test_health_says_when_a_step_is_stuck() -> None:
    model, free = tiny(), threading.Event()
    pipeline = pipeline_of(model, stuck_after=0.1)
    with serving(pipeline) as address, ThreadPoolExecutor() as pool:
        encode = model.encode
        model.encode = lambda *given: (free.wait(30), encode(*given))[1]
        waiting = pool.submit(generate, address, prompt="3")
        wait_until(lambda: httpx.get(address + "/health").json()["status"] == "stuck")
        health = httpx.get(address + "/health")
        free.set()
        assert waiting.result().status_code == 200
        wait_until(lambda: httpx.get(address + "/health").status_code == 200)
    assert health.status_code == 503
    assert health.json()["live"] is False and health.json()["seconds_in_step"] >= 0.1


def test_an_engine_that_died_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = pipeline_of(tiny())
    monkeypatch.setattr(pipeline.engine, "warm_up", lambda: 1 / 0)
    with running(create_app(pipeline)) as address:
        wait_until(lambda: not pipeline.status().alive)
        health, refused = httpx.get(address + "/health"), generate(address, prompt="3")
    assert (health.status_code, health.json()["status"]) == (503, "dead")
    assert refused.status_code == 503 and "has failed" in refused.json()["error"]["message"]


def test_metrics_count_what_happened() -> None:
    def value(name: str) -> float:
        return float(next(line.split()[-1] for line in lines if line.startswith(name + " ")))

    with serving(pipeline_of(tiny(), queue_limit=3, max_work=1)) as address:
        generate(address, prompt="3", n=2, quality="low")
        with ThreadPoolExecutor() as pool:
            answers = list(pool.map(lambda _: generate(address, prompt="3", n=3, steps=100).status_code, range(2)))
        lines = httpx.get(address + "/metrics").text.splitlines()
    assert sorted(answers) == [200, 429]
    assert value('elit_images_total{outcome="finished"}') == 5
    assert value('elit_images_total{outcome="refused"}') == 1
    assert value('elit_images_total{outcome="cancelled"}') <= 2
    assert value('elit_steps_total{budget="0.25"}') == 8
    assert value("elit_image_latency_seconds_count") == 5
    assert value("elit_step_seconds_count") >= 4
    assert value("elit_images_waiting") == value("elit_images_in_flight") == value("elit_step_stuck") == 0
    assert value('elit_http_responses_total{path="/v1/images/generations",status="429"}') == 1


def test_the_documentation_of_the_interface(address: str) -> None:
    document = httpx.get(address + "/openapi.json").json()
    fields = document["components"]["schemas"]["ImagesRequest"]["properties"]
    assert {"prompt", "quality", "budget", "stream"} <= fields.keys()
    assert "429" in document["paths"][GENERATIONS]["post"]["responses"]
    assert httpx.get(address + "/docs").status_code == 404  # its viewer would load scripts from elsewhere


def test_a_prompt_that_finds_the_queue_full_is_not_encoded() -> None:
    encoded, free = list[str](), threading.Event()

    def encode(prompts: Sequence[str]) -> Text:
        encoded.extend(prompts)
        free.wait(30)
        return WordVectors()(prompts)

    pipeline = pipeline_of(text_model(), text_encoder=encode, queue_limit=2)
    with serving(pipeline) as address, ThreadPoolExecutor() as pool:
        waiting = [pool.submit(generate, address, prompt="a three") for _ in range(2)]
        wait_until(lambda: pipeline.pending == 2)
        assert [generate(address, prompt="a five").status_code for _ in range(3)] == [429] * 3
        free.set()
        assert [each.result().status_code for each in waiting] == [200] * 2
    assert encoded == ["a three"] * 2 and pipeline.status().refused == 3


# ------------------------------------------------------------------------------------------------ the command


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    tiny().save_pretrained(folder)
    return folder


def test_sigterm_delivers_what_was_accepted_and_exits_with_0(saved: Path) -> None:
    command = [sys.executable, "-m", "elit", "serve", "--model", str(saved), "--port", "0", "--page", "false"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            assert process.stdout is not None
            address = next(found[0] for line in process.stdout if (found := re.search(r"http://[\d.:]+", line)))
            wait_until(lambda: httpx.get(address + "/health").status_code == 200)
            with ThreadPoolExecutor() as pool:
                waiting = pool.submit(generate, address, prompt="3", n=10, steps=LONG)
                wait_until(lambda: httpx.get(address + "/health").json()["in_flight"] > 0)
                process.send_signal(signal.SIGTERM)
                assert len(waiting.result().json()["data"]) == 10
            rest = process.stdout.read()
            assert process.wait(30) == 0
            assert "Traceback" not in rest
        finally:
            process.kill()


STUCK = """
import sys, threading
from elit.cli import main
from elit.models import DiT
step = DiT.encode

def stuck(self, x, *given, **named):
    if threading.current_thread().name == "elit-engine" and BEGIN.exists():
        threading.Event().wait()
    return step(self, x, *given, **named)

from pathlib import Path
BEGIN = Path(sys.argv[1])
DiT.encode = stuck
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize(("signals", "seconds", "code"), [([signal.SIGTERM], "0.5", 1), ([signal.SIGINT] * 2, "60", 1)])
def test_a_stuck_step_does_not_keep_the_process(
    saved: Path, tmp_path: Path, signals: list[signal.Signals], seconds: str, code: int
) -> None:
    begin = tmp_path / "begin"
    options = ["serve", "--model", str(saved), "--port", "0", "--page", "false", "--drain-seconds", seconds]
    command = [sys.executable, "-c", STUCK, str(begin), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            assert process.stdout is not None
            address = next(found[0] for line in process.stdout if (found := re.search(r"http://[\d.:]+", line)))
            wait_until(lambda: httpx.get(address + "/health").status_code == 200)
            process.send_signal(signal.SIGHUP)  # which does nothing
            begin.touch()
            with ThreadPoolExecutor() as pool:
                waiting = pool.submit(generate, address, prompt="3")
                wait_until(lambda: httpx.get(address + "/health").json()["in_flight"] > 0)
                for each in signals:
                    process.send_signal(each)
                    time.sleep(0.3)  # else they are one
                assert process.wait(30) == code
                assert waiting.exception() is not None or waiting.result().status_code == 503
            assert "a step has not ended" in process.stdout.read()
        finally:
            process.kill()


def test_the_key_is_not_shown() -> None:
    assert "secret" not in repr(ServeOptions(model="any", api_key="secret"))


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory, saved: Path) -> Path:
    file = tmp_path_factory.mktemp("calibrated") / "calibration.json"
    calibrate(elit.load(saved), [1, 2], batch_size=4, num_samples=1).save(file)
    return file


def test_a_calibration_saves_measuring_and_says_in_which_order_quality_is_given_up(
    saved: Path, calibrated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("elit.serving.engine.measure_costs", None)
    monkeypatch.setattr("elit.commands.serve.measure_costs", None)
    options: dict[str, Any] = {"model": str(saved), "device": "cpu", "calibration": calibrated, "steps": 16}
    engine = make_pipeline(ServeOptions(**options)).engine
    engine.warm_up()
    known = Calibration.load(calibrated)
    assert engine.costs is not None
    assert [engine.costs.forward({level: 4}) for level in known.levels] == known.seconds
    points = make_pipeline(ServeOptions(**options, min_steps=6)).engine.options.points
    assert points is not None and points[-1] == OperatingPoint(4) and min(point.steps for point in points) == 6 / 16


def test_without_a_calibration_that_order_is_measured(saved: Path) -> None:
    engine = make_pipeline(ServeOptions(model=str(saved), device="cpu", steps=4, min_steps=2, min_budget=0.5)).engine
    points = engine.options.points
    assert points is not None and points[-1] == OperatingPoint(4)
    assert min(point.steps for point in points) == 0.5  # levels may drop out: the order is measured


def test_a_calibration_that_does_not_fit_is_refused(
    saved: Path, calibrated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(model: Path, file: Path, *options: str) -> str:
        told = ["serve", "--port", "0", "--device", "cpu", "--model", str(model), "--calibration", str(file)]
        assert main([*told, *options]) == 2
        return capsys.readouterr().err

    tiny(seed=1).save_pretrained(tmp_path / "other")
    assert "was measured with another model" in said(tmp_path / "other", calibrated)
    assert "was measured with another solver" in said(saved, calibrated, "--solver", "heun")
    assert "with the guidance none, and" in said(saved, calibrated, "--min-steps", "4", "--guidance-scale", "2")
    (tmp_path / "broken.json").write_text("{}")
    assert "is no calibration" in said(saved, tmp_path / "broken.json")
    assert "no-such-file" in said(saved, tmp_path / "no-such-file")


def test_wrong_options_end_with_2(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*options: str) -> str:
        assert main(["serve", "--model", str(saved), *options]) == 2
        return capsys.readouterr().err

    (tmp_path / "names.txt").write_text("one\ntwo\n")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert "cannot listen" in said("--port", str(taken.getsockname()[1]))
    assert "cannot listen" in said("--host", "no such host")
    assert "port is 70000" in said("--port", "70000")
    assert "steps is 0" in said("--steps", "0")
    assert "min_steps is 41" in said("--min-steps", "41")
    assert "max_replicas needs replicas" in said("--max-replicas", "4")
    assert "has 2 lines; the model has 10 classes" in said("--port", "0", "--class-names", str(tmp_path / "names.txt"))
    assert "latency_objective" in said("--latency-objective-ms", "-1")
    assert "min_budget" in said("--min-budget", "2")
    assert main(["serve", "--model", "no-such-model", "--port", "0"]) == 2
