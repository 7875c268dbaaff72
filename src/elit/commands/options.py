"""The options that several verbs share, each described once.

A verb's own dataclass inherits the groups that it needs, so that its options stay flat: ``--guidance-scale 2`` on the
command line, ``guidance_scale: 2`` in a YAML file.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from elit.errors import ElitError
from elit.export import is_exported, load_exported
from elit.flow import Cache, Guidance, StageSchedule
from elit.flow.pyramid import THRESHOLD
from elit.interface import Budget, BudgetByNoise
from elit.launch import DTYPES, Precision, allow_tf32, choose_precision
from elit.models import Model, compile
from elit.models.files import load

GuidanceKind = Literal["none", "cfg", "ccfg", "ag"]


@dataclass(kw_only=True)
class DeviceOptions:
    """Where a verb computes.

    Attributes:
        device: auto takes a GPU where there is one; or cpu, cuda, cuda:1, ...
        threads: number of CPU threads of a process; by default PyTorch chooses.
    """

    device: str = "auto"
    threads: int | None = None


@dataclass(kw_only=True)
class ModelOptions(DeviceOptions):
    """Which model a verb uses, and where it computes.

    Attributes:
        model: a run directory, a saved model, a published .pt file, a Hub id, or a file of elit export.
        weights: which weights of a run to take, the moving average (ema) or the raw ones.
        untrained_levels: let budgets be used that the model was not trained for; what it then makes may mean nothing.
        path: the path between noise and data that the model was trained on.
        precision: of matrix products: fp32, tf32, bf16 or fp16; auto is bf16 on a GPU and fp32 on a CPU. A CPU has no
            tf32 and no fp16. Sums, norms and softmax are float32 in each.
        compile: compile the model's layers and, on a GPU, capture its forwards in CUDA graphs. The first forwards then
            take up to a minute, and all others less time.
        trust_native_code: let an exported package (aoti) run: it is machine code, which can do whatever you can.
    """

    model: str
    weights: Literal["ema", "raw"] = "ema"
    untrained_levels: bool = False
    path: Literal["linear", "cosine"] = "linear"
    precision: Precision = "auto"
    compile: bool = False
    trust_native_code: bool = False

    def load_model(self, device: torch.device) -> Model:
        """Loads the model onto a device, in the precision asked for (``precision`` then says which one auto was) and
        compiled where that is asked for.

        Raises:
            ElitError: it is not there, or damaged, or the device lacks the precision.
        """
        if is_exported(self.model):
            return self._load_exported(device)
        self.precision = choose_precision(self.precision, device)
        if device.type != "cpu":
            allow_tf32(self.precision != "fp32")  # what is float32 under bf16 and fp16 is the autoencoder
        dtype = DTYPES[self.precision]
        model = load(
            self.model, weights=self.weights, device=device, dtype=dtype, untrained_levels=self.untrained_levels
        )
        return compile(model) if self.compile else model

    def _load_exported(self, device: torch.device) -> Model:
        """Loads an exported file, which decides its precision itself."""
        for name in ("weights", "precision", "compile"):
            if getattr(self, name) != getattr(ModelOptions, name):
                raise ElitError(f"{self.model} is an exported file: its {name} was decided then; leave --{name} out")
        model = load_exported(self.model, device=device, trust_native_code=self.trust_native_code)
        return model.allow_untrained_levels() if self.untrained_levels else model


@dataclass(kw_only=True)
class GuidanceOptions:
    """How samples are guided.

    Attributes:
        guidance: cfg drops the class in the weak term, ag lowers its budget, and ccfg does both. By default cfg if a
            scale is given, otherwise none.
        guidance_scale: how strong the guidance is; 1 is no guidance. By default 4, and 2 in elit analyze.
        guidance_budget: budget of the weak term of ccfg and ag; by default the lowest.
        guidance_interval: guidance is on between these two times; noise is 1 and data is 0.
    """

    default_scale: ClassVar[float] = 4.0

    guidance: GuidanceKind | None = None
    guidance_scale: float | None = None
    guidance_budget: float | None = None
    guidance_interval: tuple[float, float] = (0.0, 1.0)

    def make_guidance(self) -> Guidance | None:
        """Returns the guidance, or None without any.

        Raises:
            ElitError: a weak budget or an interval without guidance, or see :class:`Guidance`.
        """
        kind = self.guidance or ("none" if self.guidance_scale is None else "cfg")
        if self.guidance is None and kind == "none":
            if self.guidance_budget is not None:
                raise ElitError("guidance_budget is given without guidance; add --guidance ccfg or ag")
            if self.guidance_interval != GuidanceOptions.guidance_interval:
                raise ElitError("guidance_interval is given without guidance; add --guidance cfg, ccfg or ag")
        if kind == "none":
            return None
        scale = self.default_scale if self.guidance_scale is None else self.guidance_scale
        return Guidance(kind, scale, self.guidance_budget, self.guidance_interval)


@dataclass(kw_only=True)
class SamplerOptions(GuidanceOptions):
    """How samples are drawn; a plan decides all of these.

    Attributes:
        steps: number of sampling steps; for a multi-scale model (DFM) also one number per stage, such as [30,20], with
            the coarsest stage first.
        stage_thresholds: of a multi-scale model, the time that each stage but the last reaches before the next one
            begins; by default 0.1.
        solver: euler, heun (second order, two evaluations a step) or sde (adds noise at each step).
        budget: fraction of the latents in (0, 1], such as 0.25; or one per step, such as 0.25,0.5,1; or by noise level,
            such as 0.25@0.5,1, a quarter while t > 0.5 and all of them afterwards. By default all latents.
        cache_threshold: skip the core blocks, and use their last effect again, until the time embedding has changed by
            this fraction in all, such as 0.1. By default they run at every step.
        cache_order: what a skipped step takes of the core, its last effect (0) or one extrapolated from two (1).
    """

    steps: int | list[int] = 40
    stage_thresholds: list[float] | None = None
    solver: Literal["euler", "heun", "sde"] = "euler"
    budget: float | str | None = None
    cache_threshold: float | None = None
    cache_order: Literal[0, 1] = 0

    def sampler_arguments(self) -> dict[str, Any]:
        """Returns these options as arguments of :func:`elit.sample`.

        Raises:
            ElitError: an option that cannot be understood.
        """
        if self.cache_order and self.cache_threshold is None:
            raise ElitError("cache_order is given without a cache; add --cache-threshold")
        return {
            "steps": parse_steps(self.steps, self.stage_thresholds),
            "solver": self.solver,
            "budget": parse_budget(self.budget),
            "guidance": self.make_guidance(),
            "cache": None if self.cache_threshold is None else Cache(self.cache_threshold, self.cache_order),
        }


def parse_budget(text: float | str | None) -> Budget | None:
    """Reads a budget as it is typed: ``0.25``, ``0.25,0.5,1`` (one per step) or ``0.25@0.5,1`` (by noise level).

    Raises:
        ElitError: it is none of these.
    """
    if not isinstance(text, str):
        return text
    parts = [part.partition("@") for part in text.split(",")]
    try:
        budgets = [float(budget) for budget, _, _ in parts]
        thresholds = [float(t) for _, at, t in parts if at]
    except ValueError as error:
        raise ElitError(f"budget is {text!r}; it is a number in (0, 1], or several such as 0.25,0.5,1") from error
    return BudgetByNoise(thresholds, budgets) if thresholds else budgets


def parse_steps(steps: int | list[int], thresholds: list[float] | None) -> int | StageSchedule:
    """Returns the number of steps, or a schedule where the options say more about the stages of a multi-scale model.

    Raises:
        ElitError: see :class:`StageSchedule`.
    """
    if isinstance(steps, int) and thresholds is None:
        return steps
    if isinstance(steps, int):
        steps = list(StageSchedule.even(steps, len(thresholds or []) + 1).steps)
    return StageSchedule(steps, [THRESHOLD] * (len(steps) - 1) if thresholds is None else thresholds)
