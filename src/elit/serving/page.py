"""The page of a server: one image as it forms, all budgets side by side, and the load."""

import hmac
import html
import secrets
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import replace
from typing import Any

import gradio as gr
from fastapi import FastAPI
from pydantic import ValidationError

from elit.analysis import count_flops, sampling_flops
from elit.analysis.calibration import choose_levels
from elit.errors import ElitError
from elit.serving.answers import encode, merged
from elit.serving.engine import new_job
from elit.serving.errors import ApiError, api_error
from elit.serving.http import Service
from elit.serving.job import batch_seconds
from elit.serving.parse import Wanted
from elit.serving.pipeline import Accepted, PartialPicture, Picture
from elit.serving.request import Request
from elit.serving.schema import ImagesRequest, OutputFormat

PREVIEWS = 8  # of one image as it forms
MOST_BUDGETS = 16  # side by side
MOST_STEPS = 100
SMALL = 64  # pixels; images up to here are shown without loss
REFRESH_SECONDS = 1.0
ALONE = "an image, alone on an idle machine"

CSS = """
main.fillable { max-width: 1080px !important; margin: 0 auto !important; }
.html-container { padding: 0 !important; }
#title h1 { font-size: 1.7rem; margin: 0.4rem 0 0; }
#title p { margin: 0.2rem 0 0.4rem; color: var(--neutral-500); }
.elit figure { margin: 0; }
.elit img, .elit .empty { aspect-ratio: var(--aspect); width: 100%; border-radius: 6px; display: block; }
.elit img { image-rendering: pixelated; background: var(--background-fill-secondary); }
.elit .empty { border: 1px dashed var(--border-color-primary); display: grid; place-items: center; }
.elit .empty, .elit .muted { color: var(--neutral-500); }
.elit figcaption { font-size: 0.85rem; line-height: 1.4; margin-top: 0.4rem; }
.elit figcaption b { font-size: 0.95rem; }
.elit.single figure { max-width: 440px; margin: 0 auto; }
.elit.grid { display: grid; grid-template-columns: repeat(8, 1fr); gap: 14px 12px; }
.elit.load { display: grid; grid-template-columns: repeat(5, 1fr); gap: 12px; }
.elit .tile { border: 1px solid var(--border-color-primary); border-radius: 8px; padding: 0.55rem 0.8rem; }
.elit .tile strong { display: block; font-size: 1.3rem; font-variant-numeric: tabular-nums; }
.elit .wide { grid-column: 1 / -1; }
.elit .progress { height: 6px; border-radius: 3px; background: var(--neutral-200); overflow: hidden; margin-top: 6px; }
.elit .progress div { height: 100%; background: var(--color-accent); }
.elit .chart { display: flex; gap: 4px; margin-top: 0.5rem; font-variant-numeric: tabular-nums; }
.elit .chart div { flex: 1; min-width: 0; text-align: center; font-size: 0.7rem; }
.elit .chart i { height: 72px; display: flex; align-items: flex-end; border-bottom: 1px solid var(--neutral-400); }
.elit .chart u { display: block; width: 100%; background: var(--color-accent); border-radius: 2px 2px 0 0; }
@media (max-width: 700px) {
  .elit.grid { grid-template-columns: repeat(4, 1fr); gap: 10px 8px; }
  .elit.grid figcaption { font-size: 0.64rem; }
  .elit.load { grid-template-columns: repeat(2, 1fr); }
  .elit.load .tile:nth-child(5) { grid-column: 1 / -1; }
  .elit .chart div:nth-child(odd) { color: transparent; }
}
"""


def mount_page(app: FastAPI) -> FastAPI:
    """Puts the page at / of an application that was made by :func:`elit.serving.http.create_app`."""
    service: Service = app.state.service
    key = service.options.api_key
    return gr.mount_gradio_app(
        app,
        make_page(service),
        path="/",
        auth=None if key is None else lambda _, password: hmac.compare_digest(password.encode(), key.encode()),
        auth_message="Any name will do; the password is the API key.",
        footer_links=[],
        run_history=False,
        max_file_size=1,  # nothing can be uploaded
        ssr_mode=False,
        show_error=True,
        theme=gr.themes.Base(
            primary_hue="indigo", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
        ),
        css=CSS,
    )


def make_page(service: Service) -> gr.Blocks:
    """Lays the page out."""
    view = View(service)
    model, defaults = service.pictures.model, service.defaults
    guided = defaults.guidance
    with gr.Blocks(title=f"ELIT · {defaults.name}", analytics_enabled=False, fill_width=True) as page:
        gr.Markdown(
            f"# One model, {len(model.levels) or 1} budgets\n{html.escape(defaults.name)} makes images of "
            f"{view.width}x{view.height} pixels. The budget is the fraction of latents that each step computes.",
            elem_id="title",
        )
        with gr.Row():
            with gr.Column(scale=5, min_width=320):
                what = view.condition()
                with gr.Row(equal_height=True):
                    seed = gr.Number(0, label="Seed", precision=0, minimum=0, min_width=120, scale=2)
                    new_seed = gr.Button("New seed", min_width=110, scale=1)
                automatic = gr.Checkbox(
                    not model.levels, label="Let the server choose by its load", visible=bool(model.levels)
                )
                budget = gr.Slider(
                    view.budgets[0], 1.0, 1.0, step=view.step, label="Budget", visible=bool(model.levels),
                )  # fmt: skip
                steps = gr.Slider(1, min(defaults.max_steps, MOST_STEPS), defaults.steps, step=1, label="Steps")
                with gr.Row():
                    guidance = gr.Dropdown(
                        view.kinds(), value="none" if guided is None else guided.kind, label="Guidance", min_width=150
                    )
                    scale = gr.Slider(
                        0, 10, 2.0 if guided is None else guided.scale, step=0.1, label="Guidance scale", min_width=150
                    )
                cost = gr.HTML(elem_id="cost", padding=False)
                with gr.Row(equal_height=True):
                    one = gr.Button("Generate", variant="primary", min_width=140)
                    every = gr.Button("All budgets side by side", min_width=140, visible=len(view.budgets) > 1)
            with gr.Column(scale=6, min_width=320):
                single = gr.HTML(view.empty("Your image forms here."), elem_id="image", padding=False)
        side_by_side = gr.HTML(elem_id="budgets", padding=False)
        gr.Markdown("### Load")
        load = gr.HTML(view.load(), elem_id="load", padding=False)

        settings = [what, seed, automatic, budget, steps, guidance, scale]
        quick: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        shown: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "trigger_mode": "once"}
        for setting in settings[2:]:
            setting.change(view.cost, settings, cost, **quick)
        page.load(view.cost, settings, cost, **quick)
        automatic.change(lambda chosen: gr.update(interactive=not chosen), automatic, budget, **quick)
        new_seed.click(lambda: secrets.randbits(32), None, seed, **quick)
        one.click(view.one_image, settings, single, **shown)
        every.click(view.all_budgets, settings, side_by_side, **shown)
        gr.Timer(REFRESH_SECONDS).tick(view.load, None, load, **quick)
    page.queue(default_concurrency_limit=16)
    return page


class View:
    """What the page shows, as functions of its settings: what, seed, automatic, budget, steps, guidance and scale."""

    def __init__(self, service: Service) -> None:
        self.service, self.pictures, self.defaults = service, service.pictures, service.defaults
        self.model = service.pictures.model
        self.width, self.height = service.pictures.size
        levels = choose_levels(self.model.levels, MOST_BUDGETS)
        self.budgets = [level / self.model.num_latents for level in levels] or [1.0]
        self.step = 1 / self.model.num_latents if self.model.num_latents else 1.0
        for level in self.model.levels or (0,):
            count_flops(
                self.model.config, level
            )  # it hooks into every module, so it must be over before the engine runs

    # -------------------------------------------------------------------------------------------- settings

    def condition(self) -> Any:
        """Returns the field for a class or a prompt."""
        if self.model.takes_text:
            return gr.Textbox("", label="Prompt", lines=2)
        if not self.model.conditional:
            return gr.Textbox("", visible=False)
        names = self.defaults.class_names or [str(label) for label in range(self.model.config.num_classes)]
        choices = [(name if name == str(i) else f"{i}: {name}", str(i)) for i, name in enumerate(names)]
        return gr.Dropdown(choices, value="0", label="Class", filterable=True)

    def kinds(self) -> list[tuple[str, str]]:
        """Returns the kinds of guidance that the model can do."""
        kinds = [("none", "none")]
        if self.model.conditional:
            kinds.append(("CFG", "cfg"))
        if len(self.model.levels) > 1:
            kinds += [("CCFG", "ccfg")] * self.model.conditional
            kinds.append(("AG", "ag"))
        return kinds

    def wanted(
        self, what: str, seed: float, automatic: bool, budget: float, steps: int, guidance: str, scale: float
    ) -> Wanted:
        """Returns the image that the settings ask for.

        Raises:
            gr.Error: they cannot be.
        """
        try:
            body = ImagesRequest.model_validate(
                {
                    "prompt": what or "",
                    "seed": int(seed or 0),
                    "budget": None if automatic or not self.model.levels else min(float(budget), 1.0),
                    "steps": int(steps),
                    "guidance": guidance,
                    "guidance_scale": None if guidance == "none" else float(scale),
                }
            )
            return self.defaults.wanted(body, self.model, self.pictures.size)[0]
        except ValidationError as error:
            first = error.errors()[0]
            raise gr.Error(f"{first['loc'][0]}: {first['msg']}", print_exception=False) from error
        except (ElitError, TypeError, ValueError, OverflowError) as error:
            raise gr.Error(str(error), print_exception=False) from error

    def cost(self, *settings: Any) -> str:
        """Says what an image costs: counted FLOPs, and milliseconds as the engine measured them."""
        request = self.wanted(*settings).request
        if request.budget is None and self.model.levels:
            low, high = (self._cost(replace(request, budget=budget)) for budget in (self.budgets[0], 1.0))
            return _div("muted", f"between {low} and {high} {ALONE}")
        return _div("muted", f"{self._cost(request)} {ALONE}")

    def _cost(self, request: Request) -> str:
        flops = sampling_flops(self.model, request.steps, request.budget, request.guidance, request.solver)
        seconds = self._seconds(request)
        return f"{_number(flops / 1e9)} GFLOPs" + ("" if seconds is None else f" · {_number(seconds * 1e3)} ms")

    def _seconds(self, request: Request) -> float | None:
        """Predicts the time of an image that is alone, from the measured times of steps; None if there are none yet."""
        if self.pictures.costs is None:
            return None
        job = new_job(request, self.model, 0.0)
        return batch_seconds([job], self.pictures.costs) * job.remaining

    # -------------------------------------------------------------------------------------------- images

    async def one_image(self, *settings: Any) -> AsyncIterator[str]:
        """Shows one image as it forms."""
        wanted = self.wanted(*settings)
        self._check_ready()
        request = replace(wanted.request, previews=min(PREVIEWS, wanted.request.steps - 1))
        async with aclosing(self.pictures.generate(request, wanted.prompt)) as events:
            try:
                async for event in events:
                    if isinstance(event, Accepted):
                        yield self.empty("In the queue …")
                    elif isinstance(event, PartialPicture):
                        share = event.step / event.steps
                        yield self._single(self._image(event), f"step {event.step} of {event.steps}{_progress(share)}")
                    else:
                        yield self._single(self._image(event), self._caption(event))
            except Exception as error:
                raise _told(error) from error

    async def all_budgets(self, *settings: Any) -> AsyncIterator[str]:
        """Shows the images of all budgets from one noise, side by side."""
        first = self.wanted(*settings)
        self._check_ready()
        requests = [replace(first.request, budget=budget, min_budget=None) for budget in self.budgets]
        captions = [f"<b>{budget:.3g}</b><br><span class='muted'>{self._cost(request).replace(' · ', '<br>')}</span>"
                    for budget, request in zip(self.budgets, requests, strict=True)]  # fmt: skip
        images = ["<div class='empty'>…</div>"] * len(requests)
        async with AsyncExitStack() as stack:
            try:
                streams = []
                for request in requests:
                    stream = self.pictures.generate(request, first.prompt)
                    streams.append(await stack.enter_async_context(aclosing(stream)))
                async for index, event in await stack.enter_async_context(aclosing(merged(streams))):
                    if isinstance(event, Picture):
                        images[index] = self._image(event)
                        yield self._grid(images, captions)
            except Exception as error:
                raise _told(error) from error

    def _check_ready(self) -> None:
        """Tells somebody who asks for images that the server starts or stops."""
        try:
            self.service.check_ready()
        except ApiError as error:
            raise _told(error) from error

    def _image(self, event: PartialPicture | Picture) -> str:
        kind: OutputFormat = "png" if max(event.pixels.shape[:2]) <= SMALL else "webp"
        return f"<img alt='image' src='data:image/{kind};base64,{encode(event.pixels, kind, 90)}'>"

    def _caption(self, event: Picture) -> str:
        low, high = min(event.budgets), max(event.budgets)
        budget = f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"
        return (
            f"<b>budget {budget}</b> · seed {event.seed} · {len(event.budgets)} steps<br>"
            f"<span class='muted'>{_number(event.latency * 1e3)} ms, of which {_number(event.queued * 1e3)} ms "
            "waiting</span>"
        )

    def _single(self, image: str, caption: str) -> str:
        return self._frame("single", f"<figure>{image}<figcaption>{caption}</figcaption></figure>")

    def _grid(self, images: Sequence[str], captions: Iterable[str]) -> str:
        figures = (
            f"<figure>{image}<figcaption>{caption}</figcaption></figure>"
            for image, caption in zip(images, captions, strict=True)
        )
        return self._frame("grid", "".join(figures))

    def empty(self, text: str) -> str:
        """Shows that there is no image yet."""
        return self._single(f"<div class='empty'>{text}</div>", "")

    def _frame(self, kind: str, inside: str) -> str:
        return f"<div class='elit {kind}' style='--aspect: {self.width} / {self.height}'>{inside}</div>"

    # -------------------------------------------------------------------------------------------- load

    def load(self) -> str:
        """Shows the load, and the budgets that were delivered lately."""
        status, recent = self.pictures.status(), self.service.metrics.recent_budgets()
        health = self.service.read_health().status
        tiles = {
            "server": "ready" if health == "ok" else health,
            "waiting": f"{status.queued}",
            "in flight": f"{status.in_flight}",
            "budget now": f"{status.budget:.3g}",
            "finished": f"{status.finished:,}",
        }
        shown = "".join(
            f"<div class='tile'><span class='muted'>{name}</span><strong>{value}</strong></div>"
            for name, value in tiles.items()
        )
        most = max(recent.values(), default=1)
        columns = "".join(
            f"<div><i><u style='height: {100 * recent.get(budget, 0) / most:.0f}%'></u></i>{budget:.2g}</div>"
            for budget in sorted({*self.budgets, *recent})
        )
        heading = "<span class='muted'>steps of the last minute's images, by budget</span>"
        return self._frame("load", f"{shown}<div class='tile wide'>{heading}<div class='chart'>{columns}</div></div>")


def _told(error: Exception) -> gr.Error:
    """Turns whatever went wrong into what the page shows."""
    return gr.Error(str(api_error(error)), print_exception=False)


def _div(kind: str, inside: str) -> str:
    return f"<div class='elit'><span class='{kind}'>{inside}</span></div>"


def _progress(share: float) -> str:
    return f"<div class='progress'><div style='width: {100 * share:.1f}%'></div></div>"


def _number(value: float) -> str:
    """Writes a number with three digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
