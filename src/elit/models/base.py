"""What every backbone has: a configuration, budgets, and `save_pretrained` / `from_pretrained` / `push_to_hub`."""

from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub import ModelCard, PyTorchModelHubMixin
from torch import Tensor, nn

from elit.conditions import Condition, Text, map_condition
from elit.errors import ElitError
from elit.interface import LatentInterface, check_budget

CARD = """---
library_name: elit
tags: [elit, diffusion, flow-matching]
---

# {name}, {millions:.1f} M parameters

A diffusion transformer saved by [ELIT](https://arxiv.org/abs/2603.12245), `pip install elit-diffusion`:

```python
import elit

model = elit.load("this/repository")  # {elastic}
samples = elit.sample(model, {labels}seeds=[0, 1])
```

Fill in: training data, licence of the weights, results.
"""


class Model(nn.Module, PyTorchModelHubMixin, library_name="elit"):
    """A velocity model ``v = model(x, t, y, budget=...)``.

    Attributes:
        config: the dataclass that rebuilds it.
        interface: its latent interface, or None.
    """

    config: Any
    interface: LatentInterface | None

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    @property
    def levels(self) -> tuple[int, ...]:
        """The valid numbers of latents per window J~, ascending; empty without an interface."""
        return () if self.interface is None else self.interface.levels

    @property
    def num_latents(self) -> int:
        """J; 0 without an interface."""
        return 0 if self.interface is None else self.interface.num_latents

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def level(self, budget: float | None) -> int:
        """J~ for a budget; 0 without an interface.

        Raises:
            ElitError: a budget outside (0, 1], or below 1 without an interface.
        """
        if self.interface is not None:
            return self.interface.level(budget)
        if budget is not None and check_budget(budget) != 1:
            raise ElitError(f"budget is {budget}, but this model has no latent interface: it always runs in full")
        return 0

    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input: (C, H, W)."""
        size = self.config.input_size
        return (self.config.in_channels, *((size, size) if isinstance(size, int) else size))

    def example(self, batch_size: int) -> tuple[Any, Tensor]:
        """Random x and t of the shapes that a forward takes, on the model's device and in its dtype: for measuring."""
        x = torch.randn(batch_size, *self.input_shape(), device=self.device, dtype=self.dtype)
        return x, torch.rand(batch_size, device=self.device)

    @property
    def conditional(self) -> bool:
        """Whether a forward takes conditions: labels, or in other backbones text."""
        return bool(self.config.num_classes)

    def as_condition(self, given: Any) -> Condition:
        """Conditions as a forward takes them, on the model's device, from what a user gives: here labels (B,).

        Looks at the values of labels, once and at the user's edge (a forward does not).

        Raises:
            ElitError: no whole numbers, or a label outside 0..num_classes - 1. The null class is for guidance and
                training alone.
        """
        if isinstance(given, Text):
            raise ElitError("the model is conditioned by labels, not by text")
        try:
            y = torch.as_tensor(given)
        except (TypeError, ValueError) as error:
            raise ElitError(f"labels must be whole numbers, one per sample, not {given!r}") from error
        if y.is_floating_point() or y.dim() != 1:
            raise ElitError(f"labels must be whole numbers, one per sample, not {y.dtype} of shape {tuple(y.shape)}")
        classes = self.config.num_classes
        wrong = y[(y < 0) | (y >= classes)]
        if len(wrong):
            raise ElitError(f"label {int(wrong[0])} does not exist; the model knows 0..{classes - 1}")
        return y.to(self.device)

    def example_condition(self, batch_size: int) -> Condition | None:
        """Conditions of the shapes that a forward takes: for measuring."""
        return torch.zeros(batch_size, dtype=torch.long, device=self.device) if self.conditional else None

    def null_condition(self, y: Condition) -> Condition:
        """The condition of "no class" for each of y."""
        return map_condition(lambda labels: torch.full_like(labels, self.config.num_classes), y)

    def drop_condition(self, y: Condition, dropped: Tensor) -> Condition:
        """Conditions y of a batch, those marked in ``dropped`` (B,) replaced by :meth:`null_condition`."""

        def choose(null: Tensor, value: Tensor) -> Tensor:
            return torch.where(dropped.view(-1, *(1,) * (value.dim() - 1)), null, value)

        return map_condition(choose, self.null_condition(y), y)

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """The card that is saved beside the weights, for the author to complete."""
        elastic = f"{len(self.levels)} budgets" if self.levels else "no latent interface"
        millions = sum(p.numel() for p in self.parameters()) / 1e6
        labels = "labels=[0, 1], " if self.config.num_classes else ""
        return ModelCard(CARD.format(name=type(self).__name__, millions=millions, elastic=elastic, labels=labels))

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> str | None:
        """Writes ``config.json``, ``model.safetensors`` and a model card into a folder.

        Args:
            options: ``push_to_hub``, ``repo_id``, ... of :class:`~huggingface_hub.PyTorchModelHubMixin`.

        Raises:
            ElitError: the folder cannot be written.
        """
        try:
            return super().save_pretrained(save_directory, **options)
        except OSError as error:
            raise ElitError(f"cannot save to {save_directory}: {error.strerror or error}") from error

    def _save_pretrained(self, save_directory: Path) -> None:
        from elit.models.files import save_model

        save_model(self, save_directory)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> Self:
        """:func:`elit.load`, and a check of the class.

        Raises:
            ElitError: nothing is there, it is damaged, or it is a model of another class.
        """
        from elit.models.files import load

        model = load(pretrained_model_name_or_path, **options)
        if not isinstance(model, cls):
            raise ElitError(f"{pretrained_model_name_or_path} holds a {type(model).__name__}, not a {cls.__name__}")
        return model
