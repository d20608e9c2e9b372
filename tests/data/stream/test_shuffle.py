"""The permutation without storage: a bijection, and as disordered as a true shuffle."""

import itertools

import numpy as np
import pytest

from data.stream.shuffle import permutation_key, permute, splitmix64

SIZES = [1, 2, 3, 4, 5, 7, 10, 16, 17, 31, 99, 100, 101, 255, 1000, 1024, 4097, 10_007, 65_536]


@pytest.mark.parametrize("num_items", SIZES)
def test_every_item_stands_at_exactly_one_place(num_items: int) -> None:
    for seed in range(5):
        items = permute(np.arange(num_items), num_items=num_items, key=permutation_key(seed))

        np.testing.assert_array_equal(np.sort(items), np.arange(num_items))


def test_no_items_give_no_places() -> None:
    assert permute(np.arange(0), num_items=0, key=1).tolist() == []


@pytest.mark.parametrize("num_items", [1_000, 2_441_406_250, 2**62])
def test_a_place_asked_for_alone_holds_the_same_item(num_items: int) -> None:
    rng = np.random.default_rng(0)
    places = rng.integers(0, num_items, size=50)
    key = permutation_key("x", 3)

    together = permute(places, num_items=num_items, key=key)

    alone = [permute([place], num_items=num_items, key=key)[0] for place in places]
    np.testing.assert_array_equal(together, alone)
    assert len(np.unique(together)) == len(np.unique(places))
    assert together.min() >= 0
    assert together.max() < num_items


@pytest.mark.parametrize("num_items", [2, 3, 4])
def test_all_orders_of_a_few_items_are_about_equally_frequent(num_items: int) -> None:
    orders = list(itertools.permutations(range(num_items)))
    counts = dict.fromkeys(orders, 0)
    num_keys = 200 * len(orders)

    for seed in range(num_keys):
        items = permute(np.arange(num_items), num_items=num_items, key=permutation_key(seed))
        counts[tuple(items.tolist())] += 1

    expected = num_keys / len(orders)
    chi_square = sum((count - expected) ** 2 / expected for count in counts.values())
    freedom = len(orders) - 1
    assert chi_square < freedom + 5 * np.sqrt(2 * freedom)  # five standard deviations


@pytest.mark.parametrize("num_items", [100, 1_000, 10_007])
def test_neighbours_and_fixed_points_are_as_rare_as_in_a_true_shuffle(num_items: int) -> None:
    num_keys = 600
    places = np.arange(num_items)
    neighbours = np.empty(num_keys)
    fixed = np.empty(num_keys)

    for seed in range(num_keys):
        items = permute(places, num_items=num_items, key=permutation_key("neighbours", seed))
        neighbours[seed] = np.sum(np.diff(items) == 1)
        fixed[seed] = np.sum(items == places)

    # Of a true shuffle both counts are Poisson with mean and variance 1: the mean of 600 has
    # a standard deviation of 0.041, their variance one of 0.07. Four rounds would give 1.8 .. 2.0.
    assert abs(neighbours.mean() - 1) < 0.17
    assert abs(fixed.mean() - 1) < 0.17
    assert abs(neighbours.var() - 1) < 0.35


def test_items_do_not_correlate_with_places() -> None:
    num_items = 10_007
    places = np.arange(num_items)

    correlations = [
        np.corrcoef(places, permute(places, num_items=num_items, key=permutation_key(seed)))[0, 1]
        for seed in range(200)
    ]

    assert abs(np.std(correlations) * np.sqrt(num_items) - 1) < 0.25  # sd of a sd of 200: 5 %


def test_keys_are_not_sums() -> None:
    assert permutation_key(7, 1) != permutation_key(8, 0)
    assert permutation_key("a", 1) != permutation_key("a", "1")
    assert permutation_key(1, 11) != permutation_key(11, 1)


def test_the_round_function_is_splitmix64() -> None:
    # First outputs of the reference generator (Vigna) seeded with 1234567: state advances by gamma.
    gamma = 0x9E3779B97F4A7C15
    states = np.array([(1234567 + step * gamma) % 2**64 for step in range(3)], dtype=np.uint64)

    assert splitmix64(states).tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


@pytest.mark.parametrize(("places", "num_items"), [([-1], 5), ([5], 5), ([0], 0), ([0], 2**62 + 1)])
def test_places_outside_are_refused(places: list[int], num_items: int) -> None:
    with pytest.raises(ValueError, match="allowed"):
        permute(places, num_items=num_items, key=0)
