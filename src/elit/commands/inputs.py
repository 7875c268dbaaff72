"""What an analysis is made of: a model, held-out data, and a classifier that judges samples."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from elit.analysis import SweepConfig
from elit.commands.options import ModelOptions
from elit.commands.processes import this_process
from elit.commands.sample import PIXELS
from elit.conditions import Text
from elit.data import Data, open_data
from elit.data.autoencoder import decode, load_autoencoder
from elit.errors import ElitError
from elit.evaluation import Judge, Quality, train_classifier
from elit.models import Model
from elit.seeding import generator, permutation

SHOWN = 10  # samples in a row of a grid
REFERENCES = 1000  # real images that are judged beside samples


@dataclass(kw_only=True)
class SampleCountOptions:
    """How many samples are drawn to judge their quality.

    Attributes:
        num_samples: number of samples for each setting that is compared.
        seed: sample i starts from the noise of seed SEED + i, at every setting.
        batch_size: samples at a time.
    """

    num_samples: int = 500
    seed: int = 0
    batch_size: int = 64


@dataclass(frozen=True)
class Inputs:
    """A model and what its samples are judged by.

    Attributes:
        held_out: held-out data.
        judge: judges samples; None without labelled data.
        references: the quality of real images.
        decode: turns latents into images; None for models on pixels.
    """

    model: Model
    held_out: Data | None = None
    judge: Judge | None = None
    references: dict[str, Quality] = field(default_factory=dict)
    decode: Callable[[Tensor], Tensor] | None = None

    @property
    def shows(self) -> bool:
        """Whether samples can be shown as pictures."""
        channels, *size = self.model.input_shape()
        return len(size) == 2 and (self.decode is not None or channels in PIXELS)

    @property
    def is_rgb(self) -> bool:
        """Whether those pictures have colours."""
        return self.shows and (self.decode is not None or self.model.config.in_channels == 3)


def load_inputs(options: ModelOptions, data: str | None, autoencoder: str | None = None, judged: bool = True) -> Inputs:
    """Loads a model, and with labelled data trains a classifier that judges its samples.

    Args:
        data: name of a data set with a held-out part.
        autoencoder: a diffusers autoencoder, for models on latents.
        judged: whether samples are to be judged at all.

    Raises:
        ElitError: one of them is not there, or they do not fit together.
    """
    process = this_process(options.device, options.threads or torch.get_num_threads())
    model = options.load_model(process.device)
    decoder = None
    if autoencoder:
        decoder = partial(decode, autoencoder=load_autoencoder(autoencoder, model.config.in_channels))
    if data is None:
        return Inputs(model, decode=decoder)
    train, held_out = open_data(data), open_data(data, held_out=True)
    if tuple(train.shape) != model.input_shape():
        raise ElitError(f"{data} has samples of shape {tuple(train.shape)}; the model makes {model.input_shape()}")
    if model.config.num_classes not in (0, train.num_classes):
        raise ElitError(f"{data} has {train.num_classes} classes; the model knows {model.config.num_classes}")
    if not (judged and model.config.num_classes):
        return Inputs(model, held_out, decode=decoder)
    judge = Judge(train_classifier(train), train)
    real = judge(*held_out.batch(random_indices(held_out, REFERENCES)))
    return Inputs(model, held_out, judge, {"held-out": real}, decoder)


def random_indices(data: Data, count: int) -> Tensor:
    """Returns the indices of random samples, always the same ones: neighbours in a data set may be much alike."""
    return permutation(generator("reference", "held-out images"), len(data))[:count]


def choose_samples(
    inputs: Inputs, options: SampleCountOptions, path: str, all_of_them: bool = False
) -> SweepConfig | None:
    """Decides which samples to draw: a few for pictures alone, or None where nothing could be said of any.

    Args:
        all_of_them: draw all of them also without a judge.

    Raises:
        ElitError: too few samples, or batches of none.
    """
    count = options.num_samples
    if count < SHOWN or options.batch_size < 1:
        raise ElitError(
            f"num_samples and batch_size must be at least {SHOWN} and 1, not {count} and {options.batch_size}"
        )
    text = None
    if inputs.held_out is not None:
        _, condition = inputs.held_out.batch(random_indices(inputs.held_out, SHOWN))
        text = condition if isinstance(condition, Text) else None
    model = inputs.model
    has_conditions = text is not None or not model.conditional or bool(model.config.num_classes)
    if not has_conditions or not (inputs.judge or inputs.shows):
        return None
    only_shown = not (inputs.judge or all_of_them)
    return SweepConfig(SHOWN if only_shown else count, options.seed, text, SHOWN, options.batch_size, path)
