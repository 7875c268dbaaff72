"""A server of the application under test: real sockets on a free port, in a thread of this process."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from elit.serving import Engine, EngineOptions
from elit.serving.costs import CostTable
from elit.serving.http import HttpOptions, create_app
from elit.serving.parse import Defaults
from elit.serving.pipeline import Pictures, Pipeline
from elit.serving.server import open_socket


@contextmanager
def running(app: Any) -> Iterator[str]:
    """Serves an application and yields its address."""
    listening = open_socket("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)
        listening.close()
        assert not thread.is_alive()


@contextmanager
def serving(pictures: Pictures, options: HttpOptions | None = None, **defaults: Any) -> Iterator[str]:
    """Serves pictures and yields the address, once requests are taken."""
    with running(create_app(pictures, Defaults(**{"name": "tiny", "steps": 4} | defaults), options)) as address:
        wait_until(lambda: pictures.status().ready)
        yield address


def pipeline_of(model: Any, autoencoder: Any = None, text_encoder: Any = None, **options: Any) -> Pipeline:
    """A model with an engine of its own, which takes every step to cost 1 ms and therefore measures nothing."""
    levels = model.levels or (0,)
    costs = CostTable(levels, (1, 16), ((1e-3, 1e-3),) * len(levels))
    return Pipeline(Engine(model, EngineOptions(**options), costs), autoencoder, text_encoder)


def wait_until(holds: Callable[[], bool], seconds: float = 30.0) -> None:
    """Waits until something holds; a test fails if it does not come to that."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)
