"""Images with captions instead of labels."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from elit.conditions import Text, map_condition
from elit.data.dataset import Data, StagedData, finish, read
from elit.data.digits import digits
from elit.seeding import generator, normal

NUMERALS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CAPTIONS = tuple(f"a handwritten {numeral}" for numeral in NUMERALS)


@dataclass(frozen=True)
class Captioned(StagedData):
    """Data with captions instead of labels, which are embedded when a batch asks for them, each different one once.

    Attributes:
        data: the samples.
        captions: one per sample.
        encode: prompts to text: :class:`~elit.data.text.TextEncoder` or :class:`WordVectors`.
    """

    data: Data
    captions: Sequence[str]
    encode: Callable[[Sequence[str]], Text]
    num_classes: ClassVar[int] = 0

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    def __len__(self) -> int:
        return len(self.data)

    @property
    def empty_prompt(self) -> Text:
        """The empty prompt, as the encoder embeds it."""
        return self.encode([""])

    @property
    def text_pooled(self) -> int:
        """Width of the vector for the whole prompt, which is its first token; 0 where there is none."""
        return getattr(self.encode, "pooled", 0)

    def read(self, indices: Tensor, seed: int | None = None) -> tuple[Any, tuple[str, ...], Tensor]:
        """Reads the samples, each different caption, and which of these belongs to each sample (B,)."""
        wanted = [self.captions[i] for i in indices.tolist()]
        place = {caption: i for i, caption in enumerate(dict.fromkeys(wanted))}
        rows = torch.tensor([place[caption] for caption in wanted])
        return read(self.data, indices, seed), tuple(place), rows

    def finish(self, raw: tuple[Any, tuple[str, ...], Tensor]) -> tuple[Tensor, Text]:
        """Returns samples (B, C, H, W) and their embedded captions."""
        samples, captions, rows = raw
        text = map_condition(lambda values: values[rows.to(values.device)], self.encode(captions))
        return finish(self.data, samples)[0], text


def pad_prompts(prompts: Sequence[Tensor]) -> Text:
    """Pads embedded prompts (L, D) of different lengths to the longest, with zeros."""
    tokens = pad_sequence(list(prompts), batch_first=True)
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    return Text(tokens, torch.arange(tokens.shape[1]) < lengths[:, None])


class WordVectors:
    """Encodes each word of a prompt as one random vector, the same everywhere: the smallest encoder, for first runs.

    Args:
        width: of the vectors.
    """

    def __init__(self, width: int = 32) -> None:
        self.width = width

    def __call__(self, prompts: Sequence[str]) -> Text:
        """Encodes prompts: one token per word, padded to the longest prompt; the empty prompt is a token of zeros."""
        words = [prompt.split() or [""] for prompt in prompts]
        vectors = [torch.stack([word_vector(word, self.width) for word in each]) for each in words]
        return pad_prompts(vectors)


@lru_cache(maxsize=100_000)
def word_vector(word: str, width: int) -> Tensor:
    """Draws the vector of a word (width,), a function of the word alone."""
    return normal(generator("word", word), width) if word else torch.zeros(width)


def captioned_digits(held_out: bool = False) -> Captioned:
    """Opens the digits, each with a caption such as "a handwritten three"."""
    data = digits(held_out)
    return Captioned(data, [CAPTIONS[label] for label in data.labels.tolist()], WordVectors())
