"""The engine: one thread that owns the device and advances whatever is in flight, one batch at a time."""

import asyncio
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Self

import torch

from elit.analysis.calibration import Calibration, choose_levels
from elit.errors import ElitError
from elit.flow import Trajectory, advance, trajectories, weak_level
from elit.flow.solvers import solver_named
from elit.interface import check_budget
from elit.models import Model
from elit.serving.controller import ControllerOptions
from elit.serving.costs import MEASURED_LEVELS, CostTable, is_out_of_memory, measure_costs
from elit.serving.job import Job
from elit.serving.points import OperatingPoint, points_at
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
from elit.serving.scheduler import Scheduler, SchedulerOptions

logger = logging.getLogger(__name__)

EXIT_GRACE = 1.0  # seconds between the death of the engine's thread and the end of the process, to send answers


@dataclass(frozen=True)
class EngineOptions:
    """Settings of an engine.

    Attributes:
        latency_objective: seconds from submission to the finished image that 95 % of the images should keep; None
            leaves every image at the highest budget.
        min_budget: the floor below which the controller never goes; None is the lowest that was trained.
        points: what the controller chooses from, from the cheapest to the best, such as
            :func:`~elit.serving.points.points_from` makes of a calibration; None is budgets alone.
        queue_limit: how many requests may wait for their first step; more are refused with :class:`QueueFull`.
        refuse_late: whether to refuse a request, likewise, that is predicted to come too close to its objective even at
            the cheapest point.
        max_work: the most work in one batch, in units of one full-budget evaluation of one image; None is the smallest
            batch of nearly the best throughput, as :meth:`Engine.warm_up` measures it.
        controller: how the budget follows the load, see :class:`ControllerOptions`.
        stuck_after: seconds after which a step that has not ended counts as stuck.
        exit_on_death: whether the process ends when the engine's thread dies of an error.
        path: ``linear`` or ``cosine``, as the model was trained.

    Raises:
        ElitError: a value out of range.
    """

    latency_objective: float | None = None
    min_budget: float | None = None
    points: tuple[OperatingPoint, ...] | None = None
    queue_limit: int = 1024
    refuse_late: bool = True
    max_work: float | None = None
    controller: ControllerOptions = field(default_factory=ControllerOptions)
    stuck_after: float = 30.0
    exit_on_death: bool = False
    path: str = "linear"

    def __post_init__(self) -> None:
        if self.latency_objective is not None:
            check_seconds("latency_objective", self.latency_objective)
        if self.min_budget is not None:
            check_budget(self.min_budget, "min_budget")
        if self.points is not None and not self.points:
            raise ElitError("points is empty; leave it out for budgets alone")
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
        max_work: the most work in one batch at present; running out of memory halves it.
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
    max_work: float
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


class Ticket:
    """Stands for one request that an engine took. ``cancel`` takes it back."""

    def __init__(self, request: Request, job: Job, on_event: OnEvent, cancel: Callable[["Ticket"], bool]) -> None:
        self.request, self.job, self.on_event = request, job, on_event
        self.previews: set[int] = set()
        self.started: Trajectory | None = None
        self._cancel = cancel

    @property
    def trajectory(self) -> Trajectory:
        """What was started of it; the engine's thread alone looks at it."""
        assert self.started is not None
        return self.started

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
        calibration: what was measured of this model on this machine before, by the planner or as
            :attr:`Engine.costs`; :meth:`warm_up` then measures nothing.
        scheduler: the class that decides what runs next.

    Attributes:
        costs: seconds by level and batch size, as :meth:`warm_up` measured them; None before.
        observers: told of everything that happens; add yours before :meth:`start`.

    Raises:
        ElitError: options that do not fit the model.
    """

    def __init__(
        self,
        model: Model,
        options: EngineOptions | None = None,
        calibration: Calibration | CostTable | None = None,
        scheduler: type[Scheduler] = Scheduler,
    ) -> None:
        self.model = model
        self.options = options or EngineOptions()
        self.calibration = calibration
        self.costs: CostTable | None = None
        self.observers: list[Observer] = []
        points = serving_points(model, self.options)
        self._scheduler = scheduler(
            CostTable.unmeasured(sorted({point.level for point in points})),
            SchedulerOptions(
                points=points,
                max_work=self.options.max_work or 1.0,
                latency_objective=self.options.latency_objective,
                queue_limit=self.options.queue_limit,
                refuse_late=self.options.refuse_late,
                controller=self.options.controller,
            ),
        )
        self._tickets: dict[Job, Ticket] = {}
        self._changed = threading.Condition()  # guards everything that threads share
        self._thread: threading.Thread | None = None
        self._is_warm = self._is_closing = self._is_dead = False
        self._step_began: float | None = None
        self._step_ended = 0.0
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
            timeout: seconds after which what is left fails all the same; a last step may take as long once more.
        """
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        if drain:
            self._join(timeout)
        self._fail_all(EngineClosedError("the engine was closed before this image was finished"))
        self._join(timeout)

    def _join(self, timeout: float | None) -> None:
        if self._thread is not None and self._thread is not threading.current_thread():
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
        job = new_job(request, self.model, time.monotonic())
        ticket = Ticket(request, job, on_event, self._cancel)
        with self._changed:
            wait = self._refusal(job)
            if wait is None:
                self._scheduler.add(job)
                self._tickets[job] = ticket
                self._changed.notify_all()
                return ticket
        raise self._refused(request, wait)

    def check_room(self, request: Request, beside: int = 0) -> None:
        """Raises what :meth:`submit` would raise of a request at this moment, before work is spent on its condition.

        Args:
            beside: how many others are about to be submitted.

        Raises:
            QueueFull, EngineClosedError: as for :meth:`submit`.
        """
        job = new_job(request, self.model, time.monotonic())
        with self._changed:
            wait = self._refusal(job, beside)
        if wait is not None:
            raise self._refused(request, wait)

    def _refusal(self, job: Job, beside: int = 0) -> float | None:
        if self._is_closing or self._is_dead:
            raise EngineClosedError("the engine takes no more requests")
        return self._scheduler.refusal(job, job.arrival, beside)

    def _refused(self, request: Request, wait: float) -> QueueFull:
        with self._changed:
            self._counts["refused"] += 1
            queued = self._scheduler.queued
        self._observe("refused", request)
        return QueueFull(queued, max(1.0, wait))

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
            if self._tickets.pop(ticket.job, None) is None:
                return False
            self._scheduler.remove(ticket.job)
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
                budget=self._budget(self._scheduler.point.level),
                delivered=dict(self._delivered),
                step_seconds=self._step_seconds,
                max_work=self._scheduler.max_work,
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
        """Measures what every level and batch size costs on this machine, once; :meth:`start` does it in its thread.

        A calibration, where the engine has one, saves the measuring.
        """
        if self._is_warm:
            return
        most = self.options.max_work
        with torch.no_grad():
            given = self.calibration
            if given is None:
                self.costs = measure_costs(self.model, self.options.path, most)
            else:
                self.costs = given if isinstance(given, CostTable) else CostTable.from_calibration(given)
        with self._changed:
            self._scheduler.set_costs(self.costs, most or self.costs.saturating_work())
            self._is_warm = True
            self._changed.notify_all()

    def _next_batch(self) -> list[Ticket]:
        """Waits for requests and returns those of the next batch; none when the engine is closed and empty."""
        with self._changed:
            is_busy = len(self._scheduler) > 0
            self._changed.wait_for(lambda: len(self._scheduler) > 0 or self._is_closing)
            if not len(self._scheduler):
                return []
            now = time.monotonic()
            self._step_began = (self._step_ended or now) if is_busy else now  # what lies between steps counts as well
            return [self._tickets[job] for job in self._scheduler.next_batch(now)]

    def _step(self, batch: Sequence[Ticket]) -> None:
        """Advances a batch by one evaluation and sends what there is to say of it."""
        begun = [ticket for ticket in batch if self._begin(ticket)]
        before = {ticket: ticket.trajectory.step for ticket in begun}
        advanced = self._advance(begun) if begun else []
        finite = are_finite([ticket.trajectory for ticket in advanced])  # waits for the device
        now = time.monotonic()
        budgets = [self._budget(ticket.job.level) for ticket in advanced]
        with self._changed:
            assert self._step_began is not None
            seconds, self._step_began, self._step_ended = now - self._step_began, None, now
            if not advanced:
                return
            self._step_seconds = seconds
            self._scheduler.advanced([ticket.job for ticket in advanced], seconds)
            self._delivered.update(budgets)
        self._observe("stepped", seconds, budgets)
        for ticket, good in zip(advanced, finite, strict=True):
            try:
                self._report(ticket, good, now, before[ticket])
            except torch.AcceleratorError:
                raise
            except Exception as error:  # out of memory, say: the others go on
                self._fail(ticket, error)

    def _report(self, ticket: Ticket, is_finite: bool, now: float, step_before: int) -> None:
        """Sends what there is to say of a request after an evaluation."""
        trajectory = ticket.trajectory
        if not is_finite:
            self._fail(ticket, NotFiniteError("the image became infinite or not a number on its way"))
        elif trajectory.is_done:
            self._finish(ticket, now)
        elif trajectory.step > step_before and trajectory.step in ticket.previews:
            self._send(ticket, Preview(trajectory.step, trajectory.steps, trajectory.preview()[0].cpu()))

    def _advance(self, batch: Sequence[Ticket]) -> list[Ticket]:
        """Does the next evaluation of a batch and returns those that had it.

        Where there is not enough memory, the next batches are half as large. Where something else goes wrong, each
        request is tried alone, and those for which it goes wrong again fail.
        """
        try:
            advance(self.model, [ticket.trajectory for ticket in batch])
            return list(batch)
        except torch.AcceleratorError:  # the device is lost, and so is the engine
            raise
        except Exception as error:
            if len(batch) == 1:
                self._fail(batch[0], error)
                return []
            if not is_out_of_memory(error):
                return [ticket for ticket in batch if self._advance([ticket])]
        logger.warning("out of memory with %d images in a batch: batches are half as large from now on", len(batch))
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()
        with self._changed:
            self._scheduler.halve_work([ticket.job for ticket in batch])
        return []

    def _begin(self, ticket: Ticket) -> bool:
        """Starts the trajectory of a request if it has none yet, and sets the level of its next step.

        A request whose trajectory cannot be started fails.
        """
        request, job = ticket.request, ticket.job
        if ticket.started is None:
            try:
                (ticket.started,) = trajectories(
                    self.model,
                    request.labels(),
                    seeds=[request.seed],
                    steps=job.steps,
                    solver=request.solver,
                    guidance=request.guidance,
                    path=self.options.path,
                )
            except Exception as error:
                self._fail(ticket, error)
                return False
            ticket.previews = request.preview_steps(job.steps)
        if ticket.trajectory.levels[job.step][0] != job.level and not job.step_has_begun:
            ticket.trajectory.set_level(job.level)
        return True

    def _finish(self, ticket: Ticket, now: float) -> None:
        trajectory, job = ticket.trajectory, ticket.job
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
            if ticket.job not in self._tickets:
                return
        if not self._tell(ticket, event):
            ticket.cancel()

    def _tell(self, ticket: Ticket, event: Event) -> bool:
        try:
            ticket.on_event(event)
        except Exception as error:
            with suppress(Exception):
                logger.warning("the receiver of an event failed: %r", error)
            return False
        return True


def serving_points(model: Model, options: EngineOptions) -> tuple[OperatingPoint, ...]:
    """Returns what a controller chooses from: by default the floor, and the levels above it whose cost is measured.

    Raises:
        ElitError: a floor, or the level of a point, that the model was not trained for.
    """
    floor = model.levels[0] if options.min_budget is None and model.levels else model.level(options.min_budget)
    if options.points is None:
        levels = (level for level in choose_levels(model.levels, MEASURED_LEVELS) if level > floor)
        return points_at((floor, *levels))
    for point in options.points:
        if point.level not in (model.levels or (0,)):
            raise ElitError(f"the point {point} has a level that the model was not trained for; it has {model.levels}")
    return tuple(replace(point, level=max(point.level, floor)) for point in options.points)


def new_job(request: Request, model: Model, now: float) -> Job:
    """Describes a request to the scheduler."""
    guidance, solver = request.guidance, solver_named(request.solver)
    guided = 0.0 if guidance is None else guidance.active(solver.times(request.steps)[:-1]).float().mean().item()
    return Job(
        arrival=now,
        steps=request.steps,
        level=model.level(request.budget),
        evaluations=solver.evaluations,
        budget_is_fixed=request.budget is not None,
        min_steps=request.min_steps,
        min_level=0 if request.min_budget is None else model.level(request.min_budget),
        weak="none" if guidance is None else guidance.kind,
        weak_level=0 if guidance is None else weak_level(model, guidance) or 0,
        guided=guided,
        latency_objective=request.latency_objective,
    )


def are_finite(flight: Sequence[Trajectory]) -> list[bool]:
    """Tells of each trajectory whether its state is finite."""
    if not flight:
        return []
    try:
        return list(torch.cat([trajectory.x for trajectory in flight]).flatten(1).isfinite().all(1).tolist())
    except torch.OutOfMemoryError:
        return [bool(trajectory.x.isfinite().all()) for trajectory in flight]
