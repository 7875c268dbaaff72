"""From a request to pixels: a text encoder, an engine and an autoencoder in a row."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from elit.conditions import Text
from elit.data.autoencoder import decode
from elit.data.pixels import to_uint8
from elit.errors import ElitError
from elit.models import Model
from elit.serving.costs import CostTable
from elit.serving.engine import Engine, EngineStatus, Observer
from elit.serving.request import Event, Failed, Finished, Preview, Request

Encoder: TypeAlias = Callable[[Sequence[str]], Text]


@dataclass(frozen=True)
class Accepted:
    """Says that a request was accepted; it waits, or has begun."""


@dataclass(frozen=True, eq=False)
class PartialPicture:
    """Shows a picture as it forms, after ``step`` of ``steps``.

    Attributes:
        pixels: (H, W, C), uint8.
    """

    step: int
    steps: int
    pixels: Tensor


@dataclass(frozen=True, eq=False)
class Picture:
    """Brings a finished picture, and what makes it again (see :class:`~elit.serving.request.Finished`).

    Attributes:
        pixels: (H, W, C), uint8.
        budgets: what was delivered, one per step.
        queued: seconds before the first step.
        latency: seconds from submission to the last step.
        prompt_tokens: how many tokens its prompt has; 0 for a class.
    """

    pixels: Tensor
    seed: int
    budgets: tuple[float, ...]
    queued: float
    latency: float
    prompt_tokens: int


PictureEvent: TypeAlias = Accepted | PartialPicture | Picture


class Pictures(Protocol):
    """Whatever makes pictures: a :class:`Pipeline` in this process, or replicas elsewhere.

    Attributes:
        model: tells what can be asked for; it may have no weights.
        size: (width, height) of the pictures.
        queue_limit: how many requests may wait.
        observers: are told what happens; add yours before :meth:`start`.
    """

    model: Model
    size: tuple[int, int]
    queue_limit: int
    observers: list[Observer]

    @property
    def costs(self) -> CostTable | None:
        """What a step costs on the machine at each level and batch size; None until it was measured."""

    async def start(self) -> None:
        """Begins to start; ``status().ready`` says when requests are taken."""

    async def close(self, drain: bool = True, timeout: float | None = None) -> None:
        """Stops; with ``drain`` it first finishes what was accepted.

        Args:
            timeout: seconds after which a step that does not end is left alone; None waits for it.
        """

    def status(self) -> EngineStatus:
        """Returns how it is at this moment."""

    def generate(self, request: Request, prompt: str | None = None) -> AsyncGenerator[PictureEvent]:
        """Makes one picture: says that it was accepted, shows it as it forms, and brings it. Leaving the loop cancels.

        Args:
            prompt: of a model of text, in place of the request's condition.

        Raises:
            ElitError: a wrong request; :class:`~elit.serving.request.QueueFull` if there are too many.
            Exception: whatever the picture failed of.
        """


class Pipeline(Pictures):
    """Makes pictures with an engine in this process, which does the steps on a thread of its own.

    Prompts are encoded and samples decoded on another thread, so that neither the engine nor the event loop waits.

    Args:
        engine: the engine, which :meth:`start` starts and :meth:`close` closes.
        autoencoder: decodes latents; None for a model on pixels.
        text_encoder: embeds prompts; None for a model of classes.

    Attributes:
        model: the engine's.
        size: (width, height) of the pictures.
        queue_limit: the engine's.
        pending: number of prompts that are about to be encoded, or are being encoded.

    Raises:
        ElitError: the model makes clips, or the autoencoder or the text encoder does not fit it.
    """

    def __init__(self, engine: Engine, autoencoder: Any = None, text_encoder: Encoder | None = None) -> None:
        self.engine, self.model, self.observers = engine, engine.model, engine.observers
        self.autoencoder, self.text_encoder = autoencoder, text_encoder
        self.queue_limit = engine.options.queue_limit
        self.pending = 0
        shape = self.model.input_shape()
        if len(shape) != 3:
            raise ElitError("this model makes clips; a server makes images")
        if autoencoder is None and shape[0] not in (1, 3):
            raise ElitError(f"the model makes latents of {shape[0]} channels; name the autoencoder that decodes them")
        if self.model.takes_text and text_encoder is None:
            raise ElitError("the model takes text; name the text encoder that it was trained with")
        height, width, _ = self._decode(torch.zeros(shape)).shape
        self.size = (width, height)
        self._threads = ThreadPoolExecutor(1, "elit-decode")

    @property
    def costs(self) -> CostTable | None:
        return self.engine.costs

    async def start(self) -> None:
        self.engine.start()

    async def close(self, drain: bool = True, timeout: float | None = None) -> None:
        await asyncio.to_thread(self.engine.close, drain=drain, timeout=timeout)
        self._threads.shutdown(wait=timeout is None)

    def status(self) -> EngineStatus:
        return self.engine.status()

    async def generate(self, request: Request, prompt: str | None = None) -> AsyncGenerator[PictureEvent]:
        if prompt is not None and self.text_encoder is not None:
            self.engine.check_room(request, self.pending)
            self.pending += 1
            try:
                request = replace(request, condition=await self._in_thread(self.text_encoder, [prompt]))
            finally:
                self.pending -= 1
        prompt_tokens = 0 if request.condition is None else int(request.condition.mask.sum())
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Event]()

        def on_event(event: Event) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        ticket = self.engine.submit(request, on_event)
        try:
            yield Accepted()
            while True:
                event = await events.get()
                if isinstance(event, Failed):
                    raise event.error
                pixels = await self._in_thread(self._decode, event.sample)
                if isinstance(event, Preview):
                    yield PartialPicture(event.step, event.steps, pixels)
                else:
                    yield _picture(event, pixels, prompt_tokens)
                    return
        finally:
            ticket.cancel()

    async def _in_thread(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)

    def _decode(self, sample: Tensor) -> Tensor:
        """Turns a sample (C, H, W) into pixels (H, W, C), uint8."""
        batch = sample[None].to(self.model.device)
        return to_uint8(batch if self.autoencoder is None else decode(batch, self.autoencoder))[0]


def _picture(event: Finished, pixels: Tensor, prompt_tokens: int) -> Picture:
    return Picture(pixels, event.seed, event.budgets, event.queued, event.latency, prompt_tokens)
