"""What held-out data say of the averaged weights while a run trains."""

import torch

from elit.data import Data, ImageData, open_data
from elit.errors import ElitError
from elit.evaluation import held_out_loss
from elit.interface import check_budget
from elit.models import DFM, Model
from elit.training.config import TrainConfig


class Validation:
    """The held-out loss at each of a configuration's budgets.

    Args:
        model: what is trained.
        held_out: instead of the held-out part of the data set that the configuration names.

    Raises:
        ElitError: a setting out of its range, or data without a held-out part.
    """

    def __init__(self, config: TrainConfig, model: Model, held_out: Data | None = None) -> None:
        self.config = config
        wanted = config.validation
        for name in ("every", "images"):
            if getattr(wanted, name) < 0:
                raise ElitError(f"validation.{name} is {getattr(wanted, name)}; it must be at least 0")
        for name in ("samples", "sampling_steps"):
            if getattr(wanted, name) < 1:
                raise ElitError(f"validation.{name} is {getattr(wanted, name)}; it must be at least 1")
        budgets = [check_budget(budget, "validation.budgets") for budget in wanted.budgets]
        self.budgets: list[float] = budgets if model.interface is not None else [1.0]
        self.data: ImageData | None = None
        if wanted.every and not isinstance(model, DFM):  # its loss has no one time; it has sample grids
            data = (
                open_data(config.data, held_out=True, text_encoder=config.text_encoder)
                if held_out is None
                else held_out
            )
            x, y = data.batch(torch.arange(min(wanted.samples, len(data))))
            self.data = ImageData(x, y, data.num_classes)

    def due(self, step: int) -> bool:
        """Whether a step ends with a validation."""
        return bool(self.config.validation.every) and step % self.config.validation.every == 0

    def losses(self, model: torch.nn.Module) -> dict[str, float]:
        """Mean held-out loss, as ``held_out_loss/BUDGET``. All budgets and all steps see the same times and noise."""
        assert isinstance(model, Model)
        if self.data is None:
            return {}
        config = self.config
        return {
            f"held_out_loss/{budget:g}": float(
                held_out_loss(model, self.data, budget, config.times, config.path, seed=config.seed).mean()
            )
            for budget in self.budgets
        }
