"""Runs the application of a server on a socket, until a signal ends it."""

import logging
import os
import signal
import socket
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from elit.errors import ElitError
from elit.serving.http import LAST_STEP_SECONDS, Service
from elit.serving.pipeline import Pipeline

logger = logging.getLogger(__name__)

KEEP_ALIVE_SECONDS = 30  # for which an idle connection stays open
MAX_CONNECTIONS = 4096


def open_socket(host: str, port: int) -> socket.socket:
    """Opens the socket that a server listens on; port 0 is any that is free.

    Raises:
        ElitError: the address is wrong or taken.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        opened = socket.socket(family)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind((host, port))
    except (OSError, OverflowError) as error:
        raise ElitError(f"cannot listen on {host} port {port} ({error}); take another --host or --port") from error
    return opened


def run(app: FastAPI, listening: socket.socket, on_start: Callable[[], None]) -> None:
    """Serves an application until SIGTERM or Ctrl-C, and then delivers what was accepted before.

    A second Ctrl-C gives up what is not delivered. If a step never ends, the process ends without it, with 1.

    Args:
        app: of :func:`elit.serving.http.create_app`.
        listening: a bound socket.
        on_start: called when connections are accepted.

    Raises:
        SystemExit: with 0, after SIGTERM.
    """
    config = uvicorn.Config(
        app,
        log_level="warning",
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=5,
        limit_concurrency=MAX_CONNECTIONS,
        server_header=False,
    )
    signal.signal(signal.SIGTERM, _exit)  # uvicorn raises the signal again when it has stopped
    service: Service = app.state.service
    try:
        _Server(config, service, on_start).run(sockets=[listening])
    except (SystemExit, KeyboardInterrupt):
        if isinstance(service.pictures, Pipeline) and service.pictures.status().alive:
            logger.error("a step has not ended; the process ends without it")
            os._exit(1)  # an ordinary exit may wait for the step's thread, or crash on it
        raise


def _exit(number: int, frame: FrameType | None) -> None:
    raise SystemExit(0)


class _Server(uvicorn.Server):
    """A server that delivers what it has accepted before it closes connections."""

    def __init__(self, config: uvicorn.Config, service: Service, on_start: Callable[[], None]) -> None:
        super().__init__(config)
        self.service, self.on_start = service, on_start

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        if self.force_exit:  # a second Ctrl-C
            self.service.give_up()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self.on_start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()  # no new connections
        await self.service.drain()
        for connection in list(self.server_state.connections):
            transport: Any = connection.transport
            transport.close()  # pages that are open somewhere keep theirs for ever
        await super().shutdown(sockets)
        if self.force_exit:  # then uvicorn leaves the application as it is
            await self.service.pictures.close(drain=False, timeout=LAST_STEP_SECONDS)
