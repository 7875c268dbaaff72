"""The elastic version of a pretrained transformer, as the trainer sees models."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elit.conditions import Condition, Text
from elit.errors import ElitError
from elit.integrations import elastify
from elit.integrations.elastic import AS_BASE
from elit.integrations.pretrained import find_pretrained
from elit.interface.retrofit import Start
from elit.models import Model

Trainable = Literal["interface", "interface+core-lora", "all"]
TRANSFORMER = "transformer"
ADAPTER = "distilled"


@dataclass(frozen=True)
class StudentConfig:
    """What a student is made of.

    Attributes:
        base: folder or Hub id of the pretrained pipeline or transformer.
        trainable: which of its weights are trained.
        in_channels, input_size: of its data, (H, W), or of video (T, H, W).
        num_classes: of its base, whose label ``num_classes`` is "no class"; 0 for a base of captions.
        lora_rank: of the adapters of its core, where they are trained.
        guidance_scale: what a base is told that takes it as an input (FLUX.1-dev); None for all others.
        empty_shape: of the embedded empty prompt, tokens and width; None for a base of classes.
        read_after, write_after, group_size, min_latents, start: see :func:`elit.elastify`.
    """

    base: str
    trainable: Trainable
    in_channels: int
    input_size: tuple[int, ...]
    num_classes: int
    lora_rank: int = 16
    guidance_scale: float | None = None
    empty_shape: tuple[int, int] | None = None
    read_after: int | None = None
    write_after: int | None = None
    group_size: int | None = None
    min_latents: int | None = None
    start: Start = "base"


class Student(Model):
    """An elastic version of a pretrained transformer that learns to answer as the base does, at every budget.

    Its state is what is trained: the frozen weights of the base are read from the base again, and are in no checkpoint.
    New weights are drawn from torch's global generator.

    Args:
        config: what to make.

    Attributes:
        transformer: the elastic transformer.
        empty_prompt: the embedded empty prompt (L, D), for a base of captions; zeros until it is set.

    Raises:
        ElitError: there is no such base, or what is to be made of it does not fit.
    """

    config: StudentConfig
    empty_prompt: Tensor

    def __init__(self, config: StudentConfig) -> None:
        super().__init__(config)
        base = find_pretrained(config.base).load().requires_grad_(False)
        self.transformer: Any = elastify(
            base,
            config.read_after,
            config.write_after,
            group_size=config.group_size,
            min_latents=config.min_latents,
            start=config.start,
        )
        if config.trainable == "interface+core-lora":
            add_adapters(self.transformer, config.lora_rank)
        trained = self.transformer if config.trainable == "all" else self.transformer.elit
        trained.requires_grad_(True)
        for layer in idle_layers(self.transformer):  # processes would wait for their gradients
            self.transformer.get_submodule(layer).requires_grad_(False)
        if config.empty_shape is not None:
            self.register_buffer("empty_prompt", torch.zeros(config.empty_shape))
        self.eval()  # in training mode a DiT would drop labels in every block
        self.register_state_dict_post_hook(leave_out_frozen)
        self.register_load_state_dict_post_hook(miss_no_frozen)

    # -------------------------------------------------------------------------------------------- a forward

    def forward(self, x: Any, t: Tensor, y: Any = None, budget: Any = None, *, num_latents: Any = None) -> Any:
        """Predicts what the base was trained to predict: noise, which variances may follow, or velocities.

        Args:
            x: (B, C, H, W), or of video (B, C, T, H, W).
            t: (B,), steps of a scheduler for a base that predicts noise, or in [0, 1].
            y: labels (B,) or text.
            budget, num_latents: as of every model, one for all samples.
        """
        return self.predict(self.transformer, x, t, y, budget=budget, num_latents=num_latents)

    @torch.no_grad()
    def as_base(self, x: Tensor, t: Tensor, y: Condition, teacher: nn.Module | None = None) -> Tensor:
        """Predicts what the base does.

        Args:
            teacher: the base; None runs the student itself without interface and adapters, which is the base as long as
                its other weights are frozen.
        """
        if teacher is not None:
            return self.predict(teacher, x, t, y)
        with adapters_off(self.transformer):
            return self.predict(self.transformer, x, t, y, layout=AS_BASE)

    def predict(self, transformer: nn.Module, x: Tensor, t: Tensor, y: Condition, **how: Any) -> Tensor:
        """Runs a transformer, elastic or its base, and returns its prediction in the layout of x."""
        output = transformer(**self.inputs(x, t, y), **how, return_dict=False)[0]
        return self.transformer.prediction(output, x)

    def inputs(self, x: Tensor, t: Tensor, y: Condition) -> dict[str, Any]:
        """Returns the arguments of a forward of the base."""
        timestep = t if self.transformer.predicts == "noise" else t * self.transformer.timesteps
        given = self.transformer.inputs(x, timestep, y)
        if self.config.guidance_scale is not None:
            given["guidance"] = torch.full_like(t, self.config.guidance_scale)
        return given

    # -------------------------------------------------------------------------------------------- what a model is

    @property
    def stacks(self) -> list[nn.ModuleList]:
        """The lists of blocks of the transformer, in order."""
        return [getattr(self.transformer, name) for name in self.transformer.stacks]

    @property
    def shards(self) -> list[nn.Module]:
        """The blocks whose weights can lie in shards and be whole only while they run."""
        return self.transformer.shards_of(self.transformer)

    @property
    def interface(self) -> Any:  # type: ignore[override]
        """The interface of the transformer."""
        return self.transformer.elit

    def level(self, budget: float | None) -> int:
        """Turns a budget into the nearest level.

        Raises:
            ElitError: it is not in (0, 1], or below what the model may run with.
        """
        return self.transformer.level(budget)

    @property
    def takes_text(self) -> bool:
        return self.config.empty_shape is not None

    @property
    def conditional(self) -> bool:
        return True

    def null_condition(self, y: Condition) -> Condition:
        """Returns "no class", or the empty prompt padded to the length of the others.

        Raises:
            ElitError: text that is shorter than the empty prompt.
        """
        if not isinstance(y, Text):
            return super().null_condition(y)
        batch, length = y.mask.shape
        spare = length - len(self.empty_prompt)
        if spare < 0:
            raise ElitError(f"text of {length} tokens is shorter than the empty prompt, which has {length - spare}")
        tokens = F.pad(self.empty_prompt, (0, 0, 0, spare)).to(y.tokens).expand(batch, -1, -1)
        return Text(tokens, (torch.arange(length, device=y.mask.device) < length - spare).expand(batch, -1))

    # -------------------------------------------------------------------------------------------- the result

    def result(self) -> Any:
        """Returns the elastic transformer with its adapters merged into its weights; all else is shared with this
        model."""
        return merged(self.transformer)

    def save_result(self, folder: Path) -> None:
        """Writes the elastic transformer, whole, as diffusers saves models."""
        self.result().save_pretrained(folder)


# ------------------------------------------------------------------------------------------------ its state


def trained_names(model: nn.Module) -> set[str]:
    """Lists the names of the parameters that are trained, as a state dict has them."""
    wrapped = "_checkpoint_wrapped_module."  # blocks whose activations are checkpointed
    return {name.replace(wrapped, "") for name, value in model.named_parameters() if value.requires_grad}


def leave_out_frozen(model: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Takes what belongs to the base out of a state dict."""
    kept = {prefix + name for name in trained_names(model)}
    for name in [each for each in state if each.startswith(f"{prefix}{TRANSFORMER}.") and each not in kept]:
        del state[name]


def miss_no_frozen(model: nn.Module, incompatible: Any) -> None:
    """Lets a state dict lack what belongs to the base."""
    kept = trained_names(model)
    of_base = [each for each in incompatible.missing_keys if each.startswith(f"{TRANSFORMER}.") and each not in kept]
    for name in of_base:
        incompatible.missing_keys.remove(name)


# ------------------------------------------------------------------------------------------------ adapters


def idle_layers(transformer: Any) -> list[str]:
    """Lists the layers of the last block that get no gradient, see ``ElasticMixin.idle``."""
    last = transformer.stacks[-1]
    return [f"{last}.{len(getattr(transformer, last)) - 1}.{name}" for name in transformer.idle]


def adapted_layers(transformer: Any) -> list[str]:
    """Lists the linear layers of attention and feed-forward in the core: those that adapters are added to."""
    idle = tuple(idle_layers(transformer))
    core = [
        (f"{stack}.{number}.", block)
        for stack in transformer.stacks
        for number, block in enumerate(getattr(transformer, stack))
        if block.in_core
    ]
    return [
        prefix + name
        for prefix, block in core
        for name, layer in block.named_modules()
        if isinstance(layer, nn.Linear)
        and not any("norm" in part or part.endswith("_mod") for part in name.split("."))
        and not (prefix + name).startswith(idle)
    ]


def add_adapters(transformer: Any, rank: int) -> None:
    """Adds adapters (LoRA) to the core, which change nothing at first, and freezes everything else.

    Raises:
        ElitError: peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ElitError("adapters need peft: pip install 'elit-diffusion[retrofit]'") from error
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=adapted_layers(transformer))
    inject_adapter_in_model(config, transformer, adapter_name=ADAPTER)


def count_parameters(base: Any, rank: int, **settings: Any) -> tuple[int, int, int]:
    """Counts the parameters of a base, of the interface that it would get, and of adapters of its core.

    Args:
        base: the transformer, which may be on the meta device.
        rank: of the adapters.
        settings: of :func:`elit.elastify`.
    """
    elastic = elastify(base, **settings)
    sizes = (elastic.get_submodule(name).weight.shape for name in adapted_layers(elastic))
    interface = sum(parameter.numel() for parameter in elastic.elit.parameters())
    return sum(parameter.numel() for parameter in base.parameters()), interface, rank * sum(map(sum, sizes))


def adapters_of(transformer: nn.Module) -> list[tuple[str, Any]]:
    """Lists the layers that have adapters, with their names."""
    return [(name, layer) for name, layer in transformer.named_modules() if hasattr(layer, "lora_A")]


@contextmanager
def adapters_off(transformer: nn.Module) -> Iterator[None]:
    """Runs forwards without adapters.

    peft's own switch also changes which parameters want gradients, which must stay as DDP and FSDP found it.
    """
    layers = [layer for _, layer in adapters_of(transformer)]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


@torch.no_grad()
def merged(transformer: Any) -> Any:
    """Returns a transformer whose adapters are part of its weights; without any, the transformer itself."""
    if not adapters_of(transformer):
        return transformer
    shared = {id(each): each for part in (transformer.parameters(), transformer.buffers()) for each in part}
    whole = deepcopy(transformer, shared)
    for name, layer in adapters_of(whole):
        parent, _, own = name.rpartition(".")
        plain = deepcopy(layer.base_layer, shared)
        plain.weight = nn.Parameter(plain.weight + layer.get_delta_weight(ADAPTER), requires_grad=False)
        setattr(whole.get_submodule(parent), own, plain)
    return whole
