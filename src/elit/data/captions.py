"""Images with captions instead of labels."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from elit.conditions import Text, map_condition
from elit.data.dataset import Data
from elit.data.digits import digits
from elit.seeding import generator

NUMERALS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CAPTIONS = tuple(f"a handwritten {numeral}" for numeral in NUMERALS)


class Captioned:
    """Labelled data whose labels have become captions, embedded once.

    Args:
        data: with labels.
        captions: one per label.
        encode: prompts to text: :class:`~elit.data.text.TextEncoder` or :class:`WordVectors`.
    """

    num_classes = 0

    def __init__(self, data: Data, captions: Sequence[str], encode: Callable[[Sequence[str]], Text]) -> None:
        self.data = data
        self.text = encode(captions)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    def __len__(self) -> int:
        return len(self.data)

    def batch(self, indices: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Text]:
        """Samples (B, C, H, W) and their captions at indices (B,)."""
        x, labels = self.data.batch(indices)
        return x, map_condition(lambda values: values[labels], self.text)


class WordVectors:
    """The smallest text encoder: one random vector for each word, the same everywhere. For tests and first runs.

    Args:
        width: of the vectors.
    """

    def __init__(self, width: int = 32) -> None:
        self.width = width

    def __call__(self, prompts: Sequence[str]) -> Text:
        """One token per word, padded to the longest prompt."""
        words = [prompt.split() for prompt in prompts]
        length = max(1, *(len(each) for each in words))
        tokens = torch.zeros(len(words), length, self.width)
        for row, each in zip(tokens, words, strict=True):
            for place, word in enumerate(each):
                row[place] = torch.randn(self.width, generator=generator("word", word))
        known = torch.tensor([len(each) for each in words])
        return Text(tokens, torch.arange(length) < known[:, None])


def captioned_digits(held_out: bool = False) -> Captioned:
    """The digits, each with a caption such as "a handwritten three" of :class:`WordVectors`."""
    return Captioned(digits(held_out), CAPTIONS, WordVectors())
