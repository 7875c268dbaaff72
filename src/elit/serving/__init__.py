"""Serving: an engine that makes images on request, many at a time, at budgets that follow the load."""

from elit.serving.controller import ControllerOptions
from elit.serving.costs import CostTable
from elit.serving.engine import Engine, EngineOptions, EngineStatus, Observer, Ticket
from elit.serving.request import (
    EngineClosedError,
    Event,
    Failed,
    Finished,
    NotFiniteError,
    Preview,
    QueueFull,
    Request,
)

__all__ = [
    "ControllerOptions",
    "CostTable",
    "Engine",
    "EngineClosedError",
    "EngineOptions",
    "EngineStatus",
    "Event",
    "Failed",
    "Finished",
    "NotFiniteError",
    "Observer",
    "Preview",
    "QueueFull",
    "Request",
    "Ticket",
]
