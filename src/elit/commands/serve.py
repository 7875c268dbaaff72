"""`elit serve`: a model behind OpenAI's image API, with a page."""

import asyncio
import os
import reprlib
import signal
from copy import copy
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from rich.console import Console

from elit.analysis.calibration import Calibration, calibrate, calibration_stamp
from elit.commands.options import GuidanceOptions, ModelOptions
from elit.commands.sample import PIXELS
from elit.data.autoencoder import load_autoencoder
from elit.data.text import open_encoder
from elit.errors import ElitError
from elit.launch import default_device
from elit.models import Model
from elit.models.files import resolve
from elit.serving import CostTable, Engine, EngineOptions
from elit.serving.costs import measure_costs
from elit.serving.pipeline import Pipeline
from elit.serving.points import points_from

if TYPE_CHECKING:
    from elit.serving.replicas import Replicas

LOCAL = ("127.0.0.1", "localhost", "::1")


@dataclass(kw_only=True)
class ServeOptions(GuidanceOptions, ModelOptions):
    """The options of `elit serve`. Those of sampling hold for requests that say nothing else.

    Attributes:
        host: the address to listen on; only this machine reaches 127.0.0.1, and 0.0.0.0 is every network.
        port: the port to listen on; 0 is any that is free.
        name: what clients call the model; by default as --model.
        api_key: clients must send it as a bearer token, and the page asks for it; by default the environment variable
            ELIT_API_KEY, and without that everybody may use the server.
        latency_objective_ms: the time from a request to its image that 95 of 100 images should keep: under load,
            budgets are lowered for it. By default they stay at the highest.
        min_budget: budgets are never lowered below this; by default the lowest that was trained.
        queue_limit: how many images may wait to begin; further requests are refused with 429.
        refuse_late: refuse requests, likewise, that are predicted to miss the latency objective even at the lowest
            budget.
        calibration: a calibration that elit plan keeps (it says in which file): what budgets cost on this machine, so
            that the server does not measure it, and how much they and fewer steps change an image.
        steps: number of sampling steps.
        min_steps: under load, images for which a request names neither steps nor a budget may also get fewer steps,
            down to this. Without a calibration, the server makes one when it starts. By default no fewer than --steps.
        max_steps: the most that a request may ask for.
        solver: euler, heun (second order, two evaluations a step) or sde (adds noise at each step).
        class_names: a text file with the name of each class on a line of its own, which prompts may use.
        autoencoder: a diffusers autoencoder that decodes the samples of a model on latents: a folder or a Hub id.
        text_encoder: for a model of text, what embeds the prompts: the text encoder of transformers that the model was
            trained with (a folder or a Hub id), or words.
        request_seconds: the longest time for an answer, the wait in the queue included.
        drain_seconds: how long SIGTERM lets accepted requests go on.
        page: whether to serve the page at /.
        replicas: number of processes with an engine each, on a Ray cluster; by default the one engine of this process.
        max_replicas: start more replicas under load, up to this many.
        target_requests: requests on each replica above which more replicas are started.
        replica_cpus: CPUs that the cluster keeps for a replica.
        replica_gpus: GPUs that it keeps for one; by default 1 where the device is a GPU.
        ray_address: of a running Ray cluster, such as auto; by default one is started on this machine.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    name: str | None = None
    api_key: str | None = field(default=None, repr=False)
    latency_objective_ms: float | None = None
    min_budget: float | None = None
    queue_limit: int = 1024
    refuse_late: bool = True
    calibration: Path | None = None
    steps: int = 40
    min_steps: int | None = None
    max_steps: int = 250
    solver: Literal["euler", "heun", "sde"] = "euler"
    class_names: Path | None = None
    autoencoder: str = "stabilityai/sd-vae-ft-ema"
    text_encoder: str = "words"
    request_seconds: float = 600.0
    drain_seconds: float = 60.0
    page: bool = True
    replicas: int | None = None
    max_replicas: int | None = None
    target_requests: float = 8.0
    replica_cpus: float = 1.0
    replica_gpus: float | None = None
    ray_address: str | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= self.max_steps:
            raise ElitError(f"steps is {self.steps}; it must be between 1 and max_steps, {self.max_steps}")
        if self.min_steps is not None and not 1 <= self.min_steps <= self.steps:
            raise ElitError(f"min_steps is {self.min_steps}; it must be between 1 and steps, {self.steps}")
        for name in ("request_seconds", "drain_seconds"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ElitError(f"{name} is {getattr(self, name)}; it must be a number of seconds above 0")
        if not 0 <= self.port < 2**16:
            raise ElitError(f"port is {self.port}; it must be between 0 and 65535")
        for name in ("max_replicas", "ray_address"):
            if self.replicas is None and getattr(self, name) is not None:
                raise ElitError(f"{name} needs replicas; say how many there are, such as --replicas 2")
        self.api_key = self.api_key or os.environ.get("ELIT_API_KEY") or None

    def engine_options(self) -> EngineOptions:
        """Returns the options of the engine.

        Raises:
            ElitError: one of them is out of range.
        """
        return EngineOptions(
            latency_objective=None if self.latency_objective_ms is None else self.latency_objective_ms / 1e3,
            min_budget=self.min_budget,
            queue_limit=self.queue_limit,
            refuse_late=self.refuse_late,
            exit_on_death=True,
            path=self.path,
        )

    def read_calibration(self, model: Model) -> Calibration | None:
        """Reads the calibration, where there is one.

        Raises:
            ElitError: it cannot be read, is of another model, machine, solver or path, or, where ``min_steps`` is set,
                was measured with another guidance.
        """
        if self.calibration is None:
            return None
        found = Calibration.load(self.calibration)
        there = found.stamp
        given = {"batch_size": there["batch_size"], "guidance": found.tables[0].guidance, "seed": there["seed"]}
        for key, here in calibration_stamp(model, solver=self.solver, path=self.path, **given).items():
            if there.get(key) != here:
                raise ElitError(
                    f"{self.calibration} was measured with another {key} ({reprlib.repr(there.get(key))}; here it is "
                    f"{reprlib.repr(here)}); leave --calibration out, or make one here with elit plan"
                )
        own, asked = found.tables[0].guidance, self.make_guidance()
        if self.min_steps is not None and own != asked:
            raise ElitError(
                f"{self.calibration} was measured with the guidance {own or 'none'}, and requests get "
                f"{asked or 'none'}: what fewer steps harm depends on it; leave --calibration out, or make one here "
                "with elit plan"
            )
        return found

    def read_class_names(self, model: Model) -> list[str]:
        """Reads the names of the classes.

        Raises:
            ElitError: the file cannot be read, or has another number of names than the model has classes.
        """
        if self.class_names is None:
            return []
        try:
            names = Path(self.class_names).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ElitError(f"cannot read the class names in {self.class_names}: {error}") from error
        if len(names) != model.config.num_classes:
            raise ElitError(
                f"{self.class_names} has {len(names)} lines; the model has {model.config.num_classes} classes"
            )
        return names


def make_pipeline(options: ServeOptions) -> Pipeline:
    """Loads the model, and what encodes prompts and decodes latents.

    Raises:
        ElitError: one of them is not there, or does not fit.
    """
    engine_options = options.engine_options()
    model = options.load_model(default_device(options.device))
    calibration = options.read_calibration(model)
    costs = None if calibration is None else CostTable.from_calibration(calibration)
    if options.min_steps is not None:
        costs = costs or measure_costs(model, options.path)
        calibration = calibration or calibrate_here(model, options)
        points = points_from(calibration, costs, options.steps, options.min_steps, options.min_budget or 0.0)
        engine_options = replace(engine_options, points=points)
    channels = model.config.in_channels
    return Pipeline(
        Engine(model, engine_options, costs),
        None if channels in PIXELS else load_autoencoder(options.autoencoder, channels),
        open_encoder(options.text_encoder, str(model.device)) if model.takes_text else None,
    )


def calibrate_here(model: Model, options: ServeOptions) -> Calibration:
    """Measures how much lower budgets and fewer steps change the images that requests get by default.

    Raises:
        ElitError: the model takes text, or cannot be planned for.
    """
    if model.takes_text:
        raise ElitError("min_steps needs a calibration for a model of text: save that of elit.analysis.calibrate")
    labels = list(range(model.config.num_classes)) if model.conditional else None
    return calibrate(model, labels, guidance=options.make_guidance(), solver=options.solver, path=options.path)


def make_replicas(options: ServeOptions) -> "Replicas":
    """Starts replicas on a Ray cluster.

    Raises:
        ElitError: Ray is not installed, there is no such cluster, or a replica cannot be made.
    """
    options.engine_options()
    resolve(options.model)  # told now, and not by every replica
    try:
        from elit.serving.replicas import ReplicaOptions, Replicas
    except ImportError as error:
        raise ElitError(f"replicas need {error.name}: pip install 'elit-diffusion[scale-out]'") from error
    gpus = options.replica_gpus
    if gpus is None:
        gpus = 0.0 if options.device == "cpu" or not torch.cuda.is_available() else 1.0
    settings = ReplicaOptions(
        replicas=1 if options.replicas is None else options.replicas,
        max_replicas=options.max_replicas,
        target_requests=options.target_requests,
        queue_limit=options.queue_limit,
        cpus=options.replica_cpus,
        gpus=gpus,
        drain_seconds=options.drain_seconds,
        address=options.ray_address,
    )
    theirs = copy(options)
    theirs.api_key = None  # the HTTP interface asks for it, which is here
    return Replicas(partial(make_pipeline, theirs), settings)


def serve(options: ServeOptions) -> None:
    """Serve a model over HTTP: OpenAI's image API, a page to try it, health and metrics.

    Under load, budgets are lowered so that answers stay in time. SIGTERM ends it when what was accepted is delivered.
    SIGHUP replaces replicas by new ones, which load the weights again; without replicas it does nothing.

    Raises:
        ElitError: a wrong option, a model that is not there, or an address that is taken.
    """
    try:
        from elit.serving.http import HttpOptions, create_app
        from elit.serving.parse import Defaults
        from elit.serving.server import open_socket, run

        if options.page:
            from elit.serving.page import mount_page
    except ImportError as error:
        raise ElitError(f"serving needs {error.name}: pip install 'elit-diffusion[serve]'") from error

    console = Console(soft_wrap=True, highlight=False)
    guidance = options.make_guidance()
    listening = open_socket(options.host, options.port)
    if options.min_steps is not None and options.calibration is None:
        console.print("measuring how much fewer steps and lower budgets change an image ...")
    pictures = make_pipeline(options) if options.replicas is None else make_replicas(options)
    name = options.name or options.model
    defaults = Defaults(
        name=name,
        steps=options.steps,
        min_steps=options.min_steps,
        max_steps=options.max_steps,
        solver=options.solver,
        guidance=guidance,
        class_names=options.read_class_names(pictures.model),
    )
    http_options = HttpOptions(
        options.api_key, request_seconds=options.request_seconds, drain_seconds=options.drain_seconds
    )
    app = create_app(pictures, defaults, http_options)
    if options.page:
        mount_page(app)
    host, port = listening.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"

    updates = set[asyncio.Task[None]]()  # the loop itself keeps no task alive

    def on_hangup() -> None:
        if isinstance(pictures, Pipeline):
            console.print("SIGHUP replaces replicas, and there are none; to load new weights, start again")
            return
        update = asyncio.get_running_loop().create_task(pictures.update())
        updates.add(update)
        update.add_done_callback(updates.discard)

    def on_start() -> None:
        console.print(f"serving {name} at [bold]{address}[/bold] (API below /v1, metrics at /metrics)")
        if options.host not in LOCAL and options.api_key is None:
            console.print("[bold]anybody who reaches this address may use it[/bold]; --api-key asks for a key")
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, on_hangup)

    run(app, listening, on_start)
