"""The Frechet distance between two sets of features."""

from typing import NamedTuple

import torch
from torch import Tensor

from elit.errors import ElitError


class Moments(NamedTuple):
    """Mean (F,) and covariance (F, F) of features, float64."""

    mean: Tensor
    covariance: Tensor


def moments(features: Tensor) -> Moments:
    """Computes mean and covariance (with M - 1) of features (M, F).

    Raises:
        ElitError: fewer than two samples.
    """
    if len(features) < 2:
        raise ElitError(f"a Frechet distance needs at least 2 samples, not {len(features)}")
    features = features.double()
    return Moments(features.mean(0), features.T.cov())


def frechet_distance(a: Moments, b: Moments) -> float:
    """Computes ``|mean_a - mean_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2)``.

    Sources: Dowson & Landau 1982; Heusel et al. 2017. Both roots are of symmetric matrices, so no complex
    number appears.
    """
    b = Moments(*(part.to(a.mean.device) for part in b))  # those of a file are on the CPU
    values, vectors = torch.linalg.eigh(a.covariance)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp_min(0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * cross
    return max(0.0, float(distance))


def frechet_influence(features: Tensor, reference: Moments) -> Tensor:
    """Computes how much each sample moves the Frechet distance: its derivative by the weight of the sample, (M,).

    Influences have mean 0, and their standard deviation over the root of M is the standard error of the distance (the
    infinitesimal jackknife, Efron 1982). Those of two sets of samples that began with the same noise may be subtracted,
    sample by sample: then it is the standard error of the difference of their distances.

    Args:
        features: (M, F).
        reference: from which the distance is.
    """
    mean, covariance = (part.to(features.device) for part in reference)
    ours = moments(features)
    centred = features.double() - ours.mean
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    values, vectors = torch.linalg.eigh(root @ ours.covariance @ root)
    varied = values > values[-1] * len(values) * torch.finfo(values.dtype).eps  # along the others there are no samples
    transport = root @ vectors[:, varied] * values[varied].pow(-0.25)  # by its transpose: the optimal transport's map
    of_mean = 2 * centred @ (ours.mean - mean)
    of_covariance = centred.square().sum(1) - (centred @ transport).square().sum(1)
    return of_mean + (of_covariance - of_covariance.mean()) * len(centred) / (len(centred) - 1)
