"""Which latents training drops: the tail of every window, or random ones.

    python experiments/dropping.py     # docs/results/experiments.md

Both models keep the first latents when they are measured.
"""

import torch
from jsonargparse import auto_cli
from torch import Tensor, nn

from common import ELASTIC, Setting, Variant, compare
from elit.interface import LatentInterface, TokenGrid
from elit.layers import Rotary
from elit.seeding import generator, permutation
from elit.training import Trainer


class RandomDropping(LatentInterface):
    """Keeps the latents that ``order`` (J,) names first, in place of the first ones."""

    order: Tensor

    def read(self, windows: Tensor, c: Tensor, level: int) -> Tensor:
        latents = super().read(windows, c, self.num_latents)  # each is read on its own: the others change none
        return latents[:, :, self.order[:level].to(latents.device)]

    def core_rope(self, grid: TokenGrid, level: int, device: torch.device) -> Rotary | None:
        rope = super().core_rope(grid, self.num_latents, device)
        if rope is None:
            return None
        by_window = (table.unflatten(0, (grid.num_windows, self.num_latents)) for table in rope)
        return Rotary(*(table[:, self.order[:level].to(device)].flatten(0, 1) for table in by_window))


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
