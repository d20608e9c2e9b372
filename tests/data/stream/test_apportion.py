"""Shares of a mixture are exact, near the weights at every item, and never taken back."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.stream.apportion import MAX_ITEMS, MAX_TOTAL_WEIGHT, Apportionment

FIBONACCI = [1, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233, 377, 610, 987, 1597]


def skewed(num_buckets: int, seed: int) -> list[int]:
    shares = np.random.default_rng(seed).dirichlet(np.full(num_buckets, 0.3))
    return [int(share) for share in np.ceil(shares * 1e6)]


MIXTURES = {
    "one": [7],
    "two": [1, 2],
    "halves": [1, 1],
    "zeros beside": [0, 5, 0, 3, 0],
    "deepest tree": FIBONACCI,
    "a grain": [1, 10**6],
    "eight": skewed(8, 0),
    "240": skewed(240, 1),
    "512": skewed(512, 2),
}
mixtures = pytest.mark.parametrize("weights", MIXTURES.values(), ids=MIXTURES)


@mixtures
def test_the_items_of_a_bucket_are_numbered_without_a_gap(weights: list[int]) -> None:
    bucket, number = Apportionment(weights).locate(np.arange(20_000))
    for idx in range(len(weights)):
        assert (number[bucket == idx] == np.arange((bucket == idx).sum())).all()


@mixtures
def test_counts_are_what_was_given(weights: list[int]) -> None:
    mixture = Apportionment(weights)
    bucket, _ = mixture.locate(np.arange(5_000))
    for num_items in (0, 1, 2, 999, 5_000):
        expected = np.bincount(bucket[:num_items], minlength=len(weights))
        assert (mixture.counts(num_items) == expected).all()


@mixtures
def test_every_count_stays_within_four_of_its_share(weights: list[int]) -> None:
    mixture, shares = Apportionment(weights), np.array(weights) / sum(weights)
    far = np.random.default_rng(3).integers(0, MAX_ITEMS, 500)
    for num_items in (*range(1_000), *far.tolist()):
        assert np.abs(mixture.counts(num_items) - num_items * shares).max() < 4


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.integers(0, 2**24) | st.integers(0, 24).map(lambda power: 2**power),
        min_size=1,
        max_size=64,
    ).filter(any),
    st.integers(0, MAX_ITEMS - 1_000),
)
def test_any_mixture_stays_within_four_of_its_shares_at_every_item(
    weights: list[int], far: int
) -> None:
    mixture, shares = Apportionment(weights), np.array(weights) / sum(weights)
    for first in (0, far):
        items = np.arange(first, first + 1_000)
        bucket, _ = mixture.locate(items)
        given_ = np.cumsum(bucket[:, None] == np.arange(len(weights)), axis=0)
        given_ += mixture.counts(first)
        assert np.abs(given_ - (items[:, None] + 1) * shares).max() < 4


@mixtures
def test_far_items_are_where_the_counts_say(weights: list[int]) -> None:
    mixture = Apportionment(weights)
    for item in np.random.default_rng(4).integers(0, MAX_ITEMS - 1, 50).tolist():
        bucket, number = mixture.locate([item])
        before, after = mixture.counts(item), mixture.counts(item + 1)
        assert before[bucket[0]] == number[0]
        assert np.flatnonzero(after - before).tolist() == bucket.tolist()


def test_sums_do_not_overflow() -> None:
    mixture = Apportionment([MAX_TOTAL_WEIGHT - 1, 1])
    bucket, number = mixture.locate([MAX_ITEMS - 1])
    assert mixture.counts(MAX_ITEMS).tolist() == [MAX_ITEMS - 8, 8]
    assert (bucket[0], number[0]) in ((0, MAX_ITEMS - 9), (1, 7))


@pytest.mark.parametrize("weights", [[], [0, 0], [1, -1], [MAX_TOTAL_WEIGHT, 1]], ids=str)
def test_weights_that_mean_nothing_are_refused(weights: Sequence[int]) -> None:
    with pytest.raises(ValueError, match="allowed: none below 0, a sum of 1"):
        Apportionment(weights)


@pytest.mark.parametrize("item", [-1, MAX_ITEMS])
def test_an_item_out_of_range_is_refused(item: int) -> None:
    with pytest.raises(ValueError, match="allowed"):
        Apportionment([1]).locate([item])
