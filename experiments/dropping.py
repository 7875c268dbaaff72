"""Which latents training drops: the tail of every window, or random ones.

    python experiments/dropping.py     # docs/results/experiments.md

Both models keep the first latents when they are measured.
"""

import torch
from jsonargparse import auto_cli
from torch import Tensor, nn

from common import ELASTIC, Setting, Variant, compare
from elit.interface import LatentInterface, Spatial, TokenGrid
from elit.layers import Rotary
from elit.seeding import generator, permutation
from elit.training import Trainer


class RandomDropping(LatentInterface):
    """Keeps the latents that ``order`` (J,) names first, in place of the first ones."""

    order: Tensor

    def read(self, s: Tensor, c: Tensor, grid: TokenGrid, level: int) -> tuple[Tensor, Spatial]:
        latents, spatial = super().read(s, c, grid, self.num_latents)  # each is read on its own: the others change none
        return self.kept(latents, grid, level), spatial

    def core_rope(self, grid: TokenGrid, level: int, device: torch.device) -> Rotary | None:
        rope = super().core_rope(grid, self.num_latents, device)
        return None if rope is None else Rotary(*(self.kept(table[None], grid, level)[0] for table in rope))

    def kept(self, values: Tensor, grid: TokenGrid, level: int) -> Tensor:
        """Values of all latents (B, G * J, ...) -> of those that are kept (B, G * J~, ...)."""
        by_window = values.unflatten(1, (grid.num_windows, self.num_latents))
        return by_window[:, :, self.order[:level].to(values.device)].flatten(1, 2)


def drop_at_random(trainer: Trainer) -> None:
    """A new order for every step, the same for all windows and samples; the averaged weights stay a plain model."""
    interface = trainer.model.interface
    assert interface is not None
    interface.__class__ = RandomDropping

    def draw(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        rng = generator(trainer.config.seed, "random dropping", trainer.step)
        interface.order = permutation(rng, interface.num_latents)

    trainer.model.register_forward_pre_hook(draw)


RANDOM = Variant("random-dropping", change=drop_at_random)


def run(setting: Setting) -> None:
    compare(setting, "dropping", {"tail dropped": [ELASTIC], "random latents dropped": [RANDOM]})


if __name__ == "__main__":
    run(auto_cli(Setting))
