"""Replicas of a model on a Ray cluster, which make pictures behind one HTTP interface."""

import asyncio
import logging
import os
import uuid
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

from elit.analysis import on_meta
from elit.errors import ElitError, first_line
from elit.models import Model
from elit.serving.costs import CostTable
from elit.serving.engine import EngineStatus, Observer
from elit.serving.pipeline import PartialPicture, Picture, PictureEvent, Pictures, Pipeline
from elit.serving.request import EngineClosedError, Finished, QueueFull, Request

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when ray is imported
os.environ.setdefault("RAY_worker_niceness", "0")  # replicas do not give way to other programs

import ray
from ray import serve
from ray.serve.exceptions import BackPressureError, RayServeException

logger = logging.getLogger(__name__)

ATTEMPTS = 3  # of one picture: what kills two replicas, and then a third one, may be the picture itself
RETRY_SECONDS = 1.0  # after which a full queue may be asked again
HEALTH_SECONDS = 2.0  # between looks at the health of a replica
LOCAL_MEMORY = 256 * 2**20  # bytes of the object store of a cluster that is started here; pictures are small

MakePipeline = Callable[[], Pipeline]


@dataclass(frozen=True)
class ReplicaOptions:
    """Settings of the replicas.

    Attributes:
        replicas: how many there are, and with ``max_replicas`` the fewest.
        max_replicas: how many there may be under load; None is always ``replicas``.
        target_requests: requests that wait or are in flight on each replica, which more replicas are started to keep.
        upscale_seconds, downscale_seconds: how long the load must be above or below that.
        queue_limit: how many requests a replica takes at once, and how many wait beside them; more are refused.
        cpus, gpus: what a replica needs.
        drain_seconds: how long a replica that is stopped may go on with what it has accepted.
        address: of a running cluster, such as auto; None starts one on this machine.

    Raises:
        ElitError: a number that is too small.
    """

    replicas: int = 2
    max_replicas: int | None = None
    target_requests: float = 8.0
    upscale_seconds: float = 10.0
    downscale_seconds: float = 300.0
    queue_limit: int = 1024
    cpus: float = 1.0
    gpus: float = 0.0
    drain_seconds: float = 60.0
    address: str | None = None

    def __post_init__(self) -> None:
        if self.replicas < 1:
            raise ElitError(f"replicas is {self.replicas}; it must be at least 1")
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ElitError(f"max_replicas is {self.max_replicas}; it must be at least replicas, {self.replicas}")

    def deployment(self) -> dict[str, Any]:
        """Returns these settings as Ray Serve takes them."""
        settings: dict[str, Any] = {
            "max_ongoing_requests": self.queue_limit,
            "max_queued_requests": self.queue_limit,
            "ray_actor_options": {"num_cpus": self.cpus, "num_gpus": self.gpus},
            "health_check_period_s": HEALTH_SECONDS,
            "graceful_shutdown_timeout_s": self.drain_seconds,
        }
        if self.max_replicas is None:
            return settings | {"num_replicas": self.replicas}
        scaling = {
            "min_replicas": self.replicas,
            "max_replicas": self.max_replicas,
            "target_ongoing_requests": self.target_requests,
            "upscale_delay_s": self.upscale_seconds,
            "downscale_delay_s": self.downscale_seconds,
        }
        return settings | {"autoscaling_config": scaling}


@dataclass(frozen=True)
class Description:
    """What the HTTP interface must know of a replica's model."""

    config: Any
    levels: tuple[int, ...]
    size: tuple[int, int]
    costs: CostTable | None
    pid: int


@dataclass(frozen=True)
class Failure:
    """Says why there will be no picture, as plain values, which any process can read."""

    kind: Literal["full", "wrong", "closed", "failed"]
    message: str
    retry_after: float = RETRY_SECONDS

    @classmethod
    def of(cls, error: Exception) -> "Failure":
        """Describes an error."""
        match error:
            case QueueFull():
                return cls("full", str(error), error.retry_after)
            case ElitError():
                return cls("wrong", str(error))
            case EngineClosedError():
                return cls("closed", str(error))
        return cls("failed", repr(error))

    def error(self) -> Exception:
        """Returns the error that was described."""
        match self.kind:
            case "full":
                return _queue_full(self.message, self.retry_after)
            case "wrong":
                return ElitError(self.message)
            case "closed":
                return EngineClosedError(self.message)
        return RuntimeError(self.message)


class ReplicaDiedError(RuntimeError):
    """Each replica died that tried to make a picture."""


class Replica:
    """One process with an engine of its own."""

    def __init__(self, make_pipeline: MakePipeline) -> None:
        self.pipeline = make_pipeline()
        self.pipeline.engine.start()
        self.pipeline.engine.wait_until_ready()

    async def generate(self, request: Request, prompt: str | None) -> AsyncGenerator[PictureEvent | Failure]:
        """Yields what :meth:`Pipeline.generate` does, and errors as :class:`Failure`."""
        try:
            async with aclosing(self.pipeline.generate(request, prompt)) as events:
                async for event in events:
                    yield event
        except Exception as error:
            yield Failure.of(error)

    def describe(self) -> Description:
        """Describes the model of this replica, and says which process it is."""
        pipeline = self.pipeline
        return Description(pipeline.model.config, pipeline.model.levels, pipeline.size, pipeline.costs, os.getpid())

    def check_health(self) -> None:
        """Raises an error if the engine is dead or stuck: the cluster then replaces this replica."""
        status = self.pipeline.status()
        if not status.alive or status.stuck_since is not None:
            raise RuntimeError("the engine is dead or stuck")


class Replicas(Pictures):
    """Makes pictures on replicas; each goes to the one of two that has fewer requests outstanding.

    A picture whose replica dies is made again on another one: the seed makes it the same. Its last attempt is made
    while no other has its last one, so that a picture that kills every replica does not take others with it.

    Args:
        make_pipeline: makes the pipeline of a replica, in its process.
        options: see :class:`ReplicaOptions`.

    Raises:
        ElitError: there is no cluster at the address, or a replica cannot be made.
    """

    def __init__(self, make_pipeline: MakePipeline, options: ReplicaOptions | None = None) -> None:
        self.make_pipeline, self.options = make_pipeline, options or ReplicaOptions()
        self.observers: list[Observer] = []
        self._counts: Counter[str] = Counter()
        self._delivered: Counter[float] = Counter()
        self._budget = 1.0
        self._waiting = self._in_flight = 0
        self._is_closed = False
        self._running, self._is_alive = self.options.replicas, True
        self._watching: asyncio.Task[None] | None = None
        self._last_attempt = asyncio.Lock()
        self.queue_limit = self.options.queue_limit
        self._app = f"elit-{uuid.uuid4().hex[:8]}"  # others may have theirs on the same cluster
        self._connected = not ray.is_initialized()
        self._owns_cluster = self._connected and self.options.address is None
        if self._connected:
            _connect(self.options)
        serve.start(proxy_location="Disabled")  # the HTTP interface is ours
        try:
            self._deploy()
        except RuntimeError as error:
            asyncio.run(self.close())
            reason = str(error).strip().splitlines()[-1]
            raise ElitError(f"the replicas could not be started: {reason}") from error
        self.description: Description = self._handle.describe.remote().result()
        self.model: Model = on_meta(self.description.config)
        if self.model.levels != self.description.levels:
            self.model.allow_untrained_levels()
        self.size = self.description.size

    def _deploy(self) -> None:
        """Starts the replicas or, where there are some, replaces them one after the other."""
        deployment = serve.deployment(**self.options.deployment())(Replica)
        self._handle = serve.run(deployment.bind(self.make_pipeline), name=self._app, route_prefix=None)

    @property
    def costs(self) -> CostTable | None:
        return self.description.costs

    async def start(self) -> None:
        """Watches the replicas from now on; they run already, for what they can do had to be asked first."""
        self._watching = asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        """Asks the cluster again and again how many replicas run; those whose engine is dead or stuck do not."""
        while True:
            self._running, self._is_alive = await asyncio.to_thread(self._look)
            await asyncio.sleep(HEALTH_SECONDS)

    def _look(self) -> tuple[int, bool]:
        """Returns how many replicas run, and whether there are or will be any."""
        try:
            application = serve.status().applications[self._app]
        except Exception as error:  # of many kinds: the cluster is gone
            logger.error("the cluster does not say how the replicas are: %s", str(error).strip().splitlines()[:1])
            return 0, False
        states = [pair for each in application.deployments.values() for pair in each.replica_states.items()]
        running = sum(count for state, count in states if state == "RUNNING")
        return running, running > 0 or application.status != "DEPLOY_FAILED"

    async def update(self) -> None:
        """Replaces the replicas by new ones, which load the weights again, while the others go on.

        If that fails, the log says so, and the replicas that there are go on.
        """
        logger.info("replacing the replicas")
        try:
            await asyncio.to_thread(self._deploy)
        except Exception as error:
            if not self._is_closed:  # the cluster is gone then
                logger.error("the replicas could not be replaced: %s", str(error).strip().splitlines()[-1])
            return
        logger.info("the replicas are new")

    async def close(self, drain: bool = True, timeout: float | None = None) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        if self._watching is not None:
            self._watching.cancel()
        if self._owns_cluster:
            await asyncio.to_thread(serve.shutdown)
        else:  # others may use the cluster
            await asyncio.to_thread(serve.delete, self._app)
        if self._connected:
            await asyncio.to_thread(ray.shutdown)

    def status(self) -> EngineStatus:
        return EngineStatus(
            ready=self._running > 0 and not self._is_closed,
            alive=self._is_alive,
            stuck_since=None,
            queued=self._waiting,
            in_flight=self._in_flight,
            budget=self._budget,
            delivered=dict(self._delivered),
            step_seconds=None,
            max_work=0.0,  # each replica has its own
            **{name: self._counts[name] for name in ("finished", "failed", "cancelled", "refused")},
        )

    async def generate(self, request: Request, prompt: str | None = None) -> AsyncGenerator[PictureEvent]:
        outcome, told = "cancelled", list[Any]()
        self._waiting += 1
        is_waiting = True
        try:
            async with aclosing(self._attempts(request, prompt)) as events:
                async for event in events:
                    if is_waiting:
                        is_waiting, self._waiting, self._in_flight = False, self._waiting - 1, self._in_flight + 1
                    if isinstance(event, Picture):
                        outcome, told = "finished", [self._finished(event)]
                    yield event
        except QueueFull:
            outcome = "refused"
            raise
        except Exception as error:
            outcome, told = "failed", [error]
            raise
        finally:
            self._waiting -= is_waiting
            self._in_flight -= not is_waiting
            self._counts[outcome] += 1
            for observer in self.observers:
                getattr(observer, outcome)(request, *told)

    async def _attempts(self, request: Request, prompt: str | None) -> AsyncGenerator[PictureEvent]:
        """Yields the events of one picture, which another replica makes from the beginning if the first one dies."""
        shown = -1
        for attempt in range(ATTEMPTS):
            turn = self._last_attempt if attempt == ATTEMPTS - 1 else nullcontext()
            async with turn, aclosing(self._attempt(request, prompt)) as events:
                async for event in events:
                    step = event.step if isinstance(event, PartialPicture) else 0
                    if isinstance(event, Picture) or step > shown:
                        shown = max(shown, step)
                        yield event
                    if isinstance(event, Picture):
                        return
            await asyncio.sleep(0.1 * 2**attempt)
        raise ReplicaDiedError(f"{ATTEMPTS} replicas died while they made this picture")

    async def _attempt(self, request: Request, prompt: str | None) -> AsyncGenerator[PictureEvent]:
        """Yields the events of one picture as one replica makes it; they end without a picture if it dies."""
        response: Any = self._handle.options(method_name="generate", stream=True).remote(request, prompt)
        try:
            async for event in response:
                if isinstance(event, Failure):
                    if event.kind == "closed":
                        return
                    raise event.error()
                yield event
        except BackPressureError as error:
            raise _queue_full("all replicas have as many requests as they take", RETRY_SECONDS) from error
        except (ray.exceptions.RayError, RayServeException) as error:  # errors of a picture come as a Failure
            logger.warning("a replica died while it made a picture: %s", first_line(error))
        finally:
            response.cancel()

    def _finished(self, picture: Picture) -> Finished:
        """Describes a picture to observers, and takes note of its budgets."""
        self._delivered.update(picture.budgets)
        self._budget = picture.budgets[-1]
        budgets, steps = picture.budgets, len(picture.budgets)
        return Finished(picture.pixels, budgets, steps, picture.seed, picture.queued, picture.latency)


def _queue_full(message: str, retry_after: float) -> QueueFull:
    error = QueueFull(0, retry_after)
    error.args = (message,)
    return error


def _connect(options: ReplicaOptions) -> None:
    """Connects to the cluster, or starts one on this machine."""
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
    if options.address is not None:
        try:
            ray.init(options.address, **quiet)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ElitError(f"there is no Ray cluster at {options.address} ({first_line(error)})") from error
        return
    most = options.max_replicas or options.replicas
    local: dict[str, Any] = {"include_dashboard": False, "object_store_memory": LOCAL_MEMORY}
    ray.init(num_cpus=max(1, round(most * options.cpus)), num_gpus=round(most * options.gpus), **local, **quiet)
