"""Paths: their derivatives, inverses and scores."""

import math

import pytest
import torch
from torch import Tensor

from elit import ElitError
from elit.flow.paths import PATHS, Path, interpolate, path_named, score, velocity

every_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())
TIMES = torch.linspace(0, 1, 21, dtype=torch.float64)


@every_path
def test_paths_run_from_data_to_noise(path: Path) -> None:
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    expected = torch.tensor([1.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(path.alpha(ends), expected, rtol=0, atol=1e-15)
    torch.testing.assert_close(path.sigma(ends), 1 - expected, rtol=0, atol=1e-15)


def test_paths_by_their_formula() -> None:
    for t in TIMES:
        linear, cosine = path_named("linear"), path_named("cosine")
        assert (linear.alpha(t), linear.sigma(t)) == (1 - t, t)
        assert cosine.alpha(t).item() == pytest.approx(math.cos(math.pi * t / 2), abs=1e-15)
        assert cosine.sigma(t).item() == pytest.approx(math.sin(math.pi * t / 2), abs=1e-15)


@every_path
def test_derivatives_are_those_of_autograd(path: Path) -> None:
    for function, derivative in ((path.alpha, path.d_alpha), (path.sigma, path.d_sigma)):
        t = TIMES.clone().requires_grad_()
        (expected,) = torch.autograd.grad(function(t).sum(), t)
        torch.testing.assert_close(derivative(TIMES), expected, rtol=0, atol=1e-14)


@every_path
def test_the_velocity_is_the_derivative_of_the_path(path: Path) -> None:
    x, noise = torch.randn(2, 21, 3, dtype=torch.float64)
    at, h = TIMES[:, None], 1e-5
    difference = (interpolate(path, x, noise, at + h) - interpolate(path, x, noise, at - h)) / (2 * h)
    # a central difference of functions whose third derivative is below 4: h^2, and 1e-16 / h of rounding
    torch.testing.assert_close(velocity(path, x, noise, at), difference, rtol=0, atol=1e-9)


@every_path
def test_time_undoes_the_log_ratio(path: Path) -> None:
    t = TIMES[1:-1]
    log_ratio = (path.sigma(t) / path.alpha(t)).log()
    torch.testing.assert_close(path.time(log_ratio), t, rtol=0, atol=1e-14)
    values = torch.linspace(-12, 12, 49, dtype=torch.float64)
    at = path.time(values)
    assert ((at > 0) & (at < 1) & (at.diff(prepend=at.new_zeros(1)) > 0)).all()
    back = (path.sigma(at) / path.alpha(at)).log()
    torch.testing.assert_close(back, values, rtol=0, atol=1e-9)  # alpha is 1e-5 at 12, and loses that many digits
    ends = path.time(torch.tensor([-math.inf, math.inf], dtype=torch.float64))
    torch.testing.assert_close(ends, torch.tensor([0.0, 1.0], dtype=torch.float64), rtol=0, atol=1e-15)


def gaussian_velocity(path: Path, x: Tensor, t: Tensor, mean: float, std: float) -> tuple[Tensor, Tensor]:
    """Velocity and score of the marginals of data N(mean, std^2), by conditioning a Gaussian."""
    alpha, sigma, d_alpha, d_sigma = path.alpha(t), path.sigma(t), path.d_alpha(t), path.d_sigma(t)
    variance = alpha**2 * std**2 + sigma**2
    d_variance = 2 * (alpha * d_alpha * std**2 + sigma * d_sigma)
    centred = x - alpha * mean
    return d_alpha * mean + d_variance / (2 * variance) * centred, -centred / variance


@every_path
@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (2.0, 0.5), (-1.0, 3.0)])
def test_the_score_is_that_of_gaussian_marginals(path: Path, mean: float, std: float) -> None:
    t = TIMES[1:, None]  # at t = 0 a velocity says nothing of the score
    x = 3 * torch.randn(20, 50, dtype=torch.float64)
    v, expected = gaussian_velocity(path, x, t, mean, std)
    # float64; the velocity loses 1 / sigma, at most 20, of its digits
    torch.testing.assert_close(score(path, x, v, t), expected, rtol=1e-11, atol=1e-11)


@every_path
def test_the_score_of_one_datum_points_back_to_it(path: Path) -> None:
    """p(x_t | x) = N(alpha x, sigma^2): its score is -noise / sigma."""
    t = TIMES[1:, None]
    x, noise = torch.randn(2, 20, 5, dtype=torch.float64)
    x_t, v = interpolate(path, x, noise, t), velocity(path, x, noise, t)
    torch.testing.assert_close(score(path, x_t, v, t), -noise / path.sigma(t), rtol=1e-11, atol=1e-11)


def test_the_linear_score_is_the_published_formula() -> None:
    x, v = torch.randn(2, 20, dtype=torch.float64)
    t = TIMES[1:]
    torch.testing.assert_close(score(path_named("linear"), x, v, t), -(x + (1 - t) * v) / t, rtol=1e-13, atol=1e-13)


def test_a_path_that_does_not_exist_is_named() -> None:
    with pytest.raises(ElitError, match="no path is named 'spiral'; there are linear, cosine"):
        path_named("spiral")
