"""The answer to one HTTP request for images: all of them at the end, or events as they form."""

import asyncio
import base64
import io
import math
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, aclosing
from typing import Any

from PIL import Image
from torch import Tensor

from elit.models import Model
from elit.serving import schema
from elit.serving.parse import Wanted
from elit.serving.pipeline import PartialPicture, Picture, PictureEvent, Pictures
from elit.serving.schema import ImagesRequest, OutputFormat


class Answer:
    """Makes the images that one body asks for, and describes them. Use it in ``async with``: leaving cancels.

    Args:
        body: what the client sent.
        wanted: the images that it asks for.
        pictures: makes them.
        name: of the model.
    """

    def __init__(self, body: ImagesRequest, wanted: Sequence[Wanted], pictures: Pictures, name: str) -> None:
        self.body, self.wanted, self.pictures, self.name = body, wanted, pictures, name
        self.begun = time.perf_counter()
        self._streams: list[AsyncGenerator[PictureEvent]] = []
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> "Answer":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def submit(self) -> None:
        """Submits all images, or none of them.

        Raises:
            Exception: what refused one of them, such as a full queue.
        """
        for each in self.wanted:
            stream = self.pictures.generate(each.request, each.prompt)
            self._streams.append(await self._stack.enter_async_context(aclosing(stream)))
            await anext(stream)  # Accepted

    async def response(self) -> schema.ImagesResponse:
        """Waits for all images and returns them."""
        pictures = [await _last(stream) for stream in self._streams]  # the engine makes them at the same time
        data = [
            schema.ImageData(b64_json=await self._encoded(picture.pixels), **self._recipe(each, picture))
            for each, picture in zip(self.wanted, pictures, strict=True)
        ]
        return schema.ImagesResponse(
            created=int(time.time()), data=data, model=self.name, usage=self._usage(pictures), **self._format()
        )

    async def events(self) -> AsyncGenerator[schema.PartialImageEvent | schema.CompletedEvent]:
        """Yields the images as they form, and as they are finished, in the order in which that happens."""
        shown = [0] * len(self.wanted)
        async with aclosing(merged(self._streams)) as events:
            async for index, event in events:
                common = {"image_index": index, "created_at": int(time.time()), **self._format()}
                if isinstance(event, PartialPicture):
                    common |= {"partial_image_index": shown[index], "b64_json": await self._encoded(event.pixels)}
                    yield schema.PartialImageEvent(**common)
                    shown[index] += 1
                elif isinstance(event, Picture):
                    common |= {"usage": self._usage([event]), "b64_json": await self._encoded(event.pixels)}
                    yield schema.CompletedEvent(**common, **self._recipe(self.wanted[index], event))

    async def _encoded(self, pixels: Tensor) -> str:
        return await asyncio.to_thread(encode, pixels, self.body.output_format, self.body.output_compression)

    def _format(self) -> dict[str, Any]:
        width, height = self.pictures.size
        return {"size": f"{width}x{height}", "quality": self.body.quality, "output_format": self.body.output_format}

    def _recipe(self, wanted: Wanted, picture: Picture) -> dict[str, Any]:
        request = wanted.request
        guidance = request.guidance and schema.GuidanceUsed.model_validate(request.guidance, from_attributes=True)
        return {
            "seed": picture.seed,
            "steps": len(picture.budgets),
            "solver": request.solver,
            "budgets": list(picture.budgets),
            "guidance": guidance,
            "label": request.label,
            "seconds": time.perf_counter() - self.begun,
        }

    def _usage(self, pictures: Sequence[Picture]) -> schema.Usage:
        prompt = sum(picture.prompt_tokens for picture in pictures)
        latents = sum(latent_tokens(self.pictures.model, picture.budgets) for picture in pictures)
        details = schema.InputTokens(text_tokens=prompt)
        return schema.Usage(
            input_tokens=prompt, input_tokens_details=details, output_tokens=latents, total_tokens=prompt + latents
        )


def encode(pixels: Tensor, output_format: OutputFormat, quality: int = 100) -> str:
    """Encodes pixels (H, W, C) as an image file in base64."""
    file = io.BytesIO()
    settings = {} if output_format == "png" else {"quality": quality}
    Image.fromarray(pixels.squeeze(-1).numpy()).save(file, output_format, **settings)
    return base64.b64encode(file.getvalue()).decode()


def latent_tokens(model: Model, budgets: Sequence[float]) -> int:
    """Counts the tokens that ran through the core over some steps; without an interface those are the spatial ones."""
    if model.interface is None:
        return math.prod(model.config.grid_size) * len(budgets)
    windows = model.interface.grid.num_windows
    return sum(windows * model.level(budget) for budget in budgets)


async def _last(stream: AsyncGenerator[PictureEvent]) -> Picture:
    """Waits for the finished picture of a stream."""
    async for event in stream:
        if isinstance(event, Picture):
            return event
    raise RuntimeError("a stream of events ended without its picture")


async def merged(streams: Sequence[AsyncGenerator[PictureEvent]]) -> AsyncGenerator[tuple[int, PictureEvent]]:
    """Yields the events of several streams as they come, each with the index of its stream."""
    events = asyncio.Queue[tuple[int, PictureEvent | Exception | None]]()

    async def pump(index: int) -> None:
        try:
            async for event in streams[index]:
                events.put_nowait((index, event))
            events.put_nowait((index, None))
        except Exception as error:
            events.put_nowait((index, error))

    pumps = [asyncio.create_task(pump(index)) for index in range(len(streams))]
    open_streams = len(streams)
    try:
        while open_streams:
            index, event = await events.get()
            if isinstance(event, Exception):
                raise event
            if event is None:
                open_streams -= 1
            else:
                yield index, event
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
