"""The loss that retrofits are trained with."""

import pytest
import torch
import torch.nn.functional as F

import elit
from elit.integrations import distillation_loss
from tests.helpers.small_retrofits import FAMILIES, make_base, predict


def test_both_losses_count_alike() -> None:
    torch.manual_seed(0)
    predicted, target, of_base = torch.randn(3, 2, 4, 8, 8).unbind()
    loss = F.mse_loss(predicted, target)
    torch.testing.assert_close(distillation_loss(predicted, target), loss)
    torch.testing.assert_close(distillation_loss(predicted, target, of_base, weight=0.0), loss)
    torch.testing.assert_close(distillation_loss(predicted, target, of_base), 2 * loss)
    torch.testing.assert_close(distillation_loss(predicted, target, of_base, weight=0.5), 1.5 * loss)


def test_a_model_that_equals_its_base_is_not_pushed_away() -> None:
    torch.manual_seed(0)
    predicted, target = torch.randn(2, 2, 4, 8, 8).unbind()
    predicted.requires_grad_()
    (slope,) = torch.autograd.grad(distillation_loss(predicted, target, predicted.detach()), predicted)
    (plain,) = torch.autograd.grad(F.mse_loss(predicted, target), predicted)
    assert torch.equal(slope, plain)


def test_read_and_write_alone_learn_from_a_base_that_shares_its_weights() -> None:
    pytest.importorskip("diffusers")
    family = FAMILIES[0]
    base = make_base(family).requires_grad_(False)
    elastic = elit.elastify(base)
    optimizer = torch.optim.Adam(elastic.elit.parameters(), lr=3e-3)
    torch.manual_seed(2)
    inputs = family.inputs(4)
    of_base = predict(base, inputs)
    distances = []
    for _ in range(20):
        predicted = predict(elastic, inputs, budget=0.125)
        distances.append(F.mse_loss(predicted, of_base).item())
        distillation_loss(predicted, of_base, of_base).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert distances[-1] < 0.7 * distances[0]
    assert torch.equal(predict(base, inputs), of_base)
