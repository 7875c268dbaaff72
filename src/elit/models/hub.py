"""Saving and sharing: what every model has of ``save_pretrained``, ``from_pretrained`` and ``push_to_hub``."""

from pathlib import Path
from typing import Any, Self

from huggingface_hub import ModelCard, PyTorchModelHubMixin

from elit.errors import ElitError
from elit.interface import listed

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


class HubModel(PyTorchModelHubMixin, library_name="elit"):
    """Adds saving to a folder or the Hub, and loading from them, to a model."""

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """Writes the card that is saved beside the weights, for the author to complete."""
        from elit.models.registry import describe_name  # it knows all models, and they know this class

        model: Any = self
        elastic = "no latent interface"
        if model.interface is not None:
            levels = listed(model.interface.trained_levels)
            elastic = f"trained with {levels} of {model.num_latents} latents a window"
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        labels = "labels=[0, 1], " if model.config.num_classes else "prompts, " if model.takes_text else ""
        return ModelCard(
            CARD.format(name=describe_name(model.config), millions=millions, elastic=elastic, labels=labels)
        )

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
        from elit.models.files import save_model  # it knows all models, and they know this class

        save_model(self, save_directory)  # type: ignore[arg-type]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> Self:
        """Loads a model as :func:`elit.load` does, and checks its class.

        Raises:
            ElitError: nothing is there, it is damaged, or it is a model of another class.
        """
        from elit.models.files import load

        model = load(pretrained_model_name_or_path, **options)
        if not isinstance(model, cls):
            raise ElitError(f"{pretrained_model_name_or_path} holds a {type(model).__name__}, not a {cls.__name__}")
        return model
