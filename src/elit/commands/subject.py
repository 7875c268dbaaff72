"""What an analysis is of: a model, data beside it, and what can be said and shown of its samples."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from elit.analysis import Draws
from elit.commands.info import SHOWN_BUDGETS
from elit.commands.processes import this_process
from elit.commands.sample import PIXELS
from elit.conditions import Text
from elit.data import Data, open_data
from elit.data.autoencoder import decode, load_autoencoder
from elit.errors import ElitError
from elit.evaluation import Judge, Quality, train_classifier
from elit.interface import check_budget
from elit.models import Model
from elit.models.files import load
from elit.seeding import generator, permutation

SHOWN = 10  # samples in a row of a grid
REFERENCES = 1000  # real images that are judged beside samples


class Subject(NamedTuple):
    """A model, and what can be said of its samples.

    Attributes:
        held_out: held-out data.
        judge: of samples; None without labelled data.
        references: quality of real images.
        decode: latents to images; None for models on pixels.
    """

    model: Model
    held_out: Data | None
    judge: Judge | None
    references: dict[str, Quality]
    decode: Callable[[Tensor], Tensor] | None

    @property
    def shows(self) -> bool:
        """Whether its samples can be shown as pictures."""
        channels, *size = self.model.input_shape()
        return len(size) == 2 and (self.decode is not None or channels in PIXELS)

    @property
    def is_rgb(self) -> bool:
        return self.shows and (self.decode is not None or self.model.config.in_channels == 3)


def open_subject(
    model: str,
    data: str | None,
    autoencoder: str | None,
    device: str,
    threads: int | None,
    judged: bool = True,
    weights: Literal["ema", "raw"] = "ema",
) -> Subject:
    """Loads a model, and with data trains a classifier that judges its samples.

    Args:
        model, data, autoencoder, device, threads, weights: as options of the command line.
        judged: whether samples are to be judged at all.

    Raises:
        ElitError: one of them is not there, or they do not fit together.
    """
    process = this_process(device, threads or torch.get_num_threads())
    net = load(model, weights=weights, device=str(process.device))
    decoder = None
    if autoencoder:
        decoder = partial(decode, autoencoder=load_autoencoder(autoencoder, net.config.in_channels))
    if data is None:
        return Subject(net, None, None, {}, decoder)
    train, held_out = open_data(data), open_data(data, held_out=True)
    if tuple(train.shape) != net.input_shape():
        raise ElitError(f"{data} has samples of shape {tuple(train.shape)}; the model makes {net.input_shape()}")
    if net.config.num_classes not in (0, train.num_classes):
        raise ElitError(f"{data} has {train.num_classes} classes; the model knows {net.config.num_classes}")
    if not (judged and net.config.num_classes):
        return Subject(net, held_out, None, {}, decoder)
    judge = Judge(train_classifier(train), train)
    real = judge(*held_out.batch(some_of(held_out, REFERENCES)))
    return Subject(net, held_out, judge, {"held-out": real}, decoder)


def some_of(data: Data, count: int) -> Tensor:
    """Indices of so many samples, drawn once and for all: neighbours in a data set may be much alike."""
    return permutation(generator("reference", "held-out images"), len(data))[:count]


def budgets_of(model: Model, given: Sequence[float] | None) -> list[float]:
    """Ascending, with full budget last; default every level.

    Raises:
        ElitError: a budget outside (0, 1].
    """
    if not model.levels:
        return [1.0]
    every = [level / model.num_latents for level in model.levels]
    return sorted({1.0, *(every if given is None else (check_budget(budget) for budget in given))})


def halves_of(model: Model) -> list[float]:
    """Full budget halved, as far as levels go."""
    return [b for b in SHOWN_BUDGETS if not model.levels or b * model.num_latents >= model.levels[0]]


def draws_for(
    subject: Subject, count: int, seed: int, batch_size: int, path: str, all_of_them: bool = False
) -> Draws | None:
    """What to sample: for pictures alone only a few; None where nothing could be said of samples.

    Args:
        all_of_them: also without a judge.

    Raises:
        ElitError: too few samples, or batches of none.
    """
    if count < SHOWN or batch_size < 1:
        raise ElitError(f"num_samples and batch_size must be at least {SHOWN} and 1, not {count} and {batch_size}")
    text = None
    if subject.held_out is not None:
        _, condition = subject.held_out.batch(some_of(subject.held_out, SHOWN))
        text = condition if isinstance(condition, Text) else None
    told = text is not None or not subject.model.conditional or bool(subject.model.config.num_classes)
    if not (told and (subject.judge or subject.shows)):
        return None
    few = not (subject.judge or all_of_them)
    return Draws(SHOWN if few else count, seed, text, SHOWN, batch_size, path)
