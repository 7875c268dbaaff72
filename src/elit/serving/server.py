"""Runs the application of a server on a socket, until a signal ends it."""

import signal
import socket
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from elit.errors import ElitError
from elit.serving.http import Service

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


def run(app: FastAPI, listening: socket.socket, drain_seconds: float, on_start: Callable[[], None]) -> None:
    """Serves an application until SIGTERM or Ctrl-C, and then delivers what was accepted before.

    Args:
        app: of :func:`elit.serving.http.create_app`.
        listening: a bound socket.
        drain_seconds: how long to go on with what was accepted.
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
    _Server(config, app.state.service, drain_seconds, on_start).run(sockets=[listening])


def _exit(number: int, frame: FrameType | None) -> None:
    raise SystemExit(0)


class _Server(uvicorn.Server):
    """A server that delivers what it has accepted before it closes connections."""

    def __init__(
        self, config: uvicorn.Config, service: Service, drain_seconds: float, on_start: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self.service, self.drain_seconds, self.on_start = service, drain_seconds, on_start

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self.on_start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()  # no new connections
        await self.service.drain(self.drain_seconds)
        for connection in list(self.server_state.connections):
            transport: Any = connection.transport
            transport.close()  # pages that are open somewhere keep theirs for ever
        await super().shutdown(sockets)
