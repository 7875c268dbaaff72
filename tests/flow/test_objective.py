"""The loss against its plain formula."""

import math

import pytest
import torch
from torch import Tensor

from elit.flow import PATHS, flow_matching_error, flow_matching_loss, per_token
from elit.seeding import generator, normal
from tests.helpers.models import inputs, tiny


def half_plus_time(x: Tensor, t: Tensor) -> Tensor:
    return 0.5 * x + t.view(-1, *(1,) * (x.dim() - 1))


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("shape", [(3, 2, 4, 4), (2, 2, 3, 4, 4), (4, 7)])
def test_the_loss_is_the_plain_formula(name: str, shape: tuple[int, ...]) -> None:
    x, noise = torch.randn(2, *shape)
    t = torch.rand(shape[0])
    error = flow_matching_error(half_plus_time, x, t, noise, PATHS[name])
    loss = flow_matching_loss(half_plus_time, x, t, noise, PATHS[name])
    assert error.shape == shape
    assert loss.shape == (shape[0],)
    for i in range(shape[0]):
        s, squares = t[i].item(), []
        a, b, da, db = (1 - s, s, -1.0, 1.0) if name == "linear" else (
            math.cos(math.pi * s / 2), math.sin(math.pi * s / 2),
            -math.pi / 2 * math.sin(math.pi * s / 2), math.pi / 2 * math.cos(math.pi * s / 2),
        )  # fmt: skip
        for datum, eps in zip(x[i].flatten().tolist(), noise[i].flatten().tolist(), strict=True):
            squares.append((0.5 * (a * datum + b * eps) + s - (da * datum + db * eps)) ** 2)
        # float32 arithmetic on values of about 3
        torch.testing.assert_close(error[i].flatten().tolist(), squares, rtol=1e-4, atol=1e-5)
        assert loss[i].item() == pytest.approx(sum(squares) / len(squares), rel=1e-5)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())
def test_the_true_velocity_of_a_pair_has_no_loss(path: object) -> None:
    x, noise, t = torch.randn(4, 3, 2), torch.randn(4, 3, 2), torch.rand(4)

    def knows(_: Tensor, at: Tensor) -> Tensor:
        at = at.view(-1, 1, 1)
        return path.d_alpha(at) * x + path.d_sigma(at) * noise  # type: ignore[attr-defined]

    assert not flow_matching_loss(knows, x, t, noise, path).any()  # type: ignore[arg-type]


def test_the_best_constant_has_the_variance_of_the_target_as_loss() -> None:
    """Of zero-mean data with variance 4: E |noise - x|^2 = 5 for an answer of zero."""
    draws = generator(0, "objective")
    x, noise = 2 * normal(draws, (2000, 16)), normal(draws, (2000, 16))
    loss = flow_matching_loss(lambda x, t: torch.zeros_like(x), x, torch.rand(2000), noise, PATHS["linear"])
    assert loss.mean().item() == pytest.approx(5.0, rel=0.03)  # standard error sqrt(2 / 32,000), 0.8 %


def test_the_error_of_half_precision_is_measured_in_float32() -> None:
    def half(x: Tensor, t: Tensor) -> Tensor:
        return half_plus_time(x, t).bfloat16()

    x, noise = torch.randn(2, 3, 5)
    error = flow_matching_error(half, x, torch.rand(3), noise, PATHS["linear"])
    assert error.dtype == torch.float32


def test_the_loss_trains_a_model() -> None:
    model = tiny()
    x, t, y = inputs(model, 3)
    noise = torch.randn_like(x)
    loss = flow_matching_loss(lambda x, t: model(x, t, y, budget=0.5), x, t, noise, PATHS["linear"])
    at = t.view(-1, 1, 1, 1)
    expected = (model((1 - at) * x + at * noise, t, y, budget=0.5) - (noise - x)).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    loss.mean().backward()
    assert model.patch_embed.weight.grad is not None
    assert model.patch_embed.weight.grad.any()


@pytest.mark.parametrize(("patch", "size"), [(1, (3, 4)), (2, (4, 6)), (4, (8, 4))])
def test_the_map_has_the_mean_of_each_token(patch: int, size: tuple[int, int]) -> None:
    error = torch.rand(2, 3, *size)
    tokens = per_token(error, patch)
    assert tokens.shape == (2, size[0] // patch, size[1] // patch)
    for i in range(tokens.shape[1]):
        for j in range(tokens.shape[2]):
            part = error[:, :, i * patch : (i + 1) * patch, j * patch : (j + 1) * patch]
            torch.testing.assert_close(tokens[:, i, j], part.flatten(1).mean(1))
    torch.testing.assert_close(tokens.flatten(1).mean(1), error.flatten(1).mean(1))
