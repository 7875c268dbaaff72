"""Budgets: which level one means, how training draws one, how sampling schedules them."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from elit import BudgetByNoise, ElitError
from elit.interface import budget_schedule, budget_schedules, check_budget, draw_level, to_level
from elit.interface.budget import default_min_latents, listed, valid_levels

budgets = st.floats(0, 1, exclude_min=True)
roundings = st.booleans()  # whether to round down
BAD = [0, 0.0, -0.5, 1.5, 1.0000001, "abc", "0.5", True, False, math.nan, math.inf, None, 1j, [0.5]]


@st.composite
def level_sets(draw: st.DrawFn) -> tuple[list[int], int]:
    """Levels {J_min .. J} and J."""
    num_latents = draw(st.integers(1, 300))
    return list(range(draw(st.integers(1, num_latents)), num_latents + 1)), num_latents


@pytest.mark.parametrize("budget", BAD)
def test_what_is_no_budget_is_named(budget: Any) -> None:
    with pytest.raises(ElitError, match=r"^the dose is .* must be a number in \(0, 1\]") as caught:
        check_budget(budget, "the dose")
    assert repr(budget) in str(caught.value)


def test_every_level_is_its_own_budget_for_every_j() -> None:
    for num_latents in range(1, 300):
        levels = range(1, num_latents + 1)
        for k in levels:
            assert to_level(k / num_latents, levels, num_latents) == k
            assert to_level(k / num_latents, levels, num_latents, round_down=True) == k


def level_or_none(budget: float, levels: list[int], num_latents: int, round_down: bool) -> int | None:
    """The level, or None for a budget that is refused."""
    try:
        return to_level(budget, levels, num_latents, round_down)
    except ElitError:
        return None


@given(level_sets(), budgets, roundings)
def test_a_budget_gives_a_level_and_the_whole_gives_all(
    levels: tuple[list[int], int], budget: float, round_down: bool
) -> None:
    assert level_or_none(budget, *levels, round_down) in [None, *levels[0]]
    assert to_level(1.0, *levels, round_down) == levels[1]
    assert to_level(1, *levels, round_down) == levels[1]


@given(level_sets(), budgets, roundings)
def test_a_budget_is_refused_exactly_if_it_means_fewer_latents_than_the_lowest_level(
    levels: tuple[list[int], int], budget: float, round_down: bool
) -> None:
    lowest, wanted = levels[0][0], max(1, budget * levels[1])
    bound = lowest if round_down else lowest - 0.5  # what still rounds to the lowest
    if abs(wanted - bound) > 1e-6:  # where floating point cannot blur on which side it is
        assert (level_or_none(budget, *levels, round_down) is None) == (wanted < bound)


@given(level_sets(), budgets, budgets, roundings)
def test_more_budget_is_never_fewer_latents(
    levels: tuple[list[int], int], a: float, b: float, round_down: bool
) -> None:
    low, high = (level_or_none(budget, *levels, round_down) for budget in sorted((a, b)))
    assert low is None or (high is not None and low <= high)


@given(level_sets(), budgets)
def test_nearest_is_nearest_and_of_two_the_larger(levels: tuple[list[int], int], budget: float) -> None:
    level = level_or_none(budget, *levels, False)
    assume(level is not None)
    assert level is not None
    wanted = max(1, round(budget * levels[1], 9))  # as it is said: digits behind the ninth are floating-point noise
    for other in levels[0]:
        distance, best = abs(other - wanted), abs(level - wanted)
        assert distance > best or (distance == best and other <= level)


@given(level_sets(), budgets)
def test_down_is_the_integer_part_and_at_least_one(levels: tuple[list[int], int], budget: float) -> None:
    level, wanted = level_or_none(budget, *levels, True), budget * levels[1]
    assume(level is not None)
    if abs(wanted - round(wanted)) > 1e-6:  # where floating point cannot blur which integer is below
        assert level == max(1, int(wanted))


def test_examples_of_both_roundings() -> None:
    levels = range(1, 17)
    assert [to_level(b, levels, 16) for b in (1 / 16, 0.1, 0.25, 0.28125, 0.29, 0.99)] == [1, 2, 4, 5, 5, 16]
    assert [to_level(b, levels, 16, True) for b in (1 / 16, 0.1, 0.25, 0.29, 0.99, 0.01)] == [1, 1, 4, 4, 15, 1]
    assert [to_level(b, range(4, 65), 64) for b in (4 / 64, 3.5 / 64)] == [4, 4]


def test_less_than_one_latent_means_one() -> None:
    assert [to_level(b, (1, 4), 4, down) for b in (1e-12, 0.1, 0.24) for down in (False, True)] == [1] * 6


@pytest.mark.parametrize(
    ("budget", "levels", "round_down", "why"),
    [
        (1 / 16, (4, 16), False, r"budget 0.0625 means 1 of 16 latents, .* trained with 4 and 16: take at least 0.25"),
        (0.24, (4, 8, 16), True, r"means 3 of 16 latents, .* trained with 4, 8 and 16: take at least 0.25"),
        (0.1, range(4, 17), False, r"means 1.6 of 16 latents, .* trained with 4 to 16: take at least 0.25"),
        (
            0.5,
            (16,),
            False,
            r"means 8 of 16 latents, .* trained with 16: take at least 1, or allow others with --untrained-levels",
        ),
    ],
)
def test_a_budget_below_the_lowest_level_is_refused_with_what_was_trained(
    budget: float, levels: Sequence[int], round_down: bool, why: str
) -> None:
    with pytest.raises(ElitError, match=why):
        to_level(budget, levels, 16, round_down)


def test_a_level_set_with_gaps_takes_the_nearest_that_exists() -> None:
    assert [to_level(b, (2, 8, 16), 16) for b in (0.1, 5 / 16, 0.51, 0.8)] == [2, 8, 8, 16]
    assert [to_level(b, (2, 8, 16), 16, True) for b in (0.125, 0.3, 0.49, 0.51, 0.99)] == [2, 2, 8, 8, 16]


def test_levels_are_written_as_people_read_them() -> None:
    assert [listed(levels) for levels in ((4,), (4, 16), (3, 4), (2, 4, 8), (1, 2, 3), range(4, 17))] == [
        "4", "4 and 16", "3 and 4", "2, 4 and 8", "1 to 3", "4 to 16",
    ]  # fmt: skip


def test_levels_are_those_trained_or_all_that_are_possible() -> None:
    assert valid_levels(16) == tuple(range(1, 17))
    assert valid_levels(16, 3, 4) == (4, 8, 12, 16)
    assert valid_levels(16, trained=(16, 4, 4)) == (4, 16)
    assert valid_levels(16, step=4, trained=(16, 4)) == (4, 16)
    with pytest.raises(ElitError, match=r"levels is \[4, 6\]; a window of 16 latents has the levels \[4, 8, 12, 16\]"):
        valid_levels(16, step=4, trained=(4, 6))
    with pytest.raises(ElitError, match=r"no runs of 4, which this model merges"):
        valid_levels(6, step=4)


def test_the_papers_smallest_levels() -> None:
    assert [default_min_latents(j) for j in (1, 4, 16, 32, 64)] == [1, 1, 1, 2, 4]


# ------------------------------------------------------------------------------------------------ drawing


@given(st.integers(0, 2**63), st.integers(0, 10**7))
def test_a_draw_is_a_function_of_seed_and_step(seed: int, step: int) -> None:
    levels = range(1, 17)
    first = draw_level(levels, seed, step)
    draw_level(levels, seed, step + 1)
    assert draw_level(levels, seed, step) == first
    assert first in levels


def chi_square(counts: Counter[int], expected: dict[int, float]) -> float:
    assert set(counts) <= set(expected)
    return sum((counts[level] - n) ** 2 / n for level, n in expected.items())


def test_draws_are_uniform_over_the_levels() -> None:
    counts = Counter(draw_level(range(1, 17), 7, step) for step in range(16_000))
    # 15 degrees of freedom: 44 is exceeded by one honest draw in 10,000; the seed is fixed, so this does not flicker
    assert chi_square(counts, dict.fromkeys(range(1, 17), 1000.0)) < 44


def test_draws_follow_weights() -> None:
    weights = {2: 1.0, 4: 3.0, 8: 0.0, 16: 6.0}
    counts = Counter(draw_level(list(weights), 3, step, list(weights.values())) for step in range(10_000))
    assert counts[8] == 0
    # 2 degrees of freedom: 18.4 is exceeded by one honest draw in 10,000
    assert chi_square(counts, {2: 1000.0, 4: 3000.0, 16: 6000.0}) < 18.4


def test_draws_of_neighbouring_steps_and_seeds_are_independent() -> None:
    def pairs(shift_seed: int, shift_step: int) -> float:
        counts: Counter[int] = Counter()
        for step in range(4000):
            a, b = draw_level(range(4), 11, step), draw_level(range(4), 11 + shift_seed, step + shift_step)
            counts[4 * a + b] += 1
        return chi_square(counts, dict.fromkeys(range(16), 250.0))

    assert pairs(0, 1) < 44  # 15 degrees of freedom, as above
    assert pairs(1, 0) < 44


# ------------------------------------------------------------------------------------------------ schedules

times = st.lists(st.floats(0, 1), min_size=1, max_size=30).map(lambda values: sorted(values, reverse=True))


@given(times, budgets)
def test_one_budget_serves_every_step(at: list[float], budget: float) -> None:
    assert budget_schedule(budget, at) == [budget] * len(at)
    assert budget_schedule(None, at) == [None] * len(at)


@given(st.data(), times)
def test_a_list_is_taken_step_by_step(data: st.DataObject, at: list[float]) -> None:
    one_each = data.draw(st.lists(budgets, min_size=len(at), max_size=len(at)))
    assert budget_schedule(one_each, at) == one_each
    assert budget_schedule(tuple(one_each), at) == one_each


@given(times)
def test_a_function_is_asked_for_every_time(at: list[float]) -> None:
    asked: list[float] = []

    def budget(t: float) -> float:
        asked.append(t)
        return 1 - t / 2

    assert budget_schedule(budget, at) == [1 - t / 2 for t in at]
    assert asked == at


@given(times, st.lists(st.floats(0, 1), max_size=4, unique=True), st.data())
def test_a_schedule_by_noise_picks_the_interval_of_t(
    at: list[float], thresholds: list[float], data: st.DataObject
) -> None:
    thresholds = sorted(thresholds, reverse=True)
    of_interval = data.draw(st.lists(budgets, min_size=len(thresholds) + 1, max_size=len(thresholds) + 1))
    schedule = BudgetByNoise(thresholds, of_interval)
    for t, budget in zip(at, budget_schedule(schedule, at), strict=True):
        assert budget == of_interval[sum(t <= h for h in thresholds)]


def test_a_schedule_by_noise_at_its_thresholds() -> None:
    schedule = BudgetByNoise([0.75, 0.25], [0.1, 0.5, 1.0])
    assert [schedule(t) for t in (1.0, 0.76, 0.75, 0.26, 0.25, 0.0)] == [0.1, 0.1, 0.5, 0.5, 1.0, 1.0]


@pytest.mark.parametrize(
    ("thresholds", "of_interval", "why"),
    [
        ([0.5], [1.0], "1 thresholds needs 2 budgets, not 1"),
        ([0.5], [0.1, 0.2, 0.3], "needs 2 budgets, not 3"),
        ([0.2, 0.5], [0.1, 0.2, 0.3], r"thresholds \[0.2, 0.5\] .* must fall"),
        ([0.5, 0.5], [0.1, 0.2, 0.3], "must fall"),
        ([0.5], [0.5, 1.5], "1.5"),
        ([0.5], [0, 1], "budget is 0"),
    ],
)
def test_a_schedule_that_is_none_says_why(thresholds: list[float], of_interval: list[float], why: str) -> None:
    with pytest.raises(ElitError, match=why):
        BudgetByNoise(thresholds, of_interval)


@pytest.mark.parametrize("budget", [b for b in BAD if b is not None and not isinstance(b, list)])
def test_a_bad_budget_is_found_in_every_form(budget: Any) -> None:
    for form in (budget, [1.0, budget], lambda t: budget):
        with pytest.raises(ElitError, match=r"^dose is .* must be a number in \(0, 1\]"):
            budget_schedule(form, [1.0, 0.5], "dose")


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_list_of_another_length_is_an_error(count: int) -> None:
    with pytest.raises(ElitError, match=f"budget lists {count} values for 2 sampling steps"):
        budget_schedule([0.5] * count, [1.0, 0.5])


def test_a_tensor_gives_each_sample_its_budget_or_one_for_each_of_its_steps() -> None:
    of_steps = [[1.0, 0.5], [1.0, 0.6, 0.3]]  # one sample takes a step more than the other
    assert budget_schedules(torch.tensor([0.25, 0.5]), of_steps) == [[0.25] * 2, [0.5] * 3]
    each = torch.tensor([[0.25, 0.5, 0.0], [1.0, 0.75, 0.5]])  # what stands beyond a sample's steps is not looked at
    assert budget_schedules(each, of_steps) == [[0.25, 0.5], [1.0, 0.75, 0.5]]
    assert budget_schedules(torch.tensor(0.5), of_steps) == budget_schedules(0.5, of_steps) == [[0.5] * 2, [0.5] * 3]
    assert budget_schedules(None, of_steps) == [[None] * 2, [None] * 3]
    assert budget_schedules(lambda t: t, of_steps) == of_steps


@pytest.mark.parametrize("shape", [(1,), (3,), (2, 2), (2, 4), (3, 3), (2, 3, 1)])
def test_a_tensor_of_another_shape_says_which_it_should_have(shape: tuple[int, ...]) -> None:
    with pytest.raises(ElitError, match=r"tensor of shape .*; for 2 samples of 3 steps give \(2,\) or \(2, 3\)"):
        budget_schedules(torch.full(shape, 0.5), [[1.0, 0.5], [1.0, 0.6, 0.3]])


@pytest.mark.parametrize("wrong", [[0.5, 1.5], [0.5, 0.0], [[1.0, math.nan]] * 2])
def test_a_bad_budget_in_a_tensor_is_named(wrong: Any) -> None:
    with pytest.raises(ElitError, match=r"^budget is .* must be a number in \(0, 1\]"):
        budget_schedules(torch.tensor(wrong), [[1.0, 0.5]] * 2)
