"""Computes scores from features, on their device. Memory does not grow with pairs of images.

All arithmetic is float64. On the CPU scores repeat to the last bit. A GPU adds in another order: distances differ in
the last digits of float64, so precision and recall are the same unless two distances are as near as that.
"""

import numpy as np
import torch
from torch import Tensor

from elit.errors import ElitError

NEIGHBOURS = 3
SPLIT = 5_000
KID_SUBSETS, KID_SUBSET_SIZE, KID_SEED = 100, 1_000, 2020
ROWS = 500  # of a block of distances


def inception_score(logits: Tensor, split: int = SPLIT) -> float:
    """Computes the Inception score: ``exp(E KL(p(y|x) || p(y)))`` of sequential splits, averaged.

    Source: Salimans et al. 2016, as in the ADM suite.

    Args:
        logits: (M, classes). A last split of fewer than ``split`` counts as one.
    """
    scores = []
    for part in logits.split(split):
        p = part.double().softmax(1)
        divergence = (p * (part.double().log_softmax(1) - p.mean(0, keepdim=True).log())).sum(1)
        scores.append(divergence.mean().exp())
    return float(torch.stack(scores).mean())


def precision_recall(samples: Tensor, reference: Tensor, k: int = NEIGHBOURS, rows: int = ROWS) -> tuple[float, float]:
    """Computes precision and recall (Kynkaanniemi et al. 2019).

    Precision is the fraction of samples (M, F) inside the k-nearest-neighbour ball of *any* reference image (L, F), and
    recall the reverse.

    Memory: a few blocks of ``rows`` x max(M, L), beside the features.

    Raises:
        ElitError: too few of either for k neighbours.
    """
    for name, features in (("samples", samples), ("reference images", reference)):
        if len(features) <= k:
            raise ElitError(f"precision and recall need more than {k} {name}, not {len(features)}")
    precision = _inside(samples, reference, _radii(reference, k, rows), rows)
    return precision, _inside(reference, samples, _radii(samples, k, rows), rows)


def _radii(features: Tensor, k: int, rows: int) -> Tensor:
    """Returns the squared distance of each row to its k-th neighbour, itself not counted: (M,)."""
    radii = []
    for start in range(0, len(features), rows):
        squared = _squared_distances(features[start : start + rows], features)
        each = torch.arange(len(squared), device=features.device)
        squared[each, start + each] = -1  # itself, before any rounding
        radii.append(squared.kthvalue(k + 1, dim=1).values)
    return torch.cat(radii)


def _inside(points: Tensor, centres: Tensor, radii: Tensor, rows: int) -> float:
    """Returns the fraction of points within the ball of any centre."""
    inside = sum(int((_squared_distances(part, centres) <= radii).any(1).sum()) for part in points.split(rows))
    return inside / len(points)


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """Returns the squared distances (A, B) between rows (A, F) and (B, F)."""
    a = a.double()
    squares, parts = a.square().sum(1, keepdim=True), []
    for part in b.split(ROWS):  # of float64 only a block
        c = part.double()
        parts.append(squares + c.square().sum(1) - 2 * a @ c.T)
    return torch.cat(parts, 1).clamp_min_(0)


def kernel_distance(
    samples: Tensor, reference: Tensor, subsets: int = KID_SUBSETS, size: int = KID_SUBSET_SIZE, seed: int = KID_SEED
) -> float:
    """Computes KID: unbiased MMD^2 of the kernel ``(x y / F + 1)^3``, the mean over random subsets.

    Source: Binkowski et al. 2018. Subsets are those that torch-fidelity draws. Where there are fewer images than
    ``size``, all of them are taken.

    Raises:
        ElitError: fewer than two of either.
    """
    size = min(size, len(samples), len(reference))
    if size < 2:
        raise ElitError("KID needs at least 2 samples and 2 reference images")
    draws = np.random.RandomState(seed)
    total = 0.0
    for _ in range(subsets):
        x = samples[torch.from_numpy(draws.choice(len(samples), size, replace=False))].double()
        y = reference[torch.from_numpy(draws.choice(len(reference), size, replace=False))].double()
        xx, yy, xy = (_kernel(a, b) for a, b in ((x, x), (y, y), (x, y)))
        same = (xx.sum() - xx.trace() + yy.sum() - yy.trace()) / (size * (size - 1))
        total += float(same - 2 * xy.mean())
    return total / subsets


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.T / a.shape[1] + 1) ** 3
