"""What a model is conditioned by: labels, or text. Everything between a user and a model passes it on unseen."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
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
    """``change`` on the tensors of one condition, or on those of the same place of several."""
    if isinstance(conditions[0], Text):
        return Text(*(change(*tensors) for tensors in zip(*conditions, strict=True)))
    return change(*conditions)


def cat_conditions(*conditions: Condition) -> Condition:
    """One batch of several."""
    return map_condition(lambda *tensors: torch.cat(tensors), *conditions)


def condition_size(condition: Any) -> int:
    """B, also of a list of labels."""
    return len(condition.mask if isinstance(condition, Text) else condition)
