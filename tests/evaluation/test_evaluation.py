import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from scipy.stats import spearmanr

from elit import ElitError, create
from elit.analysis import attention_maps, rank_correlation
from elit.data import digits8
from elit.evaluation import (
    Classifier,
    Judge,
    classify,
    frechet_distance,
    held_out_loss,
    moments,
    nearest_distance,
    train_classifier,
)
from elit.flow import TimeDensity
from elit.models import DiT


@pytest.fixture
def model() -> DiT:
    """A small elastic model with no weight at zero."""
    torch.manual_seed(0)
    net = create(
        "ELIT-DiT-S/1",
        input_size=8,
        in_channels=1,
        num_classes=10,
        width=32,
        num_heads=2,
        depth=3,
        head_depth=1,
        tail_depth=1,
        group_size=4,
    )
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    assert isinstance(net, DiT)
    return net.eval()


def test_frechet_distance_against_scipy() -> None:
    rng = torch.Generator().manual_seed(1)
    a = torch.randn(200, 12, generator=rng) @ torch.randn(12, 12, generator=rng)
    b = torch.randn(300, 12, generator=rng) @ torch.randn(12, 12, generator=rng) + 1
    na, nb = a.double().numpy(), b.double().numpy()
    ca, cb = np.cov(na.T), np.cov(nb.T)
    expected = ((na.mean(0) - nb.mean(0)) ** 2).sum() + np.trace(ca + cb - 2 * sqrtm(ca @ cb).real)
    assert frechet_distance(moments(a), moments(b)) == pytest.approx(expected, rel=1e-8)  # float64, other algorithm


def test_frechet_distance_of_rank_deficient_features() -> None:
    a = torch.randn(5, 20)
    assert frechet_distance(moments(a), moments(a)) == pytest.approx(0, abs=1e-8 * float(moments(a).covariance.trace()))
    with pytest.raises(ElitError, match="at least 2 samples"):
        moments(a[:1])


def test_classifier_learns_and_repeats() -> None:
    train, held_out = digits8(), digits8(held_out=True)
    first, second = (train_classifier(train, seed=3, steps=150) for _ in range(2))
    predicted, features = classify(first, held_out.images)
    assert (predicted == held_out.labels).float().mean() > 0.85
    assert features.shape == (len(held_out), 64)
    assert torch.equal(features, classify(second, held_out.images)[1])


def test_held_out_loss_gives_every_budget_the_same_noise(model: DiT) -> None:
    data = digits8(held_out=True)
    full = held_out_loss(model, data, None, TimeDensity(), draws=2)
    assert full.shape == (2 * len(data),)
    assert torch.equal(full, held_out_loss(model, data, 1.0, TimeDensity(), draws=2))
    low = held_out_loss(model, data, 1 / 16, TimeDensity(), draws=2)
    assert not torch.equal(full, low)
    assert (full - low).std() < 0.5 * full.std()


def test_nearest_distance_against_a_loop() -> None:
    a, b = torch.randn(7, 1, 4, 4), torch.randn(9, 1, 4, 4)
    expected = [min((x - z).square().mean().sqrt() for z in b) for x in a]
    torch.testing.assert_close(nearest_distance(a, b, batch_size=3), torch.stack(expected), atol=1e-5, rtol=1e-5)


def test_rank_correlation_against_scipy() -> None:
    a, b = torch.randn(4, 30), torch.randint(0, 5, (4, 30)).float()
    expected = [spearmanr(x, y).statistic for x, y in zip(a.numpy(), b.numpy(), strict=True)]
    torch.testing.assert_close(rank_correlation(a, b), torch.tensor(expected).float(), atol=1e-5, rtol=1e-5)


def test_attention_maps(model: DiT) -> None:
    x, noise = torch.randn(3, 1, 8, 8), torch.randn(3, 1, 8, 8)
    y = torch.tensor([0, 4, 9])
    maps = attention_maps(model, x, y, 0.5, noise, budget=0.25)
    assert maps.attention.shape == maps.loss.shape == (3, 8, 8)
    windows = maps.attention.view(3, 2, 4, 2, 4).permute(0, 1, 3, 2, 4).flatten(3)
    torch.testing.assert_close(windows.mean(-1), torch.ones(3, 2, 2))  # weights of a window sum to one
    x_t = 0.5 * (x + noise)
    loss = (model(x_t, torch.full((3,), 0.5), y, budget=0.25) - (noise - x)).square()[:, 0]
    torch.testing.assert_close(maps.loss, loss)
    assert not model.interface.read_layer.attention._forward_pre_hooks  # type: ignore[union-attr]


def test_attention_maps_need_an_interface() -> None:
    plain = create("DiT-S/2", input_size=8, in_channels=1, width=32, num_heads=2, depth=1)
    with pytest.raises(ElitError, match="need a model with a latent interface"):
        attention_maps(plain, torch.randn(1, 1, 8, 8), torch.tensor([1]), 0.5, torch.randn(1, 1, 8, 8))


def test_a_judge_sees_samples_as_pictures_show_them() -> None:
    """As the Frechet judge does, whose images are bytes."""
    data = digits8(held_out=True)
    judge = Judge(Classifier(1, 10).eval(), data)
    images, labels = data.batch(torch.arange(100))
    beyond = 1.5 * images
    assert judge(beyond, labels) == judge(beyond.clamp(-1, 1), labels)
    assert judge(0.5 * images, labels) != judge(images, labels)
