"""The model and its loss in one forward: what processes share, and what is wrapped for it."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elit.conditions import Condition
from elit.flow import flow_of
from elit.flow.paths import Path
from elit.models import Model, Transformer
from elit.training.batch import TrainingDraws


class Objective(nn.Module):
    """Losses of samples.

    Args:
        model: what is trained.
        path: from data to noise.
        projector: of alignment (see :mod:`elit.training.repa`), or None.
        depth: of alignment.
    """

    def __init__(self, model: Model, path: Path, projector: nn.Module | None = None, depth: int = 0) -> None:
        super().__init__()
        self.model = model
        self.path = path
        self.projector = projector
        self.depth = depth

    def forward(
        self, x: Tensor, y: Condition | None, draws: TrainingDraws, budget: float | None, features: Tensor | None = None
    ) -> Tensor:
        """Losses (1, B) of flow matching; with alignment (2, B), the negative mean cosine similarity below it.

        Args:
            x: data (B, C, H, W).
            y: labels or text; None for an unconditional model.
            draws: of these samples.
            budget: fraction of the latents; None is all.
            features: (B, N, F) of a pretrained encoder, to align with.
        """
        if self.projector is None or features is None:
            return torch.stack((self.flow_loss(x, y, draws, budget),))
        hidden: list[Tensor] = []
        assert isinstance(self.model, Transformer)
        block = self.model.blocks[self.depth - 1]
        hook = block.register_forward_hook(lambda module, inputs, output: hidden.append(output))
        try:
            flow = self.flow_loss(x, y, draws, budget)
        finally:
            hook.remove()
        similarity = F.cosine_similarity(self.projector(hidden[0]).float(), features.float(), dim=-1)  # (B, N)
        return torch.stack((flow, -similarity.mean(1)))

    def flow_loss(self, x: Tensor, y: Condition | None, draws: TrainingDraws, budget: float | None) -> Tensor:
        """(B,)."""
        velocity = partial(self.model, y=y, budget=budget)
        return flow_of(self.model, self.path).loss(velocity, x, draws.t, draws.noise, draws.active)
