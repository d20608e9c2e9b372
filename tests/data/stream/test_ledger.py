"""A change applies from its batch on, exactly, and a ledger that was touched is noticed."""

import hashlib
import json
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.indexed.format import DataError
from data.stream.ledger import Entry, Ledger
from data.stream.order import Order, Segment

WINDOWS = (40, 30, 50)
MIXTURES = [(5, 3, 2), (1, 8, 1), (1, 1, 8), (0, 1, 1)]


def segment(mixture: tuple[int, ...], batches: int = 20) -> Segment:
    return Segment(num_batches=batches, global_sequences=12, weights=mixture)


def skip(first: int, number: int) -> Entry:
    return Entry(kind="skip", first_batch=first, num_batches=number, reason="spike")


def changes_of_mixture(batches: list[int], *, num_batches: int) -> tuple[Entry, ...]:
    """Return entries by which another mixture counts from each of the batches on."""
    return tuple(
        Entry(
            kind="plan",
            first_batch=batch,
            windows=WINDOWS,
            segments=(segment(mixture, num_batches - batch),),
            reason="another mixture",
        )
        for batch, mixture in zip(sorted(batches), MIXTURES[1:], strict=False)
    )


def whole(order: Order, batch: int) -> list[tuple[int, int, int]]:
    found = order.addresses(batch, np.arange(order.global_sequences(batch)))
    return list(
        zip(found.bucket.tolist(), found.window.tolist(), found.epoch.tolist(), strict=True)
    )


skips = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 9)), max_size=5)


@given(skips)
def test_steps_go_through_what_is_not_skipped(ranges: list[tuple[int, int]]) -> None:
    ledger = Ledger(tuple(skip(first, number) for first, number in ranges))
    out = {batch for first, number in ranges for batch in range(first, first + number)}
    expected = [batch for batch in range(200) if batch not in out][:80]
    assert [ledger.batch_of(step) for step in range(80)] == expected


@settings(deadline=None, max_examples=20)
@given(skips, st.integers(0, 80))
def test_nothing_else_moves_when_batches_are_skipped(
    ranges: list[tuple[int, int]], change: int
) -> None:
    """Also where the mixture changes later, or has changed before."""
    mixtures = Ledger(changes_of_mixture([change], num_batches=90))
    skipping = Ledger((*(skip(first, number) for first, number in ranges), *mixtures.entries))
    begun = [segment(MIXTURES[0], 90)]
    order = mixtures.order(WINDOWS, begun, seed=1)
    again = skipping.order(WINDOWS, begun, seed=1)
    out = {batch for first, number in ranges for batch in range(first, first + number)}
    left = [batch for batch in range(90) if batch not in out]
    trained = [whole(again, skipping.batch_of(step)) for step in range(len(left))]
    assert trained == [whole(order, batch) for batch in left]


three_changes = st.lists(st.integers(0, 40), min_size=3, max_size=3)


@settings(deadline=None, max_examples=40)
@given(three_changes)
def test_three_changes_of_mixture_lose_and_repeat_nothing(changes: list[int]) -> None:
    ledger = Ledger(changes_of_mixture(changes, num_batches=60))
    before = Order(WINDOWS, [segment(MIXTURES[0], 60)], seed=1)
    order = ledger.order(WINDOWS, [segment(MIXTURES[0], 60)], seed=1)
    first = min(changes)
    assert [whole(order, b) for b in range(first)] == [whole(before, b) for b in range(first)]
    seen = Counter(place for batch in range(60) for place in whole(order, batch))
    assert max(seen.values()) == 1
    for bucket, windows in enumerate(WINDOWS):
        epochs = Counter(epoch for b, _, epoch in seen if b == bucket)
        assert all(epochs[epoch] == windows for epoch in range(len(epochs) - 1))


@settings(deadline=None, max_examples=30)
@given(three_changes)
def test_what_was_given_is_counted_across_three_changes_of_mixture(changes: list[int]) -> None:
    ledger = Ledger(changes_of_mixture(changes, num_batches=60))
    order = ledger.order(WINDOWS, [segment(MIXTURES[0], 60)], seed=1)
    total = np.zeros(len(WINDOWS), dtype=np.int64)
    for batch in range(60):
        assert order.given(batch).tolist() == total.tolist()
        total += np.bincount([bucket for bucket, _, _ in whole(order, batch)], minlength=3)
    assert order.given(60).tolist() == total.tolist()


def test_new_text_is_a_new_bucket_and_moves_no_old_one() -> None:
    more = Entry(
        kind="plan",
        first_batch=10,
        windows=(*WINDOWS, 25),
        segments=(segment((5, 3, 2, 4), 10),),
        reason="new text",
    )
    order = Ledger((more,)).order(WINDOWS, [segment(MIXTURES[0])], seed=1)
    before = Order(WINDOWS, [segment(MIXTURES[0])], seed=1)
    assert [whole(order, b) for b in range(10)] == [whole(before, b) for b in range(10)]
    assert {b for batch in range(10, 20) for b, _, _ in whole(order, batch)} == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("first_batch", "windows", "said"),
    [(61, WINDOWS, "the run ends 41 before it"), (3, (41, 30, 50), "add the new text as a bucket")],
)
def test_a_plan_that_does_not_fit_is_refused(
    first_batch: int, windows: tuple[int, ...], said: str
) -> None:
    entry = Entry(
        kind="plan",
        first_batch=first_batch,
        windows=windows,
        segments=(segment(MIXTURES[1]),),
        reason="no",
    )
    with pytest.raises(ValueError, match=said):
        Ledger((entry,)).order(WINDOWS, [segment(MIXTURES[0])], seed=1)


@pytest.fixture
def lines() -> list[dict[str, Any]]:
    """Return three entries as they come back from a file."""
    new = Entry(
        kind="plan",
        first_batch=9,
        windows=WINDOWS,
        segments=(segment(MIXTURES[1]),),
        reason="more code",
    )
    return json.loads(json.dumps(Ledger((skip(4, 3), new, skip(30, 1))).as_json()))


def test_a_ledger_comes_back_as_it_was(lines: list[dict[str, Any]]) -> None:
    ledger = Ledger.from_json(lines, source="ledger.jsonl")
    assert ledger.as_json() == Ledger.from_json(ledger.as_json(), source="").as_json()
    assert ledger.digest == lines[-1]["digest"]
    assert [entry.kind for entry in ledger.entries] == ["skip", "plan", "skip"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda lines: lines[0].update(num_batches=4),
        lambda lines: lines[1]["segments"][0].update(weights=[1, 1, 1]),
        lambda lines: lines[2].update(reason="none"),
        lambda lines: lines.pop(0),
        lambda lines: lines.reverse(),
        lambda lines: lines[1].pop("windows"),
        lambda lines: lines[1].update(first_batch=-1),
    ],
)
def test_a_ledger_that_was_touched_is_refused(damage: Any, lines: list[dict[str, Any]]) -> None:
    damage(lines)
    with pytest.raises(DataError, match=r"ledger\.jsonl: entry \d"):
        Ledger.from_json(lines, source="ledger.jsonl")


@pytest.mark.parametrize(
    "values",
    [
        {"kind": "skip", "first_batch": -1, "num_batches": 1, "reason": "x"},
        {"kind": "skip", "first_batch": 1, "reason": "x"},
        {"kind": "skip", "first_batch": 1, "num_batches": 1, "reason": " "},
        {"kind": "plan", "first_batch": 1, "reason": "x"},
    ],
)
def test_an_entry_that_says_nothing_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="ledger: kind="):
        Entry(**values)


def test_rates_count_for_their_batches_and_multiply() -> None:
    first, then = (
        Entry(kind="rate", first_batch=start, num_batches=10, factor=0.5, reason="a test")
        for start in (5, 10)
    )
    ledger = Ledger((first, then))
    factors = [ledger.rate_factor(batch) for batch in (4, 5, 9, 10, 14, 15, 19, 20)]
    assert factors == [1.0, 0.5, 0.5, 0.25, 0.25, 0.5, 0.5, 1.0]
    assert ledger.batch_of(12) == 12  # no batch is left out
    assert Ledger.from_json(ledger.as_json(), source="a test") == ledger


def test_the_digest_of_a_ledger_without_rates_is_what_it_was_before_there_were_any() -> None:
    """Checkpoints and ledgers of older code stay valid: the field is not in their digests."""
    entry = skip(3, 2)
    values = {
        "kind": "skip", "first_batch": 3, "reason": entry.reason, "num_batches": 2, "windows": [],
        "segments": [], "buckets": [], "contents": [], "dataset": "", "curriculum": "",
        "bucket": -1, "window": -1,
    }  # fmt: skip
    text = json.dumps(["0" * 64, values], sort_keys=True)
    assert Ledger((entry,)).digest == hashlib.sha256(text.encode()).hexdigest()
