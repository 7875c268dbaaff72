"""Random numbers as functions of a seed and of what they are for."""

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from elit.seeding import derive_seed, generator, integers, normal, normals, permutation, torch_seeded, uniform

parts = st.lists(st.integers(-(2**70), 2**70) | st.sampled_from(["start", "noise", "budget"]), min_size=1, max_size=4)
DEVICES = [torch.device("cpu"), *[torch.device("cuda")] * torch.cuda.is_available()]


@given(parts)
def test_a_seed_is_a_function_of_its_parts(of: list[int | str]) -> None:
    seed = derive_seed(*of)
    assert seed == derive_seed(*of)
    assert 0 <= seed < 2**128


@given(parts, parts)
def test_other_parts_give_another_seed(a: list[int | str], b: list[int | str]) -> None:
    assert (derive_seed(*a) == derive_seed(*b)) == (a == b)


def test_a_number_counts_whatever_its_type() -> None:
    assert derive_seed(3, 1) == derive_seed(np.int64(3), True) == derive_seed(torch.tensor(3), 1)  # type: ignore[arg-type]


def test_draws_are_the_same_in_every_process_and_version() -> None:
    """What users reproduce images from: a change of these numbers changes every image."""
    seed = int(hashlib.sha256(b"(3, 'start')").hexdigest()[:32], 16)
    assert derive_seed(3, "start") == seed == 300402959483398727001031667299758833966
    assert generator(3, "start").bit_generator.random_raw(2).tolist() == [13812230728443184007, 4911255148701638972]
    expected = torch.tensor([-1.2651879787, 1.3763382435, -0.4483206868, 0.4251511097])
    torch.testing.assert_close(normal(generator(3, "start"), 4), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(uniform(generator(3, "start"), 2), torch.tensor([0.79918307, 0.74876249]))
    assert permutation(generator(3, "start"), 5).tolist() == [4, 3, 1, 0, 2]


def test_every_one_of_many_seeds_draws_something_else() -> None:
    raw = np.concatenate([generator(seed, "start").bit_generator.random_raw(1) for seed in range(50_000)])
    assert len(np.unique(raw)) == 50_000


def test_seeds_whose_digests_share_32_bits_differ() -> None:
    """8956 and 30233 are the first pair whose digests agree in the 32 bits that torch's generator would keep."""
    seeds = [int(hashlib.sha256(f"({seed}, 'start')".encode()).hexdigest()[:16], 16) // 2 for seed in (8956, 30233)]
    assert seeds[0] % 2**32 == seeds[1] % 2**32
    one, other = (torch.randn(8, generator=torch.Generator().manual_seed(seed)) for seed in seeds)
    assert torch.equal(one, other)  # so the pair is one
    one, other = normals([(8956, "start"), (30233, "start")], (8,))
    assert not torch.equal(one, other)


@pytest.mark.parametrize("bit", [32, 63, 64, 127, 200])
def test_high_bits_of_a_seed_count(bit: int) -> None:
    assert not torch.equal(normal(generator(5), 8), normal(generator(5 + 2**bit), 8))


@pytest.mark.parametrize("bit", [32, 63, 64, 127])
def test_high_bits_of_a_key_count(bit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All 128 of them decide what is drawn."""
    before, key = normal(generator("key"), 8), derive_seed("key")
    monkeypatch.setattr("elit.seeding.derive_seed", lambda *parts: key ^ 1 << bit)
    assert not torch.equal(normal(generator("key"), 8), before)


def test_rows_are_those_of_their_own_generators() -> None:
    """Whatever their order and number: so a batch may be cut anywhere."""
    keys = [(seed, "start") for seed in range(6)]
    rows = normals(keys, (2, 3))
    assert torch.equal(normals(keys[::-1], (2, 3)).flip(0), rows)
    for key, row in zip(keys, rows, strict=True):
        assert torch.equal(normal(generator(*key), (2, 3)), row)


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_draws_are_the_same_on_every_device(device: torch.device) -> None:
    on_device = normals([(0, "start"), (1, "start")], (4, 5), device)
    assert on_device.device.type == device.type
    assert torch.equal(on_device.cpu(), normals([(0, "start"), (1, "start")], (4, 5)))
    assert torch.equal(normal(generator(2), 9, device).cpu(), normal(generator(2), 9))
    assert torch.equal(uniform(generator(2), 9, device).cpu(), uniform(generator(2), 9))


def test_generators_of_neighbouring_seeds_are_independent() -> None:
    draws = torch.stack([normal(generator(seed, "start"), 2000) for seed in range(20)])
    correlation = torch.corrcoef(draws) - torch.eye(20)
    assert correlation.abs().max() < 5 / 2000**0.5  # five standard errors
    assert not torch.equal(draws[3], normal(generator(3, "step 0"), 2000))


def test_numbers_follow_their_distributions() -> None:
    count = 100_000
    drawn, flat, whole = normal(generator(0), count), uniform(generator(1), count), integers(generator(2), 5, count)
    assert (drawn.dtype, flat.dtype, whole.dtype) == (torch.float32, torch.float32, torch.int64)
    assert abs(drawn.mean()) < 5 / count**0.5
    assert abs(drawn.var() - 1) < 5 * (2 / count) ** 0.5
    assert flat.min() >= 0 and flat.max() < 1 and abs(flat.mean() - 0.5) < 5 * (1 / 12 / count) ** 0.5
    assert (whole.bincount() / count - 0.2).abs().max() < 5 * (0.16 / count) ** 0.5
    assert len(whole.unique()) == 5
    assert permutation(generator(3), 1000).sort().values.equal(torch.arange(1000))


def test_weights_that_torch_draws_follow_their_parts_and_leave_its_generator_alone() -> None:
    before = torch.get_rng_state()
    with torch_seeded(0, "weights"):
        weights = torch.nn.Linear(3, 3).weight
    assert torch.equal(torch.get_rng_state(), before)
    with torch_seeded(0, "weights"):
        assert torch.equal(torch.nn.Linear(3, 3).weight, weights)
    with torch_seeded(1, "weights"):
        assert not torch.equal(torch.nn.Linear(3, 3).weight, weights)
