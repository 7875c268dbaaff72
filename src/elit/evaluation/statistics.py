"""Mean and covariance of features that come in pieces."""

import torch
from torch import Tensor

from elit.errors import ElitError
from elit.evaluation.frechet import Moments

BLOCK = 1_000


class RunningMoments:
    """Moments (float64) of rows that are added in pieces.

    Rows are summed in blocks of :data:`BLOCK` in the order they come, whatever the pieces: the result is the same to
    the last bit for any batch size. Memory: one block and the F x F scatter.
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self.mean = torch.zeros(dim, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64, device=device)  # sum of (x - mean) (x - mean)^T
        self._waiting: list[Tensor] = []

    def add(self, features: Tensor) -> None:
        """Adds rows (B, F)."""
        self._waiting.append(features.double())
        if sum(map(len, self._waiting)) >= BLOCK:
            blocks = torch.cat(self._waiting).split(BLOCK)
            self._waiting = [] if len(blocks[-1]) == BLOCK else [blocks[-1]]
            for block in blocks[: len(blocks) - len(self._waiting)]:
                self._merge_block(block)

    def moments(self) -> Moments:
        """Returns mean and covariance, the latter with M - 1.

        Raises:
            ElitError: fewer than two rows.
        """
        self._flush()
        if self.count < 2:
            raise ElitError(f"a Frechet distance needs at least 2 samples, not {self.count}")
        return Moments(self.mean.clone(), self.scatter / (self.count - 1))

    def _flush(self) -> None:
        """Merges the last block, which may be short; rows that follow start a new one."""
        if self._waiting:
            self._merge_block(torch.cat(self._waiting))
            self._waiting = []

    def _merge_block(self, block: Tensor) -> None:
        mean = block.mean(0)
        centred = block - mean
        self._merge(len(block), mean, centred.T @ centred)

    def _merge(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        """Merges the moments of other rows (Chan, Golub & LeVeque 1983)."""
        if not count:
            return
        total = self.count + count
        difference = mean - self.mean
        self.scatter += scatter + torch.outer(difference, difference) * (self.count * count / total)
        self.mean = self.mean + difference * (count / total)
        self.count = total
