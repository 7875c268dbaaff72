"""Nonsense over HTTP: it is refused, nothing fails of it, and nothing of it is left behind."""

import json
import logging
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from elit.serving.http import HttpOptions
from elit.serving.pipeline import Pipeline
from elit.serving.schema import ImagesRequest
from tests.helpers.models import tiny
from tests.helpers.servers import pipeline_of, serving, wait_until

PATH = "/v1/images/generations"
REFUSED = {400, 401, 404, 405, 408, 413, 415, 422, 429}

# ------------------------------------------------------------------------------------------------ nonsense

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
numbers = st.integers(-3, 12) | st.sampled_from([2**31, 2**63, 2**64, -(2**63), 10**400]) | st.floats()
fractions = st.floats(0, 1) | st.sampled_from([0.25, 0.5, 1.0, 1e-300, 5e-324]) | numbers
LIKELY: dict[str, Any] = {
    "prompt": st.sampled_from(["3", " 4 ", "10", "-1", "3.0", "", "\ud800", "\0", "٣", "9" * 5000]) | st.text(),
    "labels": st.integers(-2, 12) | st.lists(st.integers(-2, 12), max_size=4),
    "n": st.integers(-1, 12),
    "size": st.sampled_from(["auto", "8x8", "8x9", "0x0", "x", "1000000x1000000"]),
    "quality": st.sampled_from(["low", "medium", "high", "auto", "xhigh", "hd"]),
    "output_format": st.sampled_from(["png", "jpeg", "webp", "gif", ""]),
    "output_compression": st.integers(-1, 101),
    "steps": st.integers(-1, 9) | numbers,
    "seed": numbers,
    "solver": st.sampled_from(["euler", "heun", "sde", "ode"]),
    "budget": fractions,
    "min_budget": fractions,
    "guidance": st.sampled_from(["none", "cfg", "ccfg", "ag", "x"]),
    "guidance_scale": numbers | st.floats(0, 100),
    "guidance_budget": fractions,
    "stream": st.booleans(),
    "partial_images": st.integers(-1, 4),
    "model": st.sampled_from(["tiny", "other", ""]),
}
fields = st.fixed_dictionaries(
    {}, optional={name: LIKELY.get(name, anything) | anything for name in ImagesRequest.model_fields}
)
almost_good = st.fixed_dictionaries(
    {"prompt": st.sampled_from(["3", "7"])},
    optional={
        "n": st.integers(1, 4),
        "steps": st.integers(1, 6),
        "quality": st.sampled_from(["low", "auto"]),
        "stream": st.booleans(),
        "partial_images": st.integers(0, 3),
        "guidance_scale": st.floats(0, 100),
        "min_budget": st.floats(0, 1),
        "solver": LIKELY["solver"],
    },
)
bodies = st.one_of(almost_good, almost_good, fields, anything).map(lambda body: json.dumps(body).encode())


@st.composite
def broken_bodies(draw: st.DrawFn) -> bytes:
    """A body with bytes cut out, put in or changed; or nothing but bytes."""
    body = bytearray(draw(bodies | st.binary(max_size=60)))
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(body)))
        body[at : at + draw(st.integers(0, 4))] = draw(st.binary(max_size=4))
    return bytes(draw(st.sampled_from([body, b"[" * 20_000, b'{"prompt":' * 5_000, b'{"n":' + b"9" * 9_000 + b"}"])))


@st.composite
def broken_requests(draw: st.DrawFn) -> bytes:
    """What may come through a socket: almost HTTP."""
    body = draw(broken_bodies())[:2_000]
    method = draw(st.sampled_from([b"POST", b"GET", b"PUT", b"OPTIONS", b"post", b""]) | st.binary(max_size=4))
    paths = [PATH.encode(), b"/v1/models/%00", b"/health", b"/%ff/..", b"*"]
    path = draw(st.sampled_from(paths) | st.binary(max_size=9))
    length = draw(st.sampled_from([str(len(body)).encode(), b"0", b"-1", b"1e3", b"99999999999999999999"]))
    headers = [b"Host: x", b"Content-Type: application/json", b"Content-Length: " + length]
    odd = [b"Transfer-Encoding: chunked", b"Expect: 100-continue", b"Connection: Upgrade", b"Upgrade: websocket"]
    headers += draw(st.lists(st.sampled_from(odd) | st.binary(max_size=20), max_size=2))
    data = bytearray(b"%s %s HTTP/1.1\r\n%s\r\n\r\n%s" % (method, path, b"\r\n".join(headers), body))
    for _ in range(draw(st.integers(0, 2))):
        at = draw(st.integers(0, len(data)))
        data[at : at + draw(st.integers(0, 3))] = draw(st.binary(max_size=3))
    return bytes(data)


# ------------------------------------------------------------------------------------------------ the server


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return pipeline_of(tiny(), queue_limit=30)


@pytest.fixture(scope="module")
def address(pipeline: Pipeline) -> Iterator[str]:
    with serving(pipeline, HttpOptions(body_seconds=1.0), max_steps=6, steps=2) as address:
        yield address


class Errors(logging.Handler):
    """Keeps what is logged as an error; tracebacks are."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(self.format(record))


@contextmanager
def nothing_left(pipeline: Pipeline) -> Iterator[None]:
    """Counts rows, queues, threads and open files before and afterwards, and what was logged in between."""

    def idle() -> bool:
        status = pipeline.status()
        return status.queued + status.in_flight == 0

    def files() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    errors, files_before, threads_before = Errors(), files(), threading.active_count()
    loggers = [logging.getLogger(name) for name in ("", "uvicorn", "uvicorn.error", "asyncio")]
    for logger in loggers:
        logger.addHandler(errors)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(errors)
    wait_until(idle)
    wait_until(lambda: files() <= files_before, 20)
    assert pipeline.engine._tickets == {}
    assert threading.active_count() <= threads_before + 40  # of the pool that handles files, which stays
    assert errors.said == []


def fuzz(count: int, check: Callable[[bytes], None], nonsense: Any) -> None:
    """Calls a check with so many pieces of nonsense."""

    @settings(max_examples=count, database=None, suppress_health_check=list(HealthCheck))
    @given(nonsense)
    def run(data: bytes) -> None:
        check(data)

    run()


def fuzz_bodies(address: str, count: int) -> Counter[int]:
    """Sends bodies and returns how often each status came back."""
    statuses = Counter[int]()
    with httpx.Client(base_url=address, timeout=30) as client:

        def check(body: bytes) -> None:
            answer = client.post(PATH, content=body, headers={"content-type": "application/json"})
            statuses[answer.status_code] += 1
            assert answer.status_code in REFUSED | {200}, answer.text
            assert "Traceback" not in answer.text
            if answer.status_code != 200:
                assert answer.json()["error"]["message"]
            elif answer.headers["content-type"].startswith("text/event-stream"):
                assert "event: error" not in answer.text
            else:
                assert answer.json()["data"]

        fuzz(count, check, bodies | broken_bodies())
    return statuses


def fuzz_sockets(address: str, count: int) -> Counter[int]:
    """Sends bytes and returns how often each status came back, 0 where nothing did."""
    host, port = address.removeprefix("http://").split(":")
    statuses = Counter[int]()

    def check(data: bytes) -> None:
        with socket.create_connection((host, int(port)), timeout=20) as client:
            client.sendall(data)
            client.shutdown(socket.SHUT_WR)
            answer = b""
            while part := client.recv(65536):
                answer += part
        answer = answer.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n")
        status = int(answer[9:12]) if answer else 0
        statuses[status] += 1
        assert status in REFUSED | {0, 200, 204, 307}, answer[:2000]
        assert b"Traceback" not in answer

    fuzz(count, check, broken_requests())
    return statuses


def test_nonsense_is_refused_and_leaves_nothing(pipeline: Pipeline, address: str) -> None:
    httpx.get(address + "/health")
    with nothing_left(pipeline):
        statuses = fuzz_bodies(address, 150)
        fuzz_sockets(address, 100)
    assert statuses[400] and statuses[200]
    assert httpx.post(address + PATH, json={"prompt": "3"}).status_code == 200


@pytest.mark.slow
def test_5000_pieces_of_nonsense(pipeline: Pipeline, address: str) -> None:
    httpx.get(address + "/health")
    with nothing_left(pipeline):
        statuses, raw = fuzz_bodies(address, 3500), fuzz_sockets(address, 1500)
    print(f"bodies: {dict(statuses)}, sockets: {dict(raw)}")
    assert sum(statuses.values()) + sum(raw.values()) >= 5000
    assert httpx.post(address + PATH, json={"prompt": "3"}).status_code == 200
