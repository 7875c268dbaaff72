"""What a model is conditioned by: labels, or text. Everything between a user and a model passes it on unseen."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor


class Text(NamedTuple):
    """Embedded prompts.

    Attributes:
        tokens: (B, L, D_text), what a text encoder gives.
        mask: (B, L), True where there is a token and False where there is padding.
    """

    tokens: Tensor
    mask: Tensor


Condition: TypeAlias = Tensor | Text
"""Labels (B,), or text: one tensor or several, whose first axis is the batch."""


def map_condition(change: Callable[..., Tensor], *conditions: Any) -> Any:
    """Applies ``change`` to the tensors of a condition, or to those of the same place of several conditions."""
    if isinstance(conditions[0], Text):
        return Text(*(change(*tensors) for tensors in zip(*conditions, strict=True)))
    return change(*conditions)


def select_condition(condition: Any, rows: slice | Tensor) -> Any:
    """Returns the conditions of some samples of a batch."""
    return map_condition(lambda tensor: tensor[rows], condition)


def cat_conditions(*conditions: Any) -> Any:
    """Puts conditions into one batch. Texts of different lengths are padded to the longest."""
    if isinstance(conditions[0], Text):
        longest = max(text.mask.shape[1] for text in conditions)
        conditions = tuple(_padded(text, longest) for text in conditions)
    return map_condition(lambda *tensors: torch.cat(tensors), *conditions)


def _padded(text: Text, length: int) -> Text:
    spare = length - text.mask.shape[1]
    return Text(F.pad(text.tokens, (0, 0, 0, spare)), F.pad(text.mask, (0, spare), value=False)) if spare else text


def condition_size(condition: Any) -> int:
    """Returns the number of samples, B, also of a list of labels."""
    return len(condition.mask if isinstance(condition, Text) else condition)
