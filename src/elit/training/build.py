"""What a run trains, as its configuration and its data want it."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

import torch

from elit.conditions import Text
from elit.data import Data
from elit.errors import ElitError
from elit.flow import TrainingFlow, flow_of
from elit.interface import InterfaceConfig
from elit.models import Model, Transformer, config_for, create
from elit.models.files import save_model
from elit.seeding import torch_seeded
from elit.training.budgets import TrainingLevels, training_levels
from elit.training.checks import check_type
from elit.training.config import TrainConfig
from elit.training.objective import Objective
from elit.training.parallelize import apply_compile
from elit.training.repa import AlignmentFeatures, check_alignment, make_projector


@dataclass(frozen=True)
class Task:
    """What a run trains, and by which losses: all that the trainer does not know by itself.

    Attributes:
        model: what is trained.
        levels: that training draws from.
        flow: how data become noise.
        objective: makes the model and its losses one module, on a device that the model is on.
        save: writes the averaged weights, whole, into a folder from which they load.
        compile: compiles the layers of the model in place; None leaves them as they are.
    """

    model: Model
    levels: TrainingLevels
    flow: TrainingFlow
    objective: Callable[[torch.device], Objective]
    save: Callable[[Model, Path], None] = save_model
    compile: Callable[[], None] | None = None


def build_task(config: TrainConfig, data: Data) -> Task:
    """Makes the task of training a new model.

    Raises:
        ElitError: settings that do not fit the data or each other.
    """
    model, levels = build_model(config, data)
    flow, repa = flow_of(model, config.path, times=config.times, stages=config.stages), config.repa

    def objective(device: torch.device) -> Objective:
        if repa.encoder is None:
            return Objective(model, flow)
        features = AlignmentFeatures(repa.encoder, check_alignment(repa, model), data, device)
        projector = make_projector(model, features.width, config.seed).to(device)
        return Objective(model, flow, features, projector, repa.depth, repa.coefficient)

    def compile_layers() -> None:
        assert isinstance(model, Transformer)
        apply_compile(model, None if repa.encoder is None else model.blocks[repa.depth - 1])

    return Task(model, levels, flow, objective, compile=compile_layers if config.compile else None)


def build_model(config: TrainConfig, data: Data) -> tuple[Model, TrainingLevels]:
    """Makes a new model that fits the data, with weights from the seed, and works out the levels that it is trained at.

    The levels are part of the model's configuration: they are known wherever it is saved to. A model of text gets the
    empty prompt of captions.

    Raises:
        ElitError: a name or field that does not exist, or sizes and levels that do not fit.
    """
    empty: Text | None = getattr(data, "empty_prompt", None)
    fields = _fields(config, data, empty)
    with torch.device("meta"):
        plan = _create(config, fields)
    levels = training_levels(config.elit, plan)
    if levels.levels != plan.levels:
        fields["levels"] = levels.levels
    with torch_seeded(config.seed, "weights"):
        model = _create(config, fields)
    if empty is not None:
        model.set_empty_prompt(empty)
    return model, levels


def _fields(config: TrainConfig, data: Data, empty: Text | None) -> dict[str, Any]:
    """Collects the fields of the model's configuration: what the data want, and over it what the run wants."""
    channels, *size = data.shape
    fields: dict[str, Any] = {"in_channels": channels, "num_classes": data.num_classes, "input_size": tuple(size)}
    _check_fields(config, fields)
    if config.elit.group_size is not None:
        if "group_size" in config.model.fields:
            raise ElitError("group_size is given twice, in elit and in model.fields; leave one out")
        fields["group_size"] = config.elit.group_size
    if empty is not None:
        name = config.model.name
        if not hasattr(config_for(name), "text_width"):
            raise ElitError(f"the data have captions; take a model of text like ELIT-MMDiT-B/2, not {name}")
        fields |= {"text_width": empty.tokens.shape[2], "empty_length": int(empty.mask.sum())}
    return fields | config.model.fields


def _check_fields(config: TrainConfig, of_data: dict[str, Any]) -> None:
    """Checks the values that a run gives to fields of the model's configuration. Names are checked where it is built.

    Raises:
        ElitError: a value has another type, is negative, or contradicts the data.
    """
    types = get_type_hints(InterfaceConfig) | get_type_hints(type(config_for(config.model.name)))
    for name, value in config.model.fields.items():
        if name in types:
            check_type(types[name], value, f"model.fields.{name}")
        if isinstance(value, int | float) and not 0 <= value < math.inf:
            raise ElitError(f"model.fields.{name} is {value}; it must be at least 0")
    given = config.model.fields
    for name in ("in_channels", "input_size"):
        if name in given and _size(given[name]) != _size(of_data[name]):
            raise ElitError(f"model.fields.{name} is {given[name]}, and the data have {of_data[name]}; leave it out")
    classes, of_model = of_data["num_classes"], given.get("num_classes", of_data["num_classes"])
    if 0 < of_model < classes or (of_model and not classes):
        raise ElitError(f"model.fields.num_classes is {of_model}, and the data have {classes} classes; leave it out")


def _size(value: Any) -> tuple[int, ...]:
    """Returns a size as a tuple, where one number is a square's."""
    return (value, value) if isinstance(value, int) else tuple(value)


def _create(config: TrainConfig, fields: dict[str, Any]) -> Any:
    try:
        return create(config.model.name, **fields)
    except ElitError as error:
        if config.elit.group_size is not None and "group size" in str(error):
            raise ElitError(f"elit.group_size: {error}") from error
        raise
    except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
        raise ElitError(f"model.fields {config.model.fields} do not give a {config.model.name} ({error})") from error
