"""The engine: the same images as `elit.sample`, requests that come and go, and failures that stay alone."""

import asyncio
import gc
import queue
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import elit
from elit import ElitError, Guidance
from elit.serving import (
    Engine,
    EngineClosedError,
    EngineOptions,
    Event,
    Failed,
    Finished,
    NotFiniteError,
    Observer,
    Preview,
    QueueFull,
    Request,
)
from elit.serving.job import Job
from elit.serving.points import OperatingPoint
from elit.serving.scheduler import Scheduler
from tests.helpers.models import Recorder, inputs, tiny
from tests.helpers.stacks import KINDS

TOLERANCE = 2e-5
"""Of the largest value: float32 matrix kernels sum in another order at another batch size, over some steps."""


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny()


@pytest.fixture(scope="module")
def engine(model: Any) -> Iterator[Engine]:
    with Engine(model, EngineOptions(max_work=8)) as engine:
        assert engine.wait_until_ready(60)
        yield engine


class Inbox:
    """Submits requests and collects what comes back."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.events: queue.Queue[tuple[Request, Event]] = queue.Queue()

    def submit(self, request: Request) -> Any:
        return self.engine.submit(request, lambda event: self.events.put((request, event)))

    def ends(self, count: int) -> dict[Request, Finished | Failed]:
        """Waits until so many requests have ended, and returns how."""
        found: dict[Request, Finished | Failed] = {}
        while len(found) < count:
            request, event = self.events.get(timeout=30)
            if not isinstance(event, Preview):
                assert request not in found
                found[request] = event
        return found


def results(engine: Engine, requests: list[Request]) -> list[Finished]:
    """Submits all requests at once and returns what came out, in their order."""
    inbox = Inbox(engine)
    for request in requests:
        inbox.submit(request)
    ends = inbox.ends(len(requests))
    assert all(isinstance(end, Finished) for end in ends.values()), ends
    return [end for request in requests if isinstance(end := ends[request], Finished)]


def again(model: Any, request: Request, result: Finished) -> torch.Tensor:
    """The image of a result once more, offline and alone."""
    labels, budget = request.labels(), list(result.budgets)
    same: dict[str, Any] = {"steps": result.steps, "solver": request.solver, "guidance": request.guidance}
    return elit.sample(model, labels, seeds=[request.seed], budget=budget, **same)[0]


REQUESTS = [
    Request(3, seed=7, steps=4),
    Request(1, seed=8, steps=5, solver="heun", budget=0.25),
    Request(0, seed=9, steps=3, solver="sde", guidance=Guidance("ccfg", 2.0, 0.25)),
    Request(9, seed=10, steps=4, budget=0.5, guidance=Guidance("cfg", 1.5, interval=(0.2, 0.8))),
]


@pytest.mark.parametrize("request_", REQUESTS)
def test_an_image_that_is_alone_is_that_of_sample_to_the_bit(model: Any, engine: Engine, request_: Request) -> None:
    (result,) = results(engine, [request_])
    assert torch.equal(result.sample, again(model, request_, result))
    assert (result.seed, result.steps) == (request_.seed, request_.steps)
    assert result.budgets == (request_.budget or 1.0,) * request_.steps


def test_images_that_share_batches_are_those_of_sample(model: Any, engine: Engine) -> None:
    requests = [replace(request, seed=seed) for request in REQUESTS for seed in range(3)]
    for request, result in zip(requests, results(engine, requests), strict=True):
        expected = again(model, request, result)
        assert (result.sample - expected).abs().max() <= TOLERANCE * expected.abs().max()


class Swinging(Scheduler):
    """Gives another level before every batch."""

    def next_batch(self, now: float) -> list[Job]:
        points = self.options.points
        self.point = points[(points.index(self.point) + 1) % len(points)]
        self._batches_since = 0  # the controller is not asked
        return super().next_batch(now)


@pytest.mark.parametrize("solver", ["euler", "heun", "sde"])
def test_a_level_that_changes_on_the_way_is_delivered_as_it_says(model: Any, solver: str) -> None:
    with Engine(model, EngineOptions(max_work=8), scheduler=Swinging) as engine:
        request = Request(3, seed=7, steps=6, solver=solver, min_budget=0.5, guidance=Guidance("cfg", 2.0))
        (result,) = results(engine, [request])
    assert set(result.budgets) == ({0.5, 0.75} if solver == "heun" else {0.5, 0.75, 1.0})  # heun: every other batch
    assert torch.equal(result.sample, again(model, request, result))


def test_steps_that_are_left_open_are_settled_at_the_beginning(model: Any) -> None:
    points = (OperatingPoint(1, 0.5), OperatingPoint(4))
    with Engine(model, EngineOptions(max_work=8, points=points), scheduler=Swinging) as engine:
        fixed, *left_open = requests = [Request(3, seed=0, steps=6)] + [
            Request(3, seed=seed, steps=6, min_steps=2, previews=4) for seed in range(6)
        ]
        found = [results(engine, [request])[0] for request in requests]  # one by one: the point is another each time
    assert found[0].steps == len(found[0].budgets) == fixed.steps
    assert {result.steps for result in found[1:]} == {3, 6} and {len(result.budgets) for result in found} == {3, 6}
    for request, result in zip(left_open, found[1:], strict=True):
        assert torch.equal(result.sample, again(model, request, result))


def test_events_come_as_a_stream(model: Any, engine: Engine) -> None:
    async def collect() -> list[Event]:
        return [event async for event in engine.generate(Request(2, steps=6, previews=2))]

    *previews, last = asyncio.run(collect())
    assert [(event.step, event.steps) for event in previews if isinstance(event, Preview)] == [(2, 6), (4, 6)]
    assert isinstance(last, Finished) and last.sample.shape == (3, 8, 8)
    assert 0 <= last.queued <= last.latency


@pytest.mark.parametrize("kind", [*KINDS, "plain"])
def test_every_backbone_is_served(kind: str) -> None:
    model = KINDS[kind]() if kind in KINDS else tiny(interface=None)
    y = inputs(model, 1)[2]
    told: dict[str, Any] = {}
    if model.takes_text:
        told["condition"] = y
    elif model.conditional:
        told["label"] = min(int(y), model.config.num_classes - 1)
    with Engine(model, EngineOptions(max_work=2)) as engine:
        request = Request(seed=3, steps=4, previews=1, **told)
        (result,) = results(engine, [request])
        assert torch.equal(result.sample, again(model, request, result))


def test_previews_come_closer_to_the_image(engine: Engine) -> None:
    inbox = Inbox(engine)
    inbox.submit(Request(2, steps=8, previews=7))
    shown = [inbox.events.get(timeout=30)[1] for _ in range(8)]
    assert isinstance(shown[-1], Finished)
    distances = [(event.sample - shown[-1].sample).norm() for event in shown if not isinstance(event, Failed)]
    assert distances[0] > distances[3] > distances[6] > distances[7] == 0


# ------------------------------------------------------------------------------------------------ wrong inputs


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"label": 10}, "label is 10; the model knows the classes 0..9"),
        ({"label": None}, "label is None; the model knows the classes"),
        ({"label": True}, "label is True"),
        ({"seed": 1.5}, "seed is 1.5; it must be a whole number"),
        ({"steps": 0}, "steps is 0"),
        ({"min_steps": 5}, "min_steps is 5; it must be between 1 and steps, 4"),
        ({"solver": "rk4"}, "no solver is named 'rk4'"),
        ({"budget": 2.0}, "budget is 2.0"),
        ({"min_budget": 0.0}, "budget is 0.0"),
        ({"budget": 0.5, "min_budget": 0.5}, "give no min_budget beside it"),
        ({"guidance": "cfg"}, "guidance is 'cfg'; it must be an elit.Guidance"),
        ({"previews": 4}, "previews is 4"),
        ({"latency_objective": -1.0}, "latency_objective is -1.0"),
        ({"condition": object()}, "give a label or a condition, not both"),
    ],
)
def test_wrong_requests_are_told_at_once(engine: Engine, wrong: dict[str, Any], why: str) -> None:
    with pytest.raises(ElitError, match=why):
        engine.submit(Request(**({"label": 3, "steps": 4} | wrong)), print)
    assert engine.status().queued == engine.status().in_flight == 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"latency_objective": 0},
        {"min_budget": 2.0},
        {"points": ()},
        {"queue_limit": 0},
        {"max_work": 0.0},
        {"stuck_after": -1},
    ],
)
def test_wrong_options_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ElitError, match=next(iter(wrong))):
        EngineOptions(**wrong)


def test_points_that_do_not_fit_the_model_are_refused(model: Any) -> None:
    with pytest.raises(ElitError, match="level that the model was not trained for"):
        Engine(model, EngineOptions(points=(OperatingPoint(9),)))


# ------------------------------------------------------------------------------------------------ faults


class Faulty(Recorder):
    """A stand-in whose answer of a row is its label, and which fails as a test says once ``armed``."""

    def __init__(self) -> None:
        super().__init__(lambda x, t, y, budget: x * 0 + y[:, None, None, None])
        self.at_call: Callable[[Tensor], None] = lambda y: None

    def at_levels(self, encoded: Any, num_latents: Any, rows: Any = None) -> Tensor:
        self.at_call(encoded[2])
        return super().at_levels(encoded, num_latents, rows)


@pytest.fixture
def faulty() -> Iterator[tuple[Faulty, Engine, Inbox]]:
    model = Faulty()
    engine = Engine(model, EngineOptions(max_work=4, stuck_after=0.05, queue_limit=20))
    with engine:
        assert engine.wait_until_ready(60)
        yield model, engine, Inbox(engine)
    status = engine.status()
    assert (status.queued, status.in_flight, status.alive, status.ready) == (0, 0, False, False)


def counts(engine: Engine) -> tuple[int, int, int, int]:
    status = engine.status()
    return status.finished, status.failed, status.cancelled, status.refused


def test_a_request_that_fails_fails_alone(faulty: tuple[Faulty, Engine, Inbox]) -> None:
    model, engine, inbox = faulty

    def wrong(y: Tensor) -> None:
        if 8 in y:
            raise ValueError("eight")

    model.answer = lambda x, t, y, budget: x * 0 + torch.where(y == 9, float("nan"), y.float())[:, None, None, None]
    model.at_call = wrong
    requests = [Request(label, seed=label, steps=3) for label in range(10)]
    for request in requests:
        inbox.submit(request)
    ends = inbox.ends(10)
    for request in requests[:8]:
        assert isinstance(ends[request], Finished)
    assert isinstance(failed := ends[requests[8]], Failed) and str(failed.error) == "eight"
    assert isinstance(failed := ends[requests[9]], Failed) and isinstance(failed.error, NotFiniteError)
    assert counts(engine) == (8, 2, 0, 0)


def test_out_of_memory_halves_the_batches_and_loses_nobody(faulty: tuple[Faulty, Engine, Inbox]) -> None:
    model, engine, inbox = faulty

    def small(y: Tensor) -> None:
        if len(y) > 1 or 7 in y:
            raise torch.OutOfMemoryError("too many")

    model.at_call = small
    requests = [Request(label, steps=3) for label in range(8)]
    for request in requests:
        inbox.submit(request)
    ends = inbox.ends(8)
    assert [isinstance(ends[request], Finished) for request in requests] == [True] * 7 + [False]
    assert isinstance(failed := ends[requests[7]], Failed) and isinstance(failed.error, torch.OutOfMemoryError)
    assert engine.status().max_work <= 1


class Gate:
    """Lets a model through call by call."""

    def __init__(self, model: Faulty) -> None:
        self.entered, self.open = threading.Semaphore(0), threading.Semaphore(0)
        self.model = model
        model.at_call = self._pass

    def _pass(self, y: Tensor) -> None:
        self.entered.release()
        assert self.open.acquire(timeout=30)

    def lift(self) -> None:
        self.model.at_call = lambda y: None
        self.open.release(1000)


def test_cancelled_rows_are_gone_by_the_next_step(faulty: tuple[Faulty, Engine, Inbox]) -> None:
    model, engine, inbox = faulty
    gate = Gate(model)
    tickets = [inbox.submit(Request(label, steps=50)) for label in (1, 2)]
    assert gate.entered.acquire(timeout=30)  # in the first step; it may hold one of them or both
    tickets.append(inbox.submit(Request(3, steps=50)))
    assert tickets[0].cancel() and not tickets[0].cancel()
    assert tickets[2].cancel()  # before its first step
    before = len(model.calls)
    gate.open.release()
    assert gate.entered.acquire(timeout=30)
    gate.open.release()
    assert gate.entered.acquire(timeout=30)
    assert [call.y.tolist() for call in model.calls[before + 1 :] if call.y is not None] == [[2]]
    assert tickets[1].cancel()
    gate.lift()
    assert counts(engine) == (0, 0, 3, 0)
    assert results(engine, [Request(4, steps=2)])  # and the others go on
    assert inbox.events.empty()


def test_a_full_queue_refuses_with_a_time_to_come_back(faulty: tuple[Faulty, Engine, Inbox]) -> None:
    model, engine, inbox = faulty
    gate = Gate(model)
    inbox.submit(Request(0, steps=2))
    assert gate.entered.acquire(timeout=30)
    for label in range(20):
        inbox.submit(Request(label % 10, steps=2))
    with pytest.raises(QueueFull, match="20 requests are waiting already") as caught:
        inbox.submit(Request(1, steps=2))
    assert caught.value.retry_after >= 1
    assert (engine.status().queued, engine.status().in_flight) == (20, 1)
    gate.lift()
    assert len(inbox.ends(21)) == 21
    assert counts(engine) == (21, 0, 0, 1)


def test_a_stuck_step_shows(faulty: tuple[Faulty, Engine, Inbox]) -> None:
    model, engine, inbox = faulty
    gate = Gate(model)
    inbox.submit(Request(0, steps=2))
    assert gate.entered.acquire(timeout=30)
    time.sleep(0.1)
    status = engine.status()
    assert status.alive and status.stuck_since is not None and 0.05 < time.time() - status.stuck_since < 20
    gate.lift()
    inbox.ends(1)
    time.sleep(0.01)
    assert engine.status().stuck_since is None


def test_leaving_the_loop_cancels(faulty: tuple[Faulty, Engine, Inbox]) -> None:
    _, engine, _ = faulty

    async def look_once() -> None:
        async for event in engine.generate(Request(1, steps=5000, previews=4999)):
            assert isinstance(event, Preview)
            break
        await asyncio.sleep(0.05)
        waiting = asyncio.ensure_future(anext(engine.generate(Request(1, steps=5000))))
        await asyncio.sleep(0.05)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    asyncio.run(look_once())
    assert counts(engine) == (0, 0, 2, 0)


def test_a_receiver_that_fails_cancels_its_request_alone(faulty: tuple[Faulty, Engine, Inbox]) -> None:
    _, engine, inbox = faulty

    def broken(event: Event) -> None:
        raise RuntimeError("the receiver is gone")

    engine.submit(Request(1, steps=5000, previews=10), broken)
    inbox.submit(Request(2, steps=3))
    assert isinstance(next(iter(inbox.ends(1).values())), Finished)
    deadline = time.monotonic() + 30
    while counts(engine) != (1, 0, 1, 0) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert counts(engine) == (1, 0, 1, 0)


def test_observers_are_told(faulty: tuple[Faulty, Engine, Inbox]) -> None:
    _, engine, _ = faulty
    told: list[str] = []

    class Counting(Observer):
        def stepped(self, seconds: float, budgets: Any) -> None:
            assert seconds > 0
            told.extend(["step"] * len(budgets))

        def finished(self, request: Request, result: Finished) -> None:
            raise RuntimeError("a broken observer harms nobody")

    engine.observers.append(Counting())
    results(engine, [Request(1, steps=3), Request(2, steps=3, budget=0.25)])
    assert told == ["step"] * 6
    assert engine.status().delivered == {1.0: 3, 0.25: 3}


# ------------------------------------------------------------------------------------------------ the end


def test_closing_drains_or_does_not() -> None:
    for drain in (True, False):
        model = Faulty()
        engine = Engine(model, EngineOptions(max_work=2)).start()
        assert engine.wait_until_ready(60)
        gate, inbox = Gate(model), Inbox(engine)
        for label in range(5):
            inbox.submit(Request(label, steps=3))
        assert gate.entered.acquire(timeout=30)
        closing = threading.Thread(target=engine.close, kwargs={"drain": drain})
        closing.start()
        while engine.status().ready:
            time.sleep(0.001)
        with pytest.raises(EngineClosedError):
            inbox.submit(Request(1))
        if not drain:
            ends = inbox.ends(5)
            assert all(isinstance(end, Failed) and isinstance(end.error, EngineClosedError) for end in ends.values())
        gate.lift()
        closing.join(30)
        assert not closing.is_alive() and not engine.status().alive
        if drain:
            assert all(isinstance(end, Finished) for end in inbox.ends(5).values())


def test_draining_ends_in_time() -> None:
    model = Faulty()
    engine = Engine(model, EngineOptions(max_work=2))
    inbox = Inbox(engine)
    inbox.submit(Request(1, steps=5000))  # before it is started
    engine.start()
    assert engine.wait_until_ready(60)
    engine.close(drain=True, timeout=0.5)
    (end,) = inbox.ends(1).values()
    assert isinstance(end, Failed) and isinstance(end.error, EngineClosedError)
    assert not engine.status().alive


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_the_death_of_the_thread_fails_everybody() -> None:
    model = Faulty()

    def dies(y: Tensor) -> None:
        raise SystemExit("the device fell off the bus")

    with Engine(model, EngineOptions(max_work=2)) as engine:
        assert engine.wait_until_ready(60)
        model.at_call, inbox = dies, Inbox(engine)
        request = Request(1, steps=3)
        inbox.submit(request)
        assert isinstance(end := inbox.ends(1)[request], Failed) and "fell off the bus" in str(end.error)
        status = engine.status()
        assert not status.alive and not status.ready and status.in_flight == 0
        with pytest.raises(EngineClosedError):
            inbox.submit(Request(1))


def test_the_death_of_the_thread_can_end_the_process() -> None:
    script = """
import time
from elit.serving import Engine, EngineOptions
from tests.helpers.models import tiny
engine = Engine(tiny(), EngineOptions(exit_on_death=True, max_work=1))
engine.warm_up = lambda: 1 / 0
engine.start()
time.sleep(60)
"""
    done = subprocess.run([sys.executable, "-c", script], timeout=60, capture_output=True, text=True)
    assert done.returncode == 1
    assert "the engine's thread died" in done.stderr and "ZeroDivisionError" in done.stderr


def test_nothing_is_left_behind(model: Any) -> None:
    """Trajectories are freed after images that finish, fail or are cancelled."""
    with Engine(model, EngineOptions(max_work=8)) as engine:
        inbox, tickets = Inbox(engine), []
        for i in range(200):
            tickets.append(inbox.submit(Request(i % 10, seed=i, steps=2 + i % 5)))
            if i % 3 == 0:
                tickets[-1].cancel()
        cancelled = engine.status().cancelled
        inbox.ends(200 - cancelled)
        flight = [weakref.ref(ticket.started) for ticket in tickets if ticket.started is not None]
        assert len(flight) >= 200 - cancelled
        del tickets[:]
        status = engine.status()
        assert (status.queued, status.in_flight) == (0, 0)
        assert status.finished == 200 - cancelled and not engine._tickets and not len(engine._scheduler)
        results(engine, [Request(1, steps=1)])  # another batch: the last one is forgotten
        inbox.events = queue.Queue()
        gc.collect()
        assert sum(each() is not None for each in flight) == 0
