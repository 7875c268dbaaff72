import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from elit import ElitError
from elit.data import digits, digits8, open_data, sample_indices
from elit.data.digits import HELD_OUT, OFFSETS


def test_digits8_are_the_real_digits_each_on_one_side_of_the_split() -> None:
    train, held_out = digits8(), digits8(held_out=True)
    assert (len(train), len(held_out)) == (1797 - HELD_OUT, HELD_OUT)
    ours = sorted(image.numpy().tobytes() for image in torch.cat((train.images, held_out.images)))
    real = sorted(((i / 8 - 1)[None]).astype(np.float32).tobytes() for i in load_digits().images)
    assert ours == real
    counts = torch.bincount(held_out.labels, minlength=10)
    assert counts.min() > 20


def test_placements_move_one_digit_over_an_empty_canvas() -> None:
    data = digits(held_out=True)
    assert data.shape == (1, 16, 16)
    assert len(data) == HELD_OUT * 9
    images = data.images.view(-1, 9, 16, 16)
    corner = images[:, 0, :12, :12]
    for place, (row, column) in enumerate(OFFSETS):
        moved = images[:, place]
        assert torch.equal(moved[:, row : row + 12, column : column + 12], corner)
        assert (moved == -1).float().mean(dim=(1, 2)).min() >= 1 - 144 / 256
    assert data.images.min() == -1
    assert data.images.max() <= 1
    assert torch.equal(data.labels.view(-1, 9).amin(1), data.labels.view(-1, 9).amax(1))


def test_no_digit_is_on_both_sides() -> None:
    train = {image.numpy().tobytes() for image in digits().images}
    assert not any(image.numpy().tobytes() in train for image in digits(held_out=True).images)


def test_unknown_data() -> None:
    with pytest.raises(ElitError, match="no data set is named 'cifar'"):
        open_data("cifar")


@given(seed=st.integers(0, 9), batch_size=st.integers(1, 20), length=st.integers(1, 30))
def test_every_epoch_visits_everything_once(seed: int, batch_size: int, length: int) -> None:
    steps = -(-3 * length // batch_size)
    visited = torch.cat([sample_indices(seed, step * batch_size, batch_size, length) for step in range(steps)])
    for epoch in range(3):
        part = visited[epoch * length : (epoch + 1) * length]
        assert torch.equal(part.sort().values, torch.arange(length))


def test_order_depends_on_the_seed_and_the_epoch() -> None:
    first, second = sample_indices(0, 0, 100, 100), sample_indices(0, 100, 100, 100)
    assert not torch.equal(first, second)
    assert not torch.equal(first, sample_indices(1, 0, 100, 100))
    assert torch.equal(first, sample_indices(0, 0, 100, 100))
