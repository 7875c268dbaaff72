"""Scores against independent implementations, and properties that they must have."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm
from torch import Tensor

from elit import ElitError
from elit.evaluation import Moments, frechet_distance, frechet_influence, moments
from elit.evaluation.metrics import inception_score, kernel_distance, precision_recall
from elit.evaluation.statistics import BLOCK, RunningMoments

fidelity = pytest.importorskip("torch_fidelity")


def features(count: int, dim: int = 16, seed: int = 0, shift: float = 0.0) -> Tensor:
    """Correlated, not centred, float32."""
    draws = torch.Generator().manual_seed(seed)
    mix = torch.randn(dim, dim, generator=torch.Generator().manual_seed(99))
    return (torch.randn(count, dim, generator=draws) + shift) @ mix + 1


def running(x: Tensor, *sizes: int) -> RunningMoments:
    found = RunningMoments(x.shape[1])
    for part in x.split(list(sizes)) if sizes else (x,):
        found.add(part)
    return found


def test_frechet_distance_is_that_of_torch_fidelity_and_of_scipy() -> None:
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    a, b = features(300).double(), features(400, seed=1, shift=0.3).double()
    ours = frechet_distance(running(a).moments(), running(b).moments())
    theirs = fid_statistics_to_metric(fid_features_to_statistics(a), fid_features_to_statistics(b), verbose=False)
    assert ours == pytest.approx(theirs["frechet_inception_distance"], rel=1e-9)
    x, y = a.numpy(), b.numpy()
    cov_x, cov_y = np.cov(x.T), np.cov(y.T)
    scipys = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(cov_x + cov_y - 2 * sqrtm(cov_x @ cov_y).real)
    assert ours == pytest.approx(scipys, rel=1e-9)


@pytest.mark.parametrize("count", [400, 12])
def test_influence_is_the_derivative_by_the_weight_of_a_sample(count: int) -> None:
    """Also where there are fewer samples than features, and the covariance is singular."""
    reference, x = moments(features(500)), features(count, seed=1, shift=0.3).double()
    found = frechet_influence(x, reference)
    assert found.mean().item() == pytest.approx(0, abs=1e-9 * found.abs().max().item())

    def distance(weights: Tensor) -> float:
        weights = weights / weights.sum()
        mean = weights @ x
        centred = x - mean
        return frechet_distance(Moments(mean, count / (count - 1) * (centred.T * weights) @ centred), reference)

    for sample in (0, 5, 11):
        change = 1e-5 * torch.eye(count, dtype=torch.float64)[sample]
        slope = (distance(1 / count + change) - distance(1 / count - change)) / 2e-5
        assert found[sample].item() == pytest.approx(slope, rel=1e-3, abs=1e-3 * found.abs().max().item())


def test_influences_tell_the_standard_error_of_a_difference() -> None:
    reference = moments(features(2000))

    def pair(seed: int) -> tuple[Tensor, Tensor]:
        x = features(300, seed=seed, shift=0.3)
        return x, 1.1 * x + 0.2 * features(300, seed=seed + 1000)

    differences = torch.tensor(
        [
            frechet_distance(moments(a), reference) - frechet_distance(moments(b), reference)
            for a, b in map(pair, range(60))
        ]
    )
    a, b = pair(0)
    found = (frechet_influence(a, reference) - frechet_influence(b, reference)).std() / 300**0.5
    assert found.item() == pytest.approx(differences.std().item(), rel=0.35)  # 60 draws know it to 10 %, the others too


def test_kernel_distance_is_that_of_torch_fidelity() -> None:
    from torch_fidelity.metric_kid import kid_features_to_metric

    a, b = features(120).double(), features(150, seed=1, shift=0.3).double()
    theirs = kid_features_to_metric(a, b, kid_subsets=7, kid_subset_size=50, verbose=False, rng_seed=2020)
    assert kernel_distance(a, b, subsets=7, size=50) == pytest.approx(
        theirs["kernel_inception_distance_mean"], rel=1e-9
    )


@pytest.mark.parametrize("rows", [7, 64, 1000])
def test_precision_and_recall_are_those_of_torch_fidelity_and_of_a_loop(rows: int) -> None:
    from torch_fidelity.metric_prc import prc_features_to_metric

    a, b = features(90, 5).double(), features(130, 5, seed=1, shift=0.8).double()
    ours = precision_recall(a, b, rows=rows)
    theirs = prc_features_to_metric(a, b, prc_neighborhood=3, prc_batch_size=1000, save_cpu_ram=False, verbose=False)
    assert ours == pytest.approx((theirs["precision"], theirs["recall"]))

    def covered(points: Tensor, centres: Tensor) -> float:
        radii = [sorted(float((c - other).norm()) for other in centres)[3] for c in centres]
        hits = [any(float((p - c).norm()) <= r for c, r in zip(centres, radii, strict=True)) for p in points]
        return sum(hits) / len(hits)

    assert ours == pytest.approx((covered(a, b), covered(b, a)))
    assert 0.05 < ours[0] < 0.95


def test_inception_score_is_that_of_torch_fidelity() -> None:
    from torch_fidelity.metric_isc import isc_features_to_metric

    logits = 3 * features(200, 12)
    theirs = isc_features_to_metric(logits, splits=4, shuffle=False)["inception_score_mean"]
    assert inception_score(logits, split=50) == pytest.approx(theirs, rel=1e-12)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 1700), min_size=1, max_size=6))
def test_moments_are_equal_to_the_last_bit_for_any_batch_sizes(sizes: list[int]) -> None:
    x = features(sum(sizes) + 2, 4)
    whole, parts = running(x).moments(), running(x, *sizes, 2).moments()
    assert torch.equal(whole.mean, parts.mean)
    assert torch.equal(whole.covariance, parts.covariance)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 3))
def test_moments_do_not_depend_on_the_order(seed: int) -> None:
    x = features(2 * BLOCK + 100, 4, seed)
    expected = moments(x)
    shuffled = running(x[torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))])
    for found in (shuffled.moments(), running(x).moments()):
        torch.testing.assert_close(found.mean, expected.mean, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(found.covariance, expected.covariance, rtol=1e-11, atol=1e-11)


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 100))
def test_a_set_against_itself_and_in_another_order(seed: int) -> None:
    x, y = features(80, 6, seed), features(70, 6, seed + 1, shift=0.4)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    same = running(x).moments()
    assert frechet_distance(same, same) == pytest.approx(0, abs=1e-9 * float(same.covariance.trace()))
    assert precision_recall(x, x) == (1, 1)
    assert precision_recall(x[order], y) == precision_recall(x, y)
    z = x[: len(y)]  # subsets are drawn by position: as many of both, and all are taken
    assert kernel_distance(z.flip(0), y, subsets=1) == pytest.approx(kernel_distance(z, y, subsets=1), rel=1e-9)
    ours = frechet_distance(running(x[order]).moments(), running(y).moments())
    assert ours == pytest.approx(frechet_distance(running(x).moments(), running(y).moments()), rel=1e-9)


def test_too_few() -> None:
    with pytest.raises(ElitError, match="need more than 3 samples, not 3"):
        precision_recall(features(3), features(9))
    with pytest.raises(ElitError, match="KID needs at least 2"):
        kernel_distance(features(1), features(9))
    with pytest.raises(ElitError, match="at least 2 samples, not 1"):
        running(features(1)).moments()
