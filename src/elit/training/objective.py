"""The model and its loss in one forward: what processes share, and what is wrapped for it."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elit.conditions import Condition
from elit.flow import TrainingFlow
from elit.models import Model, Transformer
from elit.training.batch import TrainingDraws
from elit.training.repa import AlignmentFeatures


class Objective(nn.Module):
    """Computes the losses of samples.

    Args:
        model: what is trained.
        flow: of the model: how data become noise, and what the loss is.
        features: that hidden tokens are aligned with (see :mod:`elit.training.repa`), or None.
        projector: of alignment.
        depth: of alignment.
        coefficient: of alignment.

    Attributes:
        terms: what is computed of each sample, by the names that the log has, and what multiplies it in the sum that
            training minimizes.
    """

    terms: dict[str, float]

    def __init__(
        self,
        model: Model,
        flow: TrainingFlow,
        features: AlignmentFeatures | None = None,
        projector: nn.Module | None = None,
        depth: int = 0,
        coefficient: float = 0.0,
    ) -> None:
        super().__init__()
        self.model = model
        self.flow = flow
        self.features = features
        self.projector = projector
        self.depth = depth
        self.terms = {"loss": 1.0} if projector is None else {"loss": 1.0, "alignment": -coefficient}

    @property
    def shards(self) -> list[nn.Module]:
        """The blocks whose weights can lie in shards and be whole only while they run."""
        return self.model.shards

    def forward(
        self, x: Tensor, y: Condition | None, draws: TrainingDraws, level: int, features: Tensor | None = None
    ) -> Tensor:
        """Returns the losses (1, B) of flow matching; with alignment (2, B), the mean cosine similarity below them.

        Args:
            x: data (B, C, H, W).
            y: labels or text; None for an unconditional model.
            draws: of these samples.
            level: J~ of these samples; 0 without an interface.
            features: (B, N, F) of a pretrained encoder, to align with.
        """
        if self.projector is None or features is None:
            return torch.stack((self.flow_loss(x, y, draws, level),))
        hidden: list[Tensor] = []
        assert isinstance(self.model, Transformer)
        block = self.model.blocks[self.depth - 1]
        hook = block.register_forward_hook(lambda module, inputs, output: hidden.append(output))
        try:
            flow = self.flow_loss(x, y, draws, level)
        finally:
            hook.remove()
        similarity = F.cosine_similarity(self.projector(hidden[0]).float(), features.float(), dim=-1)  # (B, N)
        return torch.stack((flow, similarity.mean(1)))

    def flow_loss(self, x: Tensor, y: Condition | None, draws: TrainingDraws, level: int) -> Tensor:
        """Returns the flow-matching loss of each sample: (B,)."""
        velocity = partial(self.model, y=y, num_latents=level)
        return self.flow.loss(velocity, x, draws.t, draws.noise, draws.active)
