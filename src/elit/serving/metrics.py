"""Metrics of a server, in the format of Prometheus."""

import time
from collections import Counter as Tally
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from elit.serving.engine import EngineStatus, Observer
from elit.serving.request import Finished, Request

LATENCIES = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 3.0, 5.0, 7.5, 10.0, 15.0, 20.0, 30.0, 60.0, 120.0)
STEP_TIMES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
RECENT_SECONDS = 60.0


class Metrics(Observer):
    """Counts what an engine does, as its observer, and what the HTTP face answers.

    Args:
        status: tells how many images wait and are in flight, and the budget at present.
    """

    def __init__(self, status: Callable[[], EngineStatus]) -> None:
        self.registry = CollectorRegistry()
        self.images = Counter(
            "elit_images",
            "Images by what became of them: finished, failed, cancelled, or refused because the queue was full",
            ["outcome"],
            registry=self.registry,
        )
        self.steps = Counter(
            "elit_steps", "Steps of finished images, by the budget that was delivered", ["budget"],
            registry=self.registry,
        )  # fmt: skip
        self.latency = Histogram(
            "elit_image_latency_seconds",
            "From the arrival of an image's request to its last step",
            buckets=LATENCIES,
            registry=self.registry,
        )
        self.queued = Histogram(
            "elit_image_queued_seconds",
            "From the arrival of an image's request to its first step",
            buckets=LATENCIES,
            registry=self.registry,
        )
        self.step_time = Histogram(
            "elit_step_seconds", "Time of one batch of steps", buckets=STEP_TIMES, registry=self.registry
        )
        self.batch = Histogram(
            "elit_step_images", "Images in one batch of steps", buckets=(1, 2, 4, 8, 16, 32, 64), registry=self.registry
        )
        self.responses = Counter(
            "elit_http_responses", "Answers of the HTTP interface", ["path", "status"], registry=self.registry
        )
        self.registry.register(_StatusCollector(status))
        self._recent: deque[tuple[float, Tally[float]]] = deque(maxlen=10_000)
        for outcome in ("finished", "failed", "cancelled", "refused"):
            self.images.labels(outcome)  # they begin at 0

    def text(self) -> bytes:
        """Returns all metrics as Prometheus reads them."""
        return generate_latest(self.registry)

    def recent_budgets(self, seconds: float = RECENT_SECONDS) -> dict[float, int]:
        """Returns how many steps the images that were finished in the last seconds had at each budget."""
        since, total = time.monotonic() - seconds, Tally[float]()
        for when, budgets in list(self._recent):
            if when >= since:
                total.update(budgets)
        return dict(sorted(total.items()))

    # -------------------------------------------------------------------------------------------- as an observer

    def stepped(self, seconds: float, budgets: Sequence[float]) -> None:
        self.step_time.observe(seconds)
        self.batch.observe(len(budgets))

    def finished(self, request: Request, result: Finished) -> None:
        self.images.labels("finished").inc()
        self.latency.observe(result.latency)
        self.queued.observe(result.queued)
        tally = Tally(result.budgets)
        for budget, count in tally.items():
            self.steps.labels(f"{budget:g}").inc(count)
        self._recent.append((time.monotonic(), tally))

    def failed(self, request: Request, error: Exception) -> None:
        self.images.labels("failed").inc()

    def cancelled(self, request: Request) -> None:
        self.images.labels("cancelled").inc()

    def refused(self, request: Request) -> None:
        self.images.labels("refused").inc()


class _StatusCollector(Collector):
    """Asks for the status whenever the metrics are read."""

    def __init__(self, status: Callable[[], EngineStatus]) -> None:
        self.status = status

    def collect(self) -> Iterator[Any]:
        status = self.status()
        yield GaugeMetricFamily("elit_images_waiting", "Images that have not begun", value=status.queued)
        yield GaugeMetricFamily("elit_images_in_flight", "Images that have begun", value=status.in_flight)
        yield GaugeMetricFamily("elit_ready", "Whether the engine takes requests", value=status.ready)
        yield GaugeMetricFamily("elit_step_stuck", "Whether a step is stuck", value=status.stuck_since is not None)
        yield GaugeMetricFamily("elit_budget", "The budget that the controller gives at present", value=status.budget)
