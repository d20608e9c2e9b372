"""Ranks exchange JSON: values of any length, in rank order, and nothing that could run."""

import os
from typing import Any

import pytest

from parallel.agreement import (
    all_gather_json,
    from_first_rank,
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


def test_what_is_no_json_is_refused(two_ranks: RankPool) -> None:
    with pytest.raises(RankError, match="is not JSON serializable"):
        two_ranks.run(give_no_json)
