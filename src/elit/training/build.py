"""The model that a run trains, as its configuration and its data want it."""

from typing import Any

from elit.data import Captioned, Data
from elit.errors import ElitError
from elit.models import MMDiT, MMDiTConfig, Model, config_for, create
from elit.seeding import torch_seeded
from elit.training.config import TrainConfig


def build_model(config: TrainConfig, data: Data) -> Model:
    """Makes a new model that fits the data, with weights from the seed, and with the empty prompt of captions.

    Raises:
        ElitError: a name or field that does not exist, or sizes that do not fit.
    """
    channels, *size = data.shape
    fitted: dict[str, Any] = {"in_channels": channels, "num_classes": data.num_classes, "input_size": tuple(size)}
    if config.elit.group_size is not None:
        if "group_size" in config.model.fields:
            raise ElitError("group_size is given twice, in elit and in model.fields; leave one out")
        fitted["group_size"] = config.elit.group_size
    empty = None
    if isinstance(data, Captioned):
        if not isinstance(config_for(config.model.name), MMDiTConfig):
            raise ElitError(
                f"the data have captions; take a model of text like ELIT-MMDiT-B/2, not {config.model.name}"
            )
        empty = data.encode([""])
        fitted |= {"text_width": empty.tokens.shape[2], "empty_length": int(empty.mask.sum())}
    with torch_seeded(config.seed, "weights"):
        try:
            model = create(config.model.name, **(fitted | config.model.fields))
        except ElitError as error:
            if config.elit.group_size is not None and "group size" in str(error):
                raise ElitError(f"elit.group_size: {error}") from error
            raise
    if isinstance(model, MMDiT) and empty is not None:
        model.set_empty_prompt(empty)
    return model
