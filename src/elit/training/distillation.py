"""Distillation of a pretrained transformer into its own elastic version: what a run is told, and its losses."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from elit.conditions import Condition, Text
from elit.data import Captioned, Data
from elit.data.captions import WordVectors
from elit.errors import ElitError
from elit.flow import TimeDensity
from elit.integrations.distillation import distillation_terms
from elit.interface.retrofit import Start
from elit.models import Model
from elit.seeding import torch_seeded
from elit.training.batch import TrainingDraws
from elit.training.budgets import training_levels
from elit.training.build import Task
from elit.training.config import OptimizerConfig, RunConfig
from elit.training.objective import Objective

GUIDANCE_SCALE = 3.5  # of the pipeline of FLUX

if TYPE_CHECKING:  # these modules import diffusers
    from elit.integrations.noising import Noising
    from elit.integrations.pretrained import Pretrained
    from elit.integrations.student import Student


@dataclass
class RetrofitConfig:
    """Where the interface is put. Sides of windows are given in ``elit.group_size``; see ``elit.elastify``.

    Attributes:
        read_after: number of blocks before Read; by default 2/15 of all.
        write_after: number of blocks before Write; by default as many blocks come after it as come before Read.
        min_latents: smallest number of latents per window; by default 1/16 of all, or the smallest of ``elit.levels``.
        start: what the interface does before any training. base: full budget is the base, exactly. paper: latents are
            learned vectors, and the model begins as its head and tail.
    """

    read_after: int | None = None
    write_after: int | None = None
    min_latents: int | None = None
    start: Start = "base"


@dataclass
class DistillConfig(RunConfig):
    """A run that distils a pretrained transformer into its own elastic version.

    Attributes:
        base: the pretrained model: a pipeline or transformer of diffusers, a folder or a Hub id.
        data: what to train on: a folder of latents of the autoencoder of the base, see elit prepare encode; or another
            data set of the shape and classes of the base.
        trainable: the weights that are trained. interface: Read and Write alone. interface+core-lora: also adapters
            (LoRA) of the core, which are merged into the result. all: every weight; the base is then held twice.
        lora_rank: of the adapters.
        guidance_scale: what a base is told that takes the scale of guidance as an input (FLUX.1-dev); by default 3.5.
        distillation: weight of the distance from the base in the loss, where 1 counts as much as the loss that the base
            was trained with; 0 is none.
        retrofit: where the interface is put.
        times: density of the training times of a base that predicts velocities; one that predicts noise sees the steps
            of its scheduler uniformly.
        label_dropout: fraction of labels or captions replaced by the null class or the empty prompt, for guidance.
    """

    base: str = "facebook/DiT-XL-2-256"
    out: str = "runs/distill"
    trainable: Literal["interface", "interface+core-lora", "all"] = "interface"
    lora_rank: int = 16
    guidance_scale: float | None = None
    distillation: float = 1.0
    retrofit: RetrofitConfig = field(default_factory=RetrofitConfig)
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(warmup_steps=500))
    steps: int = 20_000
    batch_size: int = 64


class Distillation(Objective):
    """Computes the loss that the base was trained with, and the distance of a student from its base.

    Args:
        model: the student.
        flow: of its base.
        weight: of the distance; 0 asks for none.
        teacher: the base, where all weights of the student are trained; None where the student holds those of the base
            as they were, and answers for it.
    """

    model: "Student"
    flow: "Noising"

    def __init__(self, model: "Student", flow: "Noising", weight: float, teacher: nn.Module | None) -> None:
        super().__init__(model, flow)
        self.teacher = teacher
        if weight:
            self.terms = {"loss": 1.0, "distillation": weight, "distance": 0.0}

    @property
    def shards(self) -> list[nn.Module]:
        """The blocks of the student, and of a teacher of its own, whose weights can lie in shards."""
        of_teacher = [] if self.teacher is None else self.model.transformer.shards_of(self.teacher)
        return self.model.shards + of_teacher

    def forward(
        self, x: Tensor, y: Condition | None, draws: TrainingDraws, level: int, features: Tensor | None = None
    ) -> Tensor:
        """Returns the losses (1, B), or (3, B) with what :func:`~elit.integrations.distillation.distillation_terms`
        says.

        Args:
            x: data (B, C, H, W), or of video (B, C, T, H, W).
            y: labels or text.
            draws: of these samples.
            level: J~ of these samples.
            features: of no use here.
        """
        if len(self.terms) == 1:
            return super().forward(x, y, draws, level)
        assert y is not None
        x_t, target = self.flow.noised(x, draws.t, draws.noise[0])
        of_base = self.model.as_base(x_t, draws.t, y, self.teacher)
        return distillation_terms(self.model(x_t, draws.t, y, num_latents=level), target, of_base)


# ------------------------------------------------------------------------------------------------ making one


def build_distillation(config: DistillConfig, data: Data) -> Task:
    """Makes the task of distilling a pretrained transformer.

    Raises:
        ElitError: a base that is not there or cannot be distilled, data that are not of its kind, or settings that do
            not fit.
    """
    pretrained, noising, student_module = _import()
    _check_settings(config)
    base = pretrained.find_pretrained(config.base)
    empty = check_data(base, data, config.data)
    flow = _flow(config, base, data, noising)
    channels, *size = data.shape
    with torch_seeded(config.seed, "weights"):
        student = student_module.Student(
            student_module.StudentConfig(
                base=config.base,
                trainable=config.trainable,
                in_channels=channels,
                input_size=tuple(size),
                num_classes=0 if empty is not None else base.config["num_embeds_ada_norm"],
                lora_rank=config.lora_rank,
                guidance_scale=_guidance_scale(config, base),
                empty_shape=None if empty is None else (len(empty), empty.shape[1]),
                **_place(config),
            )
        )
    if empty is not None:
        student.empty_prompt.copy_(empty)
    check_grid(student, data)
    levels = training_levels(config.elit, student)

    def objective(device: torch.device) -> Objective:
        own = config.trainable == "all" and config.distillation > 0
        teacher = base.load().requires_grad_(False).to(device) if own else None
        return Distillation(student, flow, config.distillation, teacher)

    return Task(student, levels, flow, objective, save=save_result)


class Memory(NamedTuple):
    """What training holds on a device beside activations, in bytes.

    Attributes:
        trained: number of parameters that are trained.
        weights: of the student, frozen ones included.
        gradients: of what is trained.
        optimizer: its two moments.
        average: of what is trained. Frozen weights are shared with the student, but where both lie in shards.
        teacher: the base, where the student does not hold its weights as they were.
    """

    trained: int
    weights: int
    gradients: int
    optimizer: int
    average: int
    teacher: int

    @property
    def parts(self) -> tuple[int, ...]:
        """All of it, part by part."""
        return self[1:]

    @property
    def total(self) -> int:
        return sum(self.parts)


def estimate_memory(config: DistillConfig) -> dict[str, Memory]:
    """Estimates what each set of trained weights needs, from the configuration of the base: no weights are read.

    Raises:
        ElitError: a base that is not there or cannot be made elastic, or blocks or windows that do not fit.
    """
    pretrained, _, student = _import()
    base, place = pretrained.find_pretrained(config.base), _place(config)
    of_base, interface, adapters = student.count_parameters(base.on_meta(), config.lora_rank, **place)
    sets = {
        "interface": (interface, interface, 0),
        "interface+core-lora": (interface + adapters, interface + adapters, 0),
        "all": (of_base + interface, interface, of_base if config.distillation else 0),
    }
    sharded = config.parallel == "fsdp"
    return {
        name: Memory(
            trained=trained,
            weights=4 * (of_base + added),
            gradients=4 * trained,
            optimizer=8 * trained,
            average=4 * (of_base + added if sharded else trained),
            teacher=4 * teacher,
        )
        for name, (trained, added, teacher) in sets.items()
    }


def save_result(model: Model, folder: Path) -> None:
    """Writes what a student has become, as diffusers saves models."""
    student: Any = model
    student.save_result(folder)


def _place(config: DistillConfig) -> dict[str, Any]:
    """Returns the arguments of ``elit.elastify``."""
    lowest = min(config.elit.levels) if config.elit.levels else None
    place = {**vars(config.retrofit), "group_size": config.elit.group_size}
    return place | {"min_latents": config.retrofit.min_latents or lowest}


def _import() -> tuple[Any, Any, Any]:
    try:
        from elit.integrations import noising, pretrained, student
    except ImportError as error:
        raise ElitError(f"distillation needs {error.name}: pip install 'elit-diffusion[retrofit]'") from error
    return pretrained, noising, student


def _check_settings(config: DistillConfig) -> None:
    if config.optimizer.name != "adamw":
        raise ElitError("optimizer.name is muon, which is for the layers of new models; distillation takes adamw")
    if config.elit.batching != "constant":
        raise ElitError("elit.batching is scaled, which needs a model of this library; leave it out")


def _flow(config: DistillConfig, base: "Pretrained", data: Data, noising: Any) -> "Noising":
    """Makes the flow that the base was trained with."""
    if base.family.predicts == "velocity":
        return noising.PredictsVelocity(data.shape, config.times)
    if config.times != TimeDensity():
        raise ElitError(
            f"times is set, and a {base.family.base.__name__} sees the steps of its scheduler uniformly; leave it out"
        )
    return noising.PredictsNoise(data.shape, base.signal_levels())


def _guidance_scale(config: DistillConfig, base: "Pretrained") -> float | None:
    if base.config.get("guidance_embeds"):
        return GUIDANCE_SCALE if config.guidance_scale is None else config.guidance_scale
    if config.guidance_scale is not None:
        raise ElitError(f"guidance_scale is set, and the base {base.source} takes none as an input; leave it out")
    return None


def check_data(base: "Pretrained", data: Data, name: str) -> Tensor | None:
    """Checks that data are what a base draws, and returns the embedded empty prompt (L, D) of captions.

    Raises:
        ElitError: they are not.
    """
    kind, config = base.family.base.__name__, base.config
    channels, patch = base.family.data_of(config)
    shape, samples = tuple(data.shape), "clips" if len(patch) == 3 else "images"
    if len(shape) != 1 + len(patch) or shape[0] != channels:
        raise ElitError(
            f"{name} has samples of shape {shape}, and the base {base.source} takes latents of {samples} with "
            f"{channels} channels: encode {samples} with its own autoencoder (elit prepare encode --autoencoder)"
        )
    scaling = getattr(data.data if isinstance(data, Captioned) else data, "scaling", None)  # of latents
    if scaling is not None and base.scaling is not None and tuple(scaling) != base.scaling:
        raise ElitError(
            f"{name} has latents of another autoencoder than that of the base {base.source}, whose scale and shift are "
            f"others; encode {samples} with its own (elit prepare encode --autoencoder)"
        )
    if kind == "DiTTransformer2DModel" and shape[1:] != (config["sample_size"],) * 2:
        side = config["sample_size"]
        raise ElitError(f"{name} has samples of {shape[1]}x{shape[2]}; the base {base.source} makes {side}x{side}")
    size, of_patches = ("x".join(map(str, sides)) for sides in (shape[1:], patch))
    if any(side % of_patch for side, of_patch in zip(shape[1:], patch, strict=True)):
        raise ElitError(f"{name} has samples of {size}, which patches of {of_patches} do not tile")
    most = config.get("pos_embed_max_size")  # of Stable Diffusion 3
    if most is not None and max(shape[1:]) > most * patch[0]:
        raise ElitError(
            f"{name} has samples of {size}, and the base {base.source} knows positions up to {most * patch[0]} a side"
        )
    if base.family.condition != "classes":
        return _check_captions(base, data, name)
    _check_classes(base, data, name)
    return None


def _check_classes(base: "Pretrained", data: Data, name: str) -> None:
    known = base.config["num_embeds_ada_norm"]
    if not 0 < data.num_classes <= known:
        raise ElitError(f"{name} has {data.num_classes or 'no'} classes; the base {base.source} knows {known}")


def _check_captions(base: "Pretrained", data: Data, name: str) -> Tensor:
    width = base.config[base.family.text_width]
    remedy = "embed captions by the text encoder of the base, with elit prepare encode --text-encoder"
    empty: Text | None = getattr(data, "empty_prompt", None)
    by_words = isinstance(data, Captioned) and isinstance(data.encode, WordVectors)  # no encoder was given
    if empty is None or by_words:
        what = "captions that are not embedded" if by_words else "no captions"
        raise ElitError(f"{name} has {what}, and the base {base.source} needs text embeddings; {remedy}")
    if empty.tokens.shape[2] != width:
        raise ElitError(
            f"{name} has text embeddings of width {empty.tokens.shape[2]}, and the base {base.source} takes {width}; "
            f"{remedy}"
        )
    pooled = base.config["pooled_projection_dim"] if base.family.condition == "pooled captions" else 0
    found: int | None = getattr(data, "text_pooled", 0)
    if found is None:
        raise ElitError(
            f"{name} was encoded by an earlier version, which did not keep of which kind prompts are; {remedy}"
        )
    if found != pooled:
        vector = "no vector for the whole prompt" if not found else f"a vector of width {found} for the whole prompt"
        wanted = f"takes one of width {pooled}" if pooled else "takes none"
        raise ElitError(
            f"{name} has {vector}, and the base {base.source} {wanted}; embed captions with elit prepare encode "
            "--text-encoder and the folder of its pipeline"
        )
    return empty.tokens[0, empty.mask[0]]


def check_grid(student: "Student", data: Data) -> None:
    """Checks that windows tile the tokens of the data.

    Raises:
        ElitError: they do not.
    """
    transformer = student.transformer
    y: Condition = torch.zeros(1, dtype=torch.long)
    if student.takes_text:
        empty = student.empty_prompt[None]
        y = Text(empty, torch.ones(empty.shape[:2], dtype=torch.bool))
    x = torch.zeros(1, *data.shape)
    size = transformer.grid_size(student.inputs(x, torch.zeros(1), y))
    transformer.layout_of(size, transformer.num_latents, x.device)
