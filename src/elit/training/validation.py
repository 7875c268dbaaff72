"""What held-out data say of the averaged weights while a run trains."""

from typing import Any

import torch
from torch import Tensor

from elit.conditions import map_condition
from elit.data import Data, open_data
from elit.flow import TrainingFlow
from elit.interface import check_budget
from elit.models import Model
from elit.seeding import derive_seed
from elit.training.batch import draw
from elit.training.config import RunConfig
from elit.training.objective import Objective

DEFAULT_BUDGETS = (1 / 16, 1 / 4, 1 / 2, 1.0)
PIECE = 64  # samples in a forward; processes take whole pieces, so that their number decides no bit


class Validation:
    """The held-out loss at each of a configuration's budgets: the objective of training, on data it does not see.

    Args:
        model: what is trained.
        flow: of the model.
        held_out: instead of the held-out part of the data set that the configuration names.

    Raises:
        ElitError: a setting out of its range, or data without a held-out part.
    """

    def __init__(self, config: RunConfig, model: Model, flow: TrainingFlow, held_out: Data | None = None) -> None:
        self.config, self.flow = config, flow
        wanted = config.validation
        self.levels = validation_levels(wanted.budgets, model)
        if wanted.every and held_out is None:
            held_out = open_data(config.data, held_out=True, text_encoder=config.text_encoder)
        self.data = held_out if wanted.every else None

    def due(self, step: int) -> bool:
        """Whether a step ends with a validation."""
        return bool(self.config.validation.every) and step % self.config.validation.every == 0

    @property
    def budgets(self) -> list[float]:
        """The budgets of the held-out losses and of the rows of the sample grid."""
        return list(self.levels)

    @torch.no_grad()
    def losses(self, model: Model, accelerator: Any) -> dict[str, float]:
        """Mean held-out loss, as ``held_out_loss/BUDGET``; all processes call it, and share the work.

        All budgets and all steps see the same times and noise.
        """
        assert self.data is not None
        pieces = torch.arange(min(self.config.validation.samples, len(self.data))).split(PIECE)
        sums = torch.zeros(len(self.levels), len(pieces), device=accelerator.device)
        for piece in range(accelerator.process_index, len(pieces), accelerator.num_processes):
            sums[:, piece] = self._losses_of(pieces[piece], model)
        # Each sum is that of one process and zero elsewhere: what comes out does not depend on their number.
        means = accelerator.reduce(sums, "sum").double().sum(1) / sum(len(piece) for piece in pieces)
        return {f"held_out_loss/{budget:g}": float(mean) for budget, mean in zip(self.levels, means, strict=True)}

    def _losses_of(self, indices: Tensor, model: Model) -> Tensor:
        """Losses summed over some samples, for each budget."""
        assert self.data is not None
        device = model.device
        x, y = self.data.batch(indices)
        x = x.to(device)
        y = map_condition(lambda v: v.to(device), y) if model.conditional else None
        seed = derive_seed(self.config.seed, "held-out", int(indices[0]))
        draws, _ = draw(self.flow, self.config.label_dropout, seed, len(x), device=device)
        objective = Objective(model, self.flow)
        return torch.stack([objective(x, y, draws, level).sum() for level in self.levels.values()])


def validation_levels(budgets: list[float] | None, model: Model) -> dict[float, int]:
    """Returns the level of each budget of the validation, for a plain model of the full one alone.

    Without budgets, those of the trained levels that are nearest to 1/16, 1/4, 1/2 and all of the latents.

    Raises:
        ElitError: a budget outside (0, 1], or one that is not trained.
    """
    checked = [check_budget(budget, "validation.budgets") for budget in budgets or ()]
    if model.interface is None:
        return {1.0: 0}
    if budgets is not None:
        return {budget: model.level(budget) for budget in checked}
    nearest = (
        min(model.levels, key=lambda level: (abs(level / model.num_latents - budget), -level))
        for budget in DEFAULT_BUDGETS
    )
    return {level / model.num_latents: level for level in nearest}
