"""Ranks exchange JSON and arrays: values of any length, in rank order, and never as pickles."""

import os
import pickle
from typing import Any

import numpy as np
import pytest

from parallel.agreement import (
    all_gather_json,
    from_first_rank,
    gather_arrays,
    gather_json,
    require_same_on_all,
)
from parallel.spawn import RankError, RankPool


def exchange() -> tuple[Any, Any, Any]:
    rank = int(os.environ["RANK"])
    own = {"rank": rank, "text": "서울" * (1 + 5000 * rank), "nothing": None}
    return gather_json(own), all_gather_json([rank] * (rank + 1)), from_first_rank(f"of {rank}")


def test_values_come_in_rank_order_whatever_their_length(two_ranks: RankPool) -> None:
    (gathered, everyone, first), (none, everyone_1, first_1) = two_ranks.run(exchange)
    assert none is None
    assert [value["rank"] for value in gathered] == [0, 1]
    assert gathered[1]["text"] == "서울" * 5001
    assert everyone == everyone_1 == [[0], [1, 1]]
    assert first == first_1 == "of 0"


def differ() -> None:
    require_same_on_all("ledger", "abc" if os.environ["RANK"] == "0" else "abd")


def test_ranks_that_hold_unlike_values_are_named(two_ranks: RankPool) -> None:
    with pytest.raises(RankError, match=r"ledger: ranks \[1\] of 2 have another one than rank 0"):
        two_ranks.run(differ)


def give_no_json() -> None:
    all_gather_json(object())


@pytest.mark.slow
def test_what_is_no_json_is_refused(two_ranks: RankPool) -> None:
    with pytest.raises(RankError, match="is not JSON serializable"):
        two_ranks.run(give_no_json)


def arrays_of(rank: int) -> dict[str, Any]:
    """Return arrays that differ from rank to rank in number, shape and dtype."""
    draw = np.random.default_rng(rank)
    found = {
        "logits 0": draw.standard_normal((3, 2 + rank, 5)).astype(np.float32),
        "experts 1 0": draw.integers(0, 9, (4, 2)).astype(np.int32),
        "nothing": np.zeros((0, 7), dtype=np.float64),
        "one": np.asarray(draw.random()),
        "turned": draw.standard_normal((4, 6)).T,
    }
    return found if rank else {**found, "more": np.asarray([True, False])}


def gathered(unpickled: str) -> list[dict[str, Any]] | None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError(unpickled)

    kept, pickle.loads = pickle.loads, refuse  # type: ignore[assignment]
    try:
        return gather_arrays(arrays_of(int(os.environ["RANK"])))
    finally:
        pickle.loads = kept


def gathered_objects() -> None:
    gather_arrays({"objects": np.asarray([None, "text"], dtype=object)})


def test_arrays_of_unlike_ranks_arrive_bit_by_bit_without_a_pickle(two_ranks: RankPool) -> None:
    first, second = two_ranks.run(gathered, "something was unpickled")
    assert second is None
    assert len(first) == 2
    for rank, found in enumerate(first):
        wanted = arrays_of(rank)
        assert list(found) == list(wanted)
        for name, values in wanted.items():
            assert found[name].dtype == values.dtype
            np.testing.assert_array_equal(found[name], values)
            assert found[name].shape == values.shape


@pytest.mark.slow
def test_arrays_of_objects_are_refused(two_ranks: RankPool) -> None:
    with pytest.raises(RankError, match="objects holds objects, arrays of numbers are allowed"):
        two_ranks.run(gathered_objects)
