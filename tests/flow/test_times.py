"""The densities of training times, by their quantiles."""

import math
from statistics import NormalDist
from typing import Any

import pytest
import torch
from torch import Tensor

from elit import ElitError
from elit.flow import PATHS, Path, TimeDensity
from elit.seeding import generator, normal

every_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())
COUNT = 40_000
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def below(t: Tensor, bound: float) -> float:
    return (t.double() <= bound).double().mean().item()


@every_path
@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.5, 1.5)])
def test_logit_normal_times_have_normal_log_ratios(path: Path, shift: float, mean: float, std: float) -> None:
    t = TimeDensity("logit-normal", mean, std, shift).draw(COUNT, path, generator(1, "times"))
    assert (t.dtype, t.shape) == (torch.float32, (COUNT,))
    assert ((t >= 0) & (t <= 1)).all()
    for quantile in QUANTILES:
        log_ratio = NormalDist(mean + math.log(shift), std).inv_cdf(quantile)
        bound = path.time(torch.tensor(log_ratio, dtype=torch.float64)).item()
        # four standard errors of a share of 40,000: 4 * 0.5 / 200
        assert below(t, bound) == pytest.approx(quantile, abs=0.01)


def test_logit_normal_on_the_linear_path_is_a_sigmoid_of_a_normal() -> None:
    t = TimeDensity().draw(COUNT, PATHS["linear"], generator(1, "times"))
    drawn = normal(generator(1, "times"), COUNT)
    torch.testing.assert_close(t, 1 / (1 + (-drawn).exp()), rtol=0, atol=1e-6)
    assert t.mean().item() == pytest.approx(0.5, abs=0.005)  # standard error 0.001


@every_path
def test_uniform_times_are_uniform(path: Path) -> None:
    t = TimeDensity("uniform").draw(COUNT, path, generator(2, "times"))
    for quantile in QUANTILES:
        assert below(t, quantile) == pytest.approx(quantile, abs=0.01)


@every_path
@pytest.mark.parametrize("shift", [3.0, 0.5])
def test_shift_multiplies_the_ratio_of_noise_to_signal(path: Path, shift: float) -> None:
    """The same draws, shifted: sigma / alpha is `shift` times as large, so above 1 times move to noise."""
    for kind in ("uniform", "logit-normal"):
        plain = TimeDensity(kind).draw(1000, path, generator(3, "times")).double()
        moved = TimeDensity(kind, shift=shift).draw(1000, path, generator(3, "times")).double()
        ratio = (path.sigma(moved) / path.alpha(moved)) / (path.sigma(plain) / path.alpha(plain))
        inside = (plain > 0.02) & (plain < 0.98) & (moved > 0.02) & (moved < 0.98)
        # t is float32: 6e-8 over t or 1 - t, 50 times as much at these ends, twice
        torch.testing.assert_close(ratio[inside], torch.full_like(ratio[inside], shift), rtol=2e-5, atol=0)
        assert inside.sum() > 800
        assert ((moved > plain) == (shift > 1)).all()


def test_shift_on_the_linear_path_is_the_known_formula() -> None:
    plain = TimeDensity("uniform").draw(1000, PATHS["linear"], generator(4))
    moved = TimeDensity("uniform", shift=3.0).draw(1000, PATHS["linear"], generator(4))
    torch.testing.assert_close(moved, 3 * plain / (1 + 2 * plain), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["uniform", "logit-normal"])
def test_draws_follow_their_generator(kind: Any) -> None:
    density = TimeDensity(kind, shift=2.0)
    first = density.draw(10, PATHS["linear"], generator(5))
    assert torch.equal(density.draw(10, PATHS["linear"], generator(5)), first)
    assert not torch.equal(density.draw(10, PATHS["linear"], generator(6)), first)


@pytest.mark.parametrize("kind", ["uniform", "logit-normal"])
def test_a_width_of_zero_is_one_time(kind: Any) -> None:
    t = TimeDensity(kind, std=0.0).draw(100, PATHS["linear"], generator(7))
    assert (t.std() == 0) == (kind == "logit-normal")


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"kind": "beta"}, "no time density is named 'beta'; there are uniform and logit-normal"),
        ({"shift": 0.0}, "needs shift > 0 and std >= 0, not 0.0 and 1.0"),
        ({"shift": -1.0}, "not -1.0 and 1.0"),
        ({"std": -0.1}, "not 1.0 and -0.1"),
    ],
)
def test_a_density_that_is_none_is_named(arguments: dict[str, Any], why: str) -> None:
    with pytest.raises(ElitError, match=why):
        TimeDensity(**arguments)
