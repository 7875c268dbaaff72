"""From the body of an HTTP request to requests of an engine."""

import reprlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace

from elit.errors import ElitError
from elit.flow import Guidance
from elit.interface import check_budget
from elit.models import Model
from elit.serving.request import Request
from elit.serving.schema import ImagesRequest, Quality

QUALITY: dict[Quality, float | None] = {"low": 0.25, "medium": 0.5, "high": 1.0, "auto": None}
"""The budgets that the values of ``quality`` stand for; auto leaves it to the budget controller."""


class MissingFieldError(ElitError):
    """A request lacks a field that this model needs."""


@dataclass(frozen=True)
class Wanted:
    """One image that a client wants: the request of the engine, and its prompt where the model takes text."""

    request: Request
    prompt: str | None = None


@dataclass(frozen=True)
class Defaults:
    """What requests get where they say nothing, and their limits.

    Attributes:
        name: of the model.
        steps: number of steps.
        min_steps: the fewest that an image gets under load which names neither steps nor a budget; None is ``steps``.
        max_steps: most steps that a request may ask for.
        solver: the solver.
        guidance: None is none.
        class_names: of the classes in order, which prompts may use; none by default.
    """

    name: str = "elit"
    steps: int = 40
    min_steps: int | None = None
    max_steps: int = 250
    solver: str = "euler"
    guidance: Guidance | None = None
    class_names: Sequence[str] = ()

    def wanted(self, body: ImagesRequest, model: Model, size: tuple[int, int]) -> list[Wanted]:
        """Returns the images that a body asks for, each of them checked against the model.

        Args:
            size: (width, height) of the model's images.

        Raises:
            ElitError: the model cannot do what is asked; :class:`MissingFieldError` where a prompt is missing.
        """
        width, height = size
        if body.size not in ("auto", f"{width}x{height}"):
            raise ElitError(f"size is {body.size}; this model makes images of {width}x{height}")
        steps = body.steps or self.steps
        if steps > self.max_steps:
            raise ElitError(f"steps is {_shown(steps)}; this server does at most {self.max_steps}")
        seed = secrets.randbits(32) if body.seed is None else body.seed
        budget = _budget(body, model)
        request = Request(
            steps=steps,
            min_steps=self.min_steps if body.steps is None and budget is None else None,
            solver=body.solver or self.solver,
            budget=budget,
            min_budget=body.min_budget,
            guidance=self._guidance(body),
            previews=min(body.partial_images, steps - 1) if body.stream else 0,
        )
        seeds = range(seed, seed + body.n)
        if model.takes_text:
            if body.labels is not None:
                raise ElitError("labels are for models of classes; this model takes a prompt")
            wanted = [Wanted(replace(request, seed=seed), _prompt(body)) for seed in seeds]
        else:
            labels = self._labels(body, model)
            wanted = [
                Wanted(replace(request, seed=seed, label=label)) for seed, label in zip(seeds, labels, strict=True)
            ]
            wanted[0].request.check(model)
        return wanted

    def _guidance(self, body: ImagesRequest) -> Guidance | None:
        """Returns the guidance of a body: each part that it leaves out is the server's."""
        own = self.guidance or Guidance(scale=4.0)
        kind = body.guidance or ("none" if self.guidance is None and body.guidance_scale is None else own.kind)
        if kind == "none":
            if body.guidance_budget is not None or (body.guidance and body.guidance_scale is not None):
                raise ElitError("guidance_scale or guidance_budget is given without guidance; take cfg, ccfg or ag")
            return None
        budget = own.budget if body.guidance_budget is None and kind != "cfg" else body.guidance_budget
        return Guidance(kind, own.scale if body.guidance_scale is None else body.guidance_scale, budget, own.interval)

    def _labels(self, body: ImagesRequest, model: Model) -> Sequence[int | None]:
        """Returns the class of each image; None for a model without classes."""
        if not model.conditional:
            if body.labels is not None or body.prompt:
                raise ElitError("this model has no classes: give an empty prompt and no labels")
            return [None] * body.n
        if body.labels is None:
            labels = [self._class_of(_prompt(body), model.config.num_classes)]
        elif body.prompt:
            raise ElitError("give a prompt or labels, not both")
        else:
            labels = [body.labels] if isinstance(body.labels, int) else body.labels
            if len(labels) not in (1, body.n):
                raise ElitError(f"{len(labels)} labels for {body.n} images; give one, or one for each")
        classes = model.config.num_classes
        for label in labels:
            if not 0 <= label < classes:
                raise ElitError(f"class {_shown(label)} does not exist; the model knows 0..{classes - 1}")
        return list(labels) * (body.n if len(labels) == 1 else 1)

    def _class_of(self, prompt: str, classes: int) -> int:
        """Returns the class that a prompt names."""
        given = prompt.strip().casefold()
        names = {name.strip().casefold(): label for label, name in enumerate(self.class_names)}
        if given in names:
            return names[given]
        if given.isascii() and given.isdigit() and len(given) < 10:
            return int(given)
        known = f"a number in 0..{classes - 1}" + (", or its name" if names else "")
        raise ElitError(f"the prompt is {_shown(prompt)}; this model takes a class: {known}")


def _prompt(body: ImagesRequest) -> str:
    if body.prompt is None:
        raise MissingFieldError("prompt is missing: give a class by name or number, or for a model of text a text")
    return body.prompt


def _budget(body: ImagesRequest, model: Model) -> float | None:
    """Returns the fixed budget of a body, or None where the controller decides."""
    if body.budget is not None:
        if body.quality != "auto":
            raise ElitError("give a quality or a budget, not both")
        return check_budget(body.budget)
    budget = QUALITY[body.quality]
    if budget is None or not model.levels:
        return budget
    return max(budget, min(model.levels) / model.num_latents)


def _shown(value: object) -> str:
    """Writes what somebody sent in a short form that every terminal and every encoding can show."""
    return ascii(reprlib.repr(value))[1:-1]
