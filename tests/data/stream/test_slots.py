"""Who takes which slots of a batch: against the whole batch."""

import itertools

import pytest

from data.stream.slots import local_slots, micro_sequences


def test_replicas_share_a_batch_without_gap_or_overlap() -> None:
    for micro, dp, times in itertools.product((1, 2, 3), (1, 2, 4), (1, 2, 5)):
        size = micro * dp * times
        parts = [
            local_slots(size, micro_sequences=micro, dp=dp, data_rank=rank) for rank in range(dp)
        ]
        assert sorted(slot for part in parts for slots in part for slot in slots) == [*range(size)]
        assert {len(part) for part in parts} == {times}
        assert {len(slots) for part in parts for slots in part} == {micro}


def test_the_sequences_of_a_step_do_not_depend_on_replicas() -> None:
    """The m-th micro-batches of all replicas are the m-th stretch of the batch, for any dp."""
    for dp in (1, 2, 4):
        parts = [local_slots(16, micro_sequences=2, dp=dp, data_rank=rank) for rank in range(dp)]
        merged = [
            slot for m in range(len(parts[0])) for rank in range(dp) for slot in parts[rank][m]
        ]
        assert merged == [*range(16)]


def test_a_batch_that_replicas_do_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match=r"dp=3 \* micro_sequences=2 = 6 must divide"):
        local_slots(16, micro_sequences=2, dp=3, data_rank=0)


@pytest.mark.parametrize(("window_tokens", "expected"), [(64, 4), (100, 2), (256, 1), (512, 1)])
def test_a_micro_batch_holds_the_windows_that_fit_and_one_at_least(
    window_tokens: int, expected: int
) -> None:
    assert micro_sequences(256, window_tokens=window_tokens) == expected
