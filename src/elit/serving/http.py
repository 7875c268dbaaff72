"""The HTTP interface of a server: OpenAI's image API, health and metrics."""

import asyncio
import hmac
import json
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import StreamingResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from elit import __version__
from elit.errors import ElitError
from elit.serving import schema
from elit.serving.answers import Answer
from elit.serving.errors import RETRY_SECONDS, ApiError, api_error
from elit.serving.limits import BodyLimit
from elit.serving.metrics import Metrics
from elit.serving.parse import Defaults
from elit.serving.pipeline import Pictures
from elit.serving.request import EngineClosedError

T = TypeVar("T")

GENERATIONS = "/v1/images/generations"
LAST_STEP_SECONDS = 5.0  # in which the step that is running when the server closes should end
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": schema.ErrorResponse, "description": description}
    for status, description in {
        400: "A value that the model or the server refuses.",
        401: "The key is missing or wrong.",
        404: "There is no such model.",
        408: "The body took too long to arrive.",
        413: "The body is too large.",
        422: "A field is missing.",
        429: "The queue is full, or the image would come too late; Retry-After says when to try again.",
        500: "The image could not be made.",
        503: "The server is starting or stopping, or has failed, or the image was not finished in time.",
    }.items()
}


@dataclass(frozen=True)
class HttpOptions:
    """Limits of the HTTP interface.

    Attributes:
        api_key: clients must send it as a bearer token; None lets everybody in.
        max_body_bytes: the largest body of a request.
        body_seconds: how long a body may take to arrive.
        request_seconds: how long an answer may take, the wait in the queue included.
        drain_seconds: how long what was accepted may go on when the server stops.
    """

    api_key: str | None = None
    max_body_bytes: int = 256 * 1024
    body_seconds: float = 10.0
    request_seconds: float = 600.0
    drain_seconds: float = 60.0


def create_app(pictures: Pictures, defaults: Defaults | None = None, options: HttpOptions | None = None) -> FastAPI:
    """Makes the application that serves a model.

    Args:
        pictures: makes the pictures; it is started and closed with the application.
        defaults: what requests get where they say nothing.
        options: limits, and the key.
    """
    defaults, options = defaults or Defaults(), options or HttpOptions()
    service = Service(pictures, defaults, options)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await pictures.start()
        yield
        await service.drain()
        await pictures.close(drain=False, timeout=LAST_STEP_SECONDS)

    app = FastAPI(
        title="ELIT",
        version=__version__,
        summary="Images at a budget that follows the load.",
        lifespan=lifespan,
        docs_url=None,  # the viewers that FastAPI has load their scripts from elsewhere
        redoc_url=None,
    )
    app.state.service = service
    app.include_router(service.router())
    app.add_middleware(BodyLimit, max_bytes=options.max_body_bytes, seconds=options.body_seconds)
    app.add_middleware(CountResponses, service=service)

    async def answer(_: Request, error: Exception) -> Response:
        return api_error(error).response()

    for kind in (ApiError, ElitError, EngineClosedError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, answer)
    return app


class Service:
    """Answers the requests of an application.

    Attributes:
        is_draining: whether new images are refused, because the server stops.
        open_answers: number of requests for images that are being answered.
    """

    def __init__(self, pictures: Pictures, defaults: Defaults, options: HttpOptions) -> None:
        self.pictures, self.defaults, self.options = pictures, defaults, options
        self.metrics = Metrics(pictures.status)
        pictures.observers.append(self.metrics)
        self.is_draining = False
        self._drained_by = math.inf
        self.open_answers = 0
        self.created = int(time.time())

    async def drain(self) -> None:
        """Refuses new images, and waits until those that were accepted are delivered, or the time for it is over."""
        self.is_draining = True
        self._drained_by = min(self._drained_by, time.monotonic() + self.options.drain_seconds)
        while time.monotonic() < self._drained_by:
            status = self.pictures.status()
            if not (self.open_answers or (status.alive and status.queued + status.in_flight)):
                return
            await asyncio.sleep(0.02)

    def give_up(self) -> None:
        """Ends :meth:`drain` at once."""
        self._drained_by = -math.inf

    def router(self) -> APIRouter:
        """Returns the routes."""
        router = APIRouter()
        guarded = APIRouter(dependencies=[Depends(self.check_key)], responses=ERRORS)
        guarded.post(GENERATIONS, response_model=schema.ImagesResponse, summary="Make images")(self.generate)
        guarded.get("/v1/models", summary="List the models")(self.models)
        guarded.get("/v1/models/{name:path}", summary="Describe a model")(self.model)
        methods = ["GET", "POST", "PUT", "PATCH", "DELETE"]
        guarded.api_route("/v1/{path:path}", methods=methods, include_in_schema=False)(self.nothing)
        router.include_router(guarded)
        router.get("/health", summary="Say whether the server takes requests", response_model=schema.Health)(
            self.health
        )
        router.get("/metrics", summary="Metrics for Prometheus", response_class=Response)(self.read_metrics)
        return router

    async def check_key(
        self, given: Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))]
    ) -> None:
        """Refuses a request without the key, where there is one."""
        key = self.options.api_key
        if key is not None and not (given and hmac.compare_digest(given.credentials.encode(), key.encode())):
            raise ApiError(401, "the API key is missing or wrong; send it as a bearer token", "invalid_api_key")

    # -------------------------------------------------------------------------------------------- the routes

    async def generate(self, body: schema.ImagesRequest, request: Request) -> Any:
        """Makes `n` images. Under load, images without a fixed budget run at lower ones; the answer says at which."""
        self.check_ready()
        self.check_model(body.model)
        if body.n > self.pictures.queue_limit:
            most = self.pictures.queue_limit
            raise ApiError(400, f"n is {body.n}; at most {most} images can wait here", "invalid_value", "n")
        wanted = self.defaults.wanted(body, self.pictures.model, self.pictures.size)
        answer = Answer(body, wanted, self.pictures, self.defaults.name)
        if body.stream:
            return await EventStream.begin(answer, self.options.request_seconds)
        async with answer:
            await answer.submit()
            return await unless_disconnected(request, asyncio.wait_for(answer.response(), self.options.request_seconds))

    async def models(self) -> schema.ModelList:
        """Lists the one model of this server."""
        return schema.ModelList(data=[self.card()])

    async def model(self, name: str) -> schema.ModelCard:
        """Describes the model."""
        self.check_model(name)
        return self.card()

    async def nothing(self) -> None:
        """Refuses a path that does not exist."""
        raise ApiError(404, f"there is no such path or method; images come from POST {GENERATIONS}")

    async def health(self, response: Response) -> schema.Health:
        """Says whether the server takes requests: 200 if it does, else 503."""
        health = self.read_health()
        response.status_code = 200 if health.status == "ok" else 503
        return health

    async def read_metrics(self) -> Response:
        """Returns the metrics."""
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    # -------------------------------------------------------------------------------------------- what they tell

    def check_ready(self) -> None:
        """Refuses images while the server starts or stops, or when it has failed."""
        status = self.pictures.status()
        if self.is_draining or not status.ready:
            how = "is stopping" if self.is_draining else "is starting" if status.alive else "has failed"
            raise ApiError(503, f"the server {how}; try again later", "unavailable", retry=RETRY_SECONDS)

    def check_model(self, name: str | None) -> None:
        """Refuses requests for another model."""
        if name not in (None, self.defaults.name):
            raise ApiError(
                404, f"there is no such model; this server has {self.defaults.name}", "model_not_found", "model"
            )

    def card(self) -> schema.ModelCard:
        """Describes the model."""
        model, (width, height) = self.pictures.model, self.pictures.size
        return schema.ModelCard(
            id=self.defaults.name,
            created=self.created,
            size=f"{width}x{height}",
            budgets=[level / model.num_latents for level in model.levels],
            classes=model.config.num_classes or None,
            takes_text=model.takes_text,
        )

    def read_health(self) -> schema.Health:
        """Returns how the server is."""
        status = self.pictures.status()
        stuck = status.stuck_since is not None
        state: schema.State = "dead" if not status.alive else "stuck" if stuck else "ok" if status.ready else "starting"
        return schema.Health(
            status="draining" if self.is_draining and state in ("ok", "starting") else state,
            live=status.alive and not stuck,
            ready=status.ready and not stuck and not self.is_draining,
            waiting=status.queued,
            in_flight=status.in_flight,
            seconds_in_step=None if status.stuck_since is None else time.time() - status.stuck_since,
        )


class EventStream(StreamingResponse):
    """Sends the events of an answer as server-sent events, and cancels what is left when the client goes away."""

    def __init__(self, answer: Answer, seconds: float) -> None:
        self.lines = self._lines()
        super().__init__(self.lines, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.answer, self.seconds = answer, seconds

    @classmethod
    async def begin(cls, answer: Answer, seconds: float) -> "EventStream":
        """Submits the images, so that a refusal is an ordinary answer and no event."""
        try:
            await answer.submit()
        except BaseException:
            await answer.__aexit__()
            raise
        return cls(answer, seconds)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self.answer, aclosing(self.lines):  # the images of an answer can be closed when nobody reads them
            await super().__call__(scope, receive, send)

    async def _lines(self) -> AsyncGenerator[str]:
        deadline = asyncio.get_running_loop().time() + self.seconds
        try:
            async with aclosing(self.answer.events()) as events:
                while True:
                    async with asyncio.timeout_at(deadline):
                        event = await anext(events)
                    yield f"event: {event.type}\ndata: {event.model_dump_json()}\n\n"
        except StopAsyncIteration:
            return
        except Exception as error:
            yield f"event: error\ndata: {json.dumps(api_error(error).body)}\n\n"


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, T]) -> T | Response:
    """Returns the result of some work, which is cancelled when the client goes away."""

    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, gone = asyncio.create_task(work), asyncio.create_task(disconnected())
    try:
        await asyncio.wait((working, gone), return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else Response(status_code=499)  # nobody reads it
    finally:
        working.cancel()
        gone.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


class CountResponses:
    """Counts the answers of an application by path and status, and those that are being given."""

    PATHS = (GENERATIONS, "/v1/models", "/health", "/metrics")

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in self.PATHS else "other"

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.service.metrics.responses.labels(path, message["status"]).inc()
            await send(message)

        self.service.open_answers += path == GENERATIONS
        try:
            await self.app(scope, receive, counted)
        finally:
            self.service.open_answers -= path == GENERATIONS
