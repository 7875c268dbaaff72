"""The engine: one thread that owns the device and advances whatever is in flight, one batch at a time."""

import asyncio
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Self

import torch

from elit.analysis.calibration import Calibration
from elit.errors import ElitError
from elit.flow import Trajectory, advance, trajectories
from elit.interface import check_budget
from elit.models import Model
from elit.serving.request import (
    EngineClosedError,
    Event,
    Failed,
    Finished,
    NotFiniteError,
    OnEvent,
    Preview,
    QueueFull,
    Request,
    check_seconds,
)
from elit.serving.scheduler import Job, Scheduler

logger = logging.getLogger(__name__)

EXIT_GRACE = 1.0  # seconds between the death of the engine's thread and the end of the process, to send answers


@dataclass(frozen=True)
class EngineOptions:
    """Settings of an engine.

    Attributes:
        latency_objective: seconds from submission to the finished image that 95 % of the images should keep; None
            leaves every image at the highest budget.
        min_budget: the floor below which the controller never goes; None is the lowest that was trained.
        queue_limit: how many requests may wait for their first step; more are refused with :class:`QueueFull`.
        max_work: the most work in one batch, in units of one full-budget evaluation of one image; None is chosen by
            :meth:`Engine.warm_up`.
        stuck_after: seconds after which a step that has not ended counts as stuck.
        exit_on_death: whether the process ends when the engine's thread dies of an error.
        path: ``linear`` or ``cosine``, as the model was trained.

    Raises:
        ElitError: a value out of range.
    """

    latency_objective: float | None = None
    min_budget: float | None = None
    queue_limit: int = 1024
    max_work: float | None = None
    stuck_after: float = 30.0
    exit_on_death: bool = False
    path: str = "linear"

    def __post_init__(self) -> None:
        if self.latency_objective is not None:
            check_seconds("latency_objective", self.latency_objective)
        if self.min_budget is not None:
            check_budget(self.min_budget, "min_budget")
        if type(self.queue_limit) is not int or self.queue_limit < 1:
            raise ElitError(f"queue_limit is {self.queue_limit!r}; it must be a whole number, at least 1")
        if self.max_work is not None and not self.max_work > 0:
            raise ElitError(f"max_work is {self.max_work!r}; it must be a number above 0")
        check_seconds("stuck_after", self.stuck_after)


@dataclass(frozen=True)
class EngineStatus:
    """Tells how an engine is at one moment.

    Attributes:
        ready: whether it takes requests: it is warm, alive and not closing.
        alive: whether its thread runs.
        stuck_since: when the present step began, in seconds since the epoch, where that is longer ago than
            ``stuck_after``; None else.
        queued: requests that wait for their first step.
        in_flight: requests between their first and their last step.
        budget: what the controller gives at present to requests without a budget of their own.
        delivered: how many steps of how many images were done so far, by budget.
        step_seconds: of the last batch.
        finished, failed, cancelled, refused: requests so far.
    """

    ready: bool
    alive: bool
    stuck_since: float | None
    queued: int
    in_flight: int
    budget: float
    delivered: dict[float, int]
    step_seconds: float | None
    finished: int
    failed: int
    cancelled: int
    refused: int


class Observer:
    """Is told what an engine does, in its thread (``refused`` and ``cancelled`` in the caller's); for metrics.

    Override what you need. Calls should be quick: the engine waits for them.
    """

    def stepped(self, seconds: float, budgets: Sequence[float]) -> None:
        """One batch took so many seconds; ``budgets`` has that of every image in it."""

    def finished(self, request: Request, result: Finished) -> None:
        """One image is finished."""

    def failed(self, request: Request, error: Exception) -> None:
        """One request failed."""

    def cancelled(self, request: Request) -> None:
        """One request was cancelled."""

    def refused(self, request: Request) -> None:
        """One request found the queue full."""


@dataclass(eq=False)
class Ticket:
    """Stands for one request that an engine took."""

    request: Request
    _cancel: Callable[["Ticket"], bool]
    _on_event: OnEvent
    _job: Job
    _trajectory: Trajectory | None = None
    _previews: set[int] = field(default_factory=set)

    def cancel(self) -> bool:
        """Takes the request back; its rows are gone by the next step.

        No event is sent afterwards, but for one that is being sent at this moment.

        Returns:
            Whether there was anything to cancel: False after the request finished, failed or was cancelled before.
        """
        return self._cancel(self)


class Engine:
    """Makes images on request, many at a time, in a thread of its own.

        with Engine(model, EngineOptions(latency_objective=2.0)) as engine:
            async for event in engine.generate(Request(label=3, seed=7)):
                ...

    Args:
        model: any model of this library. From :meth:`start` on it belongs to the engine's thread.
        options: see :class:`EngineOptions`.
        calibration: the planner's measurement of this model on this machine, in place of :meth:`warm_up`'s.

    Attributes:
        observers: told of everything that happens; add yours before :meth:`start`.

    Raises:
        ElitError: options that do not fit the model.
    """

    def __init__(
        self, model: Model, options: EngineOptions | None = None, calibration: Calibration | None = None
    ) -> None:
        self.model = model
        self.options = options or EngineOptions()
        self.calibration = calibration
        self.observers: list[Observer] = []
        self._full, self._floor = model.level(None), model.level(self.options.min_budget)
        self._scheduler = Scheduler()
        self._tickets: dict[Job, Ticket] = {}
        self._changed = threading.Condition()  # guards everything that threads share
        self._thread: threading.Thread | None = None
        self._is_warm = self._is_closing = self._is_dead = False
        self._step_began: float | None = None
        self._step_seconds: float | None = None
        self._delivered: Counter[float] = Counter()
        self._counts: Counter[str] = Counter()

    # -------------------------------------------------------------------------------------------- life

    def start(self) -> Self:
        """Starts the engine's thread, which warms up and then takes requests; returns the engine."""
        if self._thread is not None:
            raise EngineClosedError("an engine starts once; make another")
        self._thread = threading.Thread(target=self._run, name="elit-engine", daemon=True)
        self._thread.start()
        return self

    def close(self, drain: bool = True, timeout: float | None = None) -> None:
        """Takes no more requests and ends the thread.

        Args:
            drain: finish what is queued and in flight first; else it fails with :class:`EngineClosedError`.
            timeout: seconds after which what is left fails all the same.
        """
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        if self._thread is not None and drain:
            self._thread.join(timeout)
        self._fail_all(EngineClosedError("the engine was closed before this image was finished"))
        if self._thread is not None and not drain:
            self._thread.join(timeout)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(drain=kind is None)

    def wait_until_ready(self, timeout: float | None = None) -> bool:
        """Waits until the engine is warm; returns whether it is."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_warm or self._is_dead or self._is_closing, timeout)
            return self._is_warm and not self._is_dead

    # -------------------------------------------------------------------------------------------- requests

    def submit(self, request: Request, on_event: OnEvent) -> Ticket:
        """Asks for an image; ``on_event`` is called in the engine's thread with every event and should be quick.

        An exception in ``on_event`` cancels the request.

        Raises:
            ElitError: the request does not fit the model.
            QueueFull: too many requests wait already.
            EngineClosedError: the engine is closing, or its thread is dead.
        """
        request.check(self.model)
        now = time.monotonic()
        objective = request.latency_objective or self.options.latency_objective or 0.0
        job = Job(now, now + objective, request.steps, self.model.level(request.budget))
        ticket = Ticket(request, self._cancel, on_event, job, _previews=request.preview_steps())
        with self._changed:
            if self._is_closing or self._is_dead:
                raise EngineClosedError("the engine takes no more requests")
            if (queued := self._scheduler.queued) < self.options.queue_limit:
                self._scheduler.add(job)
                self._tickets[job] = ticket
                self._changed.notify_all()
                return ticket
            self._counts["refused"] += 1
        self._observe("refused", request)
        raise QueueFull(queued, retry_after=1.0)

    async def generate(self, request: Request) -> AsyncIterator[Event]:
        """Yields the events of one request; the last is :class:`Finished` or :class:`Failed`.

        Leaving the loop, or cancelling the task that runs it, cancels the request.

        Raises:
            ElitError, QueueFull, EngineClosedError: as for :meth:`submit`.
        """
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Event]()
        ticket = self.submit(request, lambda event: loop.call_soon_threadsafe(events.put_nowait, event))  # type: ignore[arg-type]
        try:
            while True:
                event = await events.get()
                yield event
                if not isinstance(event, Preview):
                    return
        finally:
            ticket.cancel()

    def _cancel(self, ticket: Ticket) -> bool:
        if not self._forget(ticket, "cancelled"):
            return False
        self._observe("cancelled", ticket.request)
        return True

    def _forget(self, ticket: Ticket, outcome: str) -> bool:
        """Takes a request out and counts what became of it; False if it was taken out before."""
        with self._changed:
            if self._tickets.pop(ticket._job, None) is None:
                return False
            self._scheduler.remove(ticket._job)
            self._counts[outcome] += 1
            self._changed.notify_all()
            return True

    # -------------------------------------------------------------------------------------------- status

    def status(self) -> EngineStatus:
        """Returns how the engine is at this moment; any thread may ask."""
        with self._changed:
            alive = self._thread is not None and self._thread.is_alive() and not self._is_dead
            running = 0.0 if self._step_began is None else time.monotonic() - self._step_began
            queued = self._scheduler.queued
            return EngineStatus(
                ready=alive and self._is_warm and not self._is_closing,
                alive=alive,
                stuck_since=time.time() - running if running > self.options.stuck_after else None,
                queued=queued,
                in_flight=len(self._scheduler) - queued,
                budget=self._budget(self._full),
                delivered=dict(self._delivered),
                step_seconds=self._step_seconds,
                **{name: self._counts[name] for name in ("finished", "failed", "cancelled", "refused")},
            )

    def _budget(self, level: int) -> float:
        return level / self.model.num_latents if level else 1.0

    def _observe(self, what: str, *told: object) -> None:
        for observer in self.observers:
            try:
                getattr(observer, what)(*told)
            except Exception:
                logger.exception("an observer of the engine failed")

    # -------------------------------------------------------------------------------------------- the thread

    def _run(self) -> None:
        try:
            with torch.no_grad():
                self.warm_up()
                with self._changed:
                    self._is_warm = True
                    self._changed.notify_all()
                while batch := self._next_batch():
                    self._step(batch)
        except BaseException as error:
            self._die(error)

    def _die(self, error: BaseException) -> None:
        """Tells everybody that the thread ends here."""
        logger.critical("the engine's thread died", exc_info=error)
        with self._changed:
            self._is_dead = True
            self._changed.notify_all()
        self._fail_all(EngineClosedError(f"the engine's thread died: {error!r}"))
        if self.options.exit_on_death:
            time.sleep(EXIT_GRACE)
            os._exit(1)

    def warm_up(self) -> None:
        """Runs the model once, before the first request."""
        (trajectory,) = trajectories(self.model, [0] if self.model.conditional else None, seeds=[0], steps=1)
        advance(self.model, [trajectory])

    def _next_batch(self) -> list[Ticket]:
        """Waits for requests and returns those of the next batch; none when the engine is closed and empty."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._scheduler) > 0 or self._is_closing)
            if not len(self._scheduler):
                return []
            self._step_began = time.monotonic()
            return [self._tickets[job] for job in self._scheduler.next_batch(self._step_began)]

    def _step(self, batch: Sequence[Ticket]) -> None:
        """Advances a batch by one evaluation and sends what there is to say of it."""
        batch = [ticket for ticket in batch if self._begin(ticket)]
        before = [self._trajectory(ticket).step for ticket in batch]
        batch_of = [self._trajectory(ticket) for ticket in batch]
        advance(self.model, batch_of)
        finite = [bool(trajectory.x.isfinite().all()) for trajectory in batch_of]  # waits for the device
        now = time.monotonic()
        budgets = [self._budget(ticket._job.level) for ticket in batch]
        with self._changed:
            assert self._step_began is not None
            self._step_seconds, self._step_began = now - self._step_began, None
            self._delivered.update(budgets)
        self._observe("stepped", self._step_seconds, budgets)
        for ticket, step, good in zip(batch, before, finite, strict=True):
            trajectory = self._trajectory(ticket)
            ticket._job.step = trajectory.step
            if not good:
                self._fail(ticket, NotFiniteError("the image became infinite or not a number"))
            elif trajectory.is_done:
                self._finish(ticket, now)
            elif trajectory.step > step and trajectory.step in ticket._previews:
                self._send(ticket, Preview(trajectory.step, trajectory.steps, trajectory.preview()[0].cpu()))

    def _begin(self, ticket: Ticket) -> bool:
        """Starts the trajectory of a request if it has none yet; returns whether it has one."""
        if ticket._trajectory is None:
            request = ticket.request
            try:
                (ticket._trajectory,) = trajectories(
                    self.model,
                    request.labels(),
                    seeds=[request.seed],
                    steps=request.steps,
                    solver=request.solver,
                    budget=request.budget,
                    guidance=request.guidance,
                    path=self.options.path,
                )
            except Exception as error:
                self._fail(ticket, error)
                return False
        return True

    def _trajectory(self, ticket: Ticket) -> Trajectory:
        assert ticket._trajectory is not None
        return ticket._trajectory

    def _finish(self, ticket: Ticket, now: float) -> None:
        trajectory, job = self._trajectory(ticket), ticket._job
        assert job.started is not None
        result = Finished(
            sample=trajectory.samples()[0].cpu(),
            budgets=tuple(self._budget(level) for (level,) in trajectory.levels),
            steps=trajectory.steps,
            seed=ticket.request.seed,
            queued=job.started - job.arrival,
            latency=now - job.arrival,
        )
        if self._forget(ticket, "finished"):
            self._observe("finished", ticket.request, result)
            self._tell(ticket, result)

    def _fail(self, ticket: Ticket, error: Exception) -> None:
        if self._forget(ticket, "failed"):
            self._observe("failed", ticket.request, error)
            self._tell(ticket, Failed(error))

    def _fail_all(self, error: Exception) -> None:
        with self._changed:
            tickets = list(self._tickets.values())
        for ticket in tickets:
            self._fail(ticket, error)

    def _send(self, ticket: Ticket, event: Event) -> None:
        """Sends an event of a request that goes on; one whose receiver fails is cancelled."""
        with self._changed:
            if ticket._job not in self._tickets:
                return
        if not self._tell(ticket, event):
            ticket.cancel()

    def _tell(self, ticket: Ticket, event: Event) -> bool:
        try:
            ticket._on_event(event)
        except Exception as error:
            with suppress(Exception):
                logger.warning("the receiver of an event failed: %r", error)
            return False
        return True
