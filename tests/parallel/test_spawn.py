"""Ranks that stay alive: they answer in order, and a failure carries its reason."""

import math

import pytest

from parallel.spawn import RankError, RankPool, call_with_own, find_function


def test_a_function_is_found_by_name() -> None:
    assert find_function("math:sqrt") is math.sqrt


def test_every_rank_gets_its_own_and_answers_in_order(two_ranks: RankPool) -> None:
    assert two_ranks.run(call_with_own, "builtins:int", ["7", "8"]) == [7, 8]


def test_a_failure_carries_the_ranks_traceback_and_the_pool_starts_again(
    two_ranks: RankPool,
) -> None:
    with pytest.raises(RankError) as failure:
        two_ranks.run(call_with_own, "math:sqrt", [1.0, -1.0])
    assert "rank 1 of 2 failed" in str(failure.value)
    assert "Traceback" in str(failure.value)
    assert "ValueError" in str(failure.value)
    assert two_ranks.run(call_with_own, "math:sqrt", [1.0, 4.0]) == [1.0, 2.0]


def test_ranks_that_hang_are_ended_and_show_every_stack(two_ranks: RankPool) -> None:
    two_ranks.run(call_with_own, "builtins:int", ["0", "0"])  # they are there now
    with pytest.raises(RankError) as failure:
        # rank 0 waits in a collective, in C, for rank 1, which never enters it
        two_ranks.run(call_with_own, "tests.parallel.hang:wait", [0, 1], timeout_s=3)
    before, _, last = str(failure.value).rpartition("\n")
    assert last.startswith("ranks [0, 1] did not answer within 3 s: rank 0 in barrier (")
    assert ", rank 1 in never_enter (hang.py:" in last
    stack_0, _, stack_1 = before.partition("rank 1, innermost call last:")
    assert stack_0.startswith("rank 0, innermost call last:")
    assert ", in enter\n" in stack_0
    assert ", in never_enter" not in stack_0
    assert stack_1.endswith(", in never_enter")


@pytest.mark.slow
def test_ranks_that_had_answered_are_named_beside_those_that_hang(two_ranks: RankPool) -> None:
    two_ranks.run(call_with_own, "builtins:int", ["0", "0"])  # they are there now
    with pytest.raises(RankError, match=r"ranks \[0\] did not answer.*ranks \[1\] had answered"):
        two_ranks.run(call_with_own, "tests.parallel.hang:wait", [0, 2], timeout_s=3)
