"""Conditions of a model: labels or text. Everything between a user and a model passes them on without a look."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor


class Text(NamedTuple):
    """Holds embedded prompts.

    Attributes:
        tokens: (B, L, D_text), the output of a text encoder.
        mask: (B, L), True where there is a token and False where there is padding.
    """

    tokens: Tensor
    mask: Tensor


Condition: TypeAlias = Tensor | Text
"""Labels (B,), or text: one tensor or several, whose first axis is the batch."""


def map_condition(change: Callable[..., Tensor], *conditions: Any) -> Any:
    """Applies a function to each tensor of a condition, or of several conditions to the tensors that correspond."""
    if isinstance(conditions[0], Text):
        return Text(*(change(*tensors) for tensors in zip(*conditions, strict=True)))
    return change(*conditions)


def select_condition(condition: Any, rows: slice | Tensor) -> Any:
    """Returns the conditions of some samples of a batch."""
    return map_condition(lambda tensor: tensor[rows], condition)


def cat_conditions(*conditions: Any) -> Any:
    """Concatenates conditions to one batch. Texts of different lengths are padded to the longest."""
    if isinstance(conditions[0], Text):
        longest = max(text.mask.shape[1] for text in conditions)
        conditions = tuple(_padded(text, longest) for text in conditions)
    return map_condition(lambda *tensors: torch.cat(tensors), *conditions)


def _padded(text: Text, length: int) -> Text:
    spare = length - text.mask.shape[1]
    return Text(F.pad(text.tokens, (0, 0, 0, spare)), F.pad(text.mask, (0, spare), value=False)) if spare else text


def condition_size(condition: Any) -> int:
    """Returns the number of samples, B, also of a list of labels."""
    batch = condition.mask if isinstance(condition, Text) else condition
    return batch.shape[0] if isinstance(batch, Tensor) else len(batch)  # of a tensor that is traced, len is a constant
