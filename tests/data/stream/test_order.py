"""Every slot of every batch has one address, whatever ranks ask for it."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.stream.order import Order, Segment
from data.stream.plan import Plan
from data.stream.report import address_table
from data.stream.slots import local_slots


def drawn_segments(num_buckets: int) -> st.SearchStrategy[Segment]:
    mixture = st.lists(st.integers(0, 1_000), min_size=num_buckets, max_size=num_buckets)
    return st.builds(
        Segment,
        num_batches=st.integers(1, 9),
        global_sequences=st.integers(1, 48),
        weights=mixture.filter(any).map(tuple),
    )


@st.composite
def orders(draw: st.DrawFn) -> Order:
    """Draw an order of a few segments over small buckets, some of them gone through many times."""
    num_buckets = draw(st.integers(1, 8))
    windows = draw(st.lists(st.integers(1, 60), min_size=num_buckets, max_size=num_buckets))
    segments = draw(st.lists(drawn_segments(num_buckets), min_size=1, max_size=4))
    return Order(windows, segments, seed=draw(st.integers(0, 2**32)))


def whole(order: Order, batch: int) -> list[tuple[int, int, int]]:
    found = order.addresses(batch, np.arange(order.global_sequences(batch)))
    return list(
        zip(found.bucket.tolist(), found.window.tolist(), found.epoch.tolist(), strict=True)
    )


@settings(deadline=None, max_examples=60)
@given(orders())
def test_each_window_comes_once_in_each_epoch_of_its_bucket(order: Order) -> None:
    seen = Counter(place for batch in range(order.num_batches) for place in whole(order, batch))
    assert max(seen.values()) == 1
    for bucket, given_ in enumerate(order.given(order.num_batches).tolist()):
        epochs = Counter(epoch for b, _, epoch in seen if b == bucket)
        full, rest = divmod(given_, order.windows[bucket])
        assert [epochs[e] for e in range(full)] == [order.windows[bucket]] * full
        assert epochs[full] == rest
        assert sum(epochs.values()) == given_


@settings(deadline=None, max_examples=60)
@given(orders())
def test_what_was_given_is_counted_at_every_batch(order: Order) -> None:
    total = np.zeros(len(order.windows), dtype=np.int64)
    for batch in range(order.num_batches):
        assert (order.given(batch) == total).all()
        for bucket, _, _ in whole(order, batch):
            total[bucket] += 1
    assert (order.given(order.num_batches) == total).all()


@settings(deadline=None, max_examples=60)
@given(orders(), st.data())
def test_any_ranks_share_the_same_batch(order: Order, data: st.DataObject) -> None:
    """Slots asked for one by one, in shares or all at once have the same addresses."""
    batch = data.draw(st.integers(0, order.num_batches - 1))
    size = order.global_sequences(batch)
    dp = data.draw(st.sampled_from([n for n in range(1, size + 1) if size % n == 0]))
    expected = whole(order, batch)
    for rank in range(dp):
        share = order.addresses(batch, np.arange(rank, size, dp))
        mine = zip(share.bucket.tolist(), share.window.tolist(), share.epoch.tolist(), strict=True)
        assert list(mine) == expected[rank::dp]


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 8), st.data())
def test_every_count_stays_within_four_of_its_share_in_every_segment(
    num_buckets: int, data: st.DataObject
) -> None:
    segments = data.draw(st.lists(drawn_segments(num_buckets), min_size=1, max_size=4))
    order = Order([1_000] * num_buckets, segments, seed=0)
    first = 0
    for segment in segments:
        shares = np.array(segment.weights) / sum(segment.weights)
        for batch in range(first, first + segment.num_batches + 1):
            given_ = order.given(batch) - order.given(first)
            expected = (batch - first) * segment.global_sequences * shares
            assert np.abs(given_ - expected).max() < 4
        first += segment.num_batches


def read_by_replicas(order: Order, batch: int, *, dp: int, micro: int) -> list[np.ndarray]:
    """Return bucket, window and epoch of each micro-batch, those of all replicas in turn."""
    replicas = [
        local_slots(order.global_sequences(batch), micro_sequences=micro, dp=dp, data_rank=rank)
        for rank in range(dp)
    ]
    read = [order.addresses(batch, np.concatenate(slots)) for slots in replicas]
    rows = [np.stack([found.bucket, found.window, found.epoch], axis=1) for found in read]
    return [
        rank_rows[start : start + micro]
        for start in range(0, len(rows[0]), micro)
        for rank_rows in rows
    ]


def order_for(size: int, *, seed: int) -> Order:
    """Return an order of batches of one size, two mixtures of six buckets."""
    mixtures = ((5, 0, 1, 3, 8, 2), (0, 4, 1, 1, 1, 9))
    return Order(
        [40, 900, 7, 30_000, 1_000, 350],
        [Segment(num_batches=4, global_sequences=size, weights=weights) for weights in mixtures],
        seed=seed,
    )


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 192), st.integers(1, 8), st.integers(1, 3), st.integers(0, 7))
def test_any_replicas_and_micro_batches_see_the_same_batch(
    dp: int, micro: int, micro_batches: int, batch: int
) -> None:
    order = order_for(dp * micro * micro_batches, seed=dp)
    read = np.concatenate(read_by_replicas(order, batch, dp=dp, micro=micro))
    assert Counter(map(tuple, read.tolist())) == Counter(whole(order, batch))


@settings(deadline=None, max_examples=3)
@given(st.integers(0, 8), st.sampled_from([1, 2]), st.integers(0, 2**32))
def test_96_replicas_go_on_where_64_stopped(change: int, micro: int, seed: int) -> None:
    """A run that never stopped, of one replica, is the oracle: every slot, in its order."""
    order = order_for(384, seed=seed)
    for batch in range(order.num_batches):
        dp = 64 if batch < change else 96
        read = np.concatenate(read_by_replicas(order, batch, dp=dp, micro=micro))
        assert list(map(tuple, read.tolist())) == whole(order, batch)


@pytest.mark.parametrize(("dp", "micro"), [(1, 1), (64, 2), (96, 1), (3, 16)])
def test_the_table_of_addresses_divides_slots_as_training_does(dp: int, micro: int) -> None:
    plan = Plan(buckets=(), segments=(), order=order_for(384, seed=1), digest="")
    table = address_table(
        plan,
        steps=range(5, 6),
        replicas=dp,
        micro_batch=lambda _: micro,
        batch_of=lambda step: step,
    )
    for rank in range(dp):
        slots = local_slots(384, micro_sequences=micro, dp=dp, data_rank=rank)
        assert table["slot"][table["rank"] == rank].tolist() == np.concatenate(slots).tolist()


def real_order() -> Order:
    """Return one as large as the run: 240 buckets, 15,360 sequences a batch, three mixtures."""
    draw = np.random.default_rng(0)
    windows = draw.integers(10**6, 2 * 10**7, 240).tolist()
    mixtures = np.ceil(draw.dirichlet(np.full(240, 0.3), 3) * 1e6).astype(int).tolist()
    segments = [
        Segment(num_batches=50_000, global_sequences=15_360, weights=tuple(mixture))
        for mixture in mixtures
    ]
    return Order(windows, segments, seed=7)


@pytest.mark.parametrize("dp", [pytest.param(64, marks=pytest.mark.slow), 96])
def test_replicas_of_both_clusters_see_the_same_batch(dp: int) -> None:
    order = real_order()
    for batch in (49_999, 50_000):
        expected = Counter(whole(order, batch))
        shares = Counter[tuple[int, int, int]]()
        for rank in range(dp):
            slots = np.arange(rank, 15_360, dp)
            found = order.addresses(batch, slots)
            shares.update(
                zip(found.bucket.tolist(), found.window.tolist(), found.epoch.tolist(), strict=True)
            )
        assert shares == expected


def test_a_mixture_changes_exactly_at_its_batch_and_nobody_is_reset() -> None:
    order = real_order()
    before, after = order.given(49_999), order.given(50_001)
    between = Counter(b for batch in (49_999, 50_000) for b, _, _ in whole(order, batch))
    assert {idx: n for idx, n in enumerate((after - before).tolist()) if n} == dict(between)


@pytest.mark.parametrize("stride", [16, 192, 610, 987])
def test_a_rank_sees_every_domain_in_its_share_at_any_stride(stride: int) -> None:
    """A bucket of 30 % among a rank's slots is binomial; in the raw order it may be missing."""
    order = Order(
        [10**6, 10**6], [Segment(num_batches=400, global_sequences=2_961, weights=(3, 7))], seed=3
    )
    shares = []
    for batch in range(400):
        found = order.addresses(batch, np.arange(batch % stride, 2_961, stride))
        shares.append(((found.bucket == 0).sum() - 0.3 * len(found.bucket), len(found.bucket)))
    deviation, size = np.array(shares).T
    z = deviation / np.sqrt(size * 0.3 * 0.7 * (1 - size / 2_961))  # without replacement
    assert abs(z.mean()) < 5 / np.sqrt(400)
    assert 0.8 < z.std() < 1.2


@settings(deadline=None, max_examples=15, derandomize=True)
@given(st.integers(2, 987), st.integers(0, 986), st.integers(0, 2**32))
def test_a_share_is_binomial_for_each_domain_at_any_stride(
    stride: int, offset: int, seed: int
) -> None:
    """The same examples in every run; the bounds are five standard deviations."""
    batches, size, weights = 120, 2_961, np.array([6, 3, 1])
    segment = Segment(num_batches=batches, global_sequences=size, weights=(6, 3, 1))
    order = Order([10**6] * 3, [segment], seed=seed)
    slots = np.arange(offset % stride, size, stride)
    seen = np.stack(
        [np.bincount(order.addresses(batch, slots).bucket, minlength=3) for batch in range(batches)]
    )
    shares = weights / weights.sum()
    variance = len(slots) * shares * (1 - shares) * (1 - len(slots) / size)
    z = (seen - len(slots) * shares) / np.sqrt(variance)
    assert np.abs(z.mean(axis=0)).max() < 5 / np.sqrt(batches)
    # a standard deviation of 120 has one of 0.09 where a rank has three slots of a batch
    assert np.abs(z.std(axis=0) - 1).max() < 5 * 0.09
    assert seen.sum(axis=0).min() > 0


def test_another_seed_is_another_order() -> None:
    segment = Segment(num_batches=2, global_sequences=64, weights=(1, 1))
    one, other = (Order([500, 500], [segment], seed=seed) for seed in (1, 2))
    assert whole(one, 0) != whole(other, 0)
    assert whole(one, 0) == whole(Order([500, 500], [segment], seed=1), 0)


@pytest.mark.parametrize(
    ("windows", "segments", "said"),
    [
        ([5], [], "no segments"),
        ([5], [(1, 1, (1, 1))], "2 weights for 1 buckets"),
        ([5, 0], [(1, 1, (1, 1))], r"buckets \[1\], which have no window"),
        ([5], [(0, 1, (1,))], "num_batches=0"),
        ([5], [(2**32, 4, (1,))], "divide it"),
    ],
)
def test_an_order_that_cannot_be_is_refused(
    windows: list[int], segments: list[tuple[int, int, tuple[int, ...]]], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        Order(
            windows,
            [Segment(num_batches=n, global_sequences=g, weights=w) for n, g, w in segments],
            seed=0,
        )


@pytest.mark.parametrize("batch", [-1, 3])
def test_a_batch_that_is_not_there_is_refused(batch: int) -> None:
    order = Order([5], [Segment(num_batches=3, global_sequences=2, weights=(1,))], seed=0)
    with pytest.raises(ValueError, match=r"allowed: 0 \.\. 2"):
        order.addresses(batch, [0])
