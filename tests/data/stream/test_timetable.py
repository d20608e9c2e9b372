"""Sizes and sums of batches: against a walk through every one of them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.stream.order import Segment
from data.stream.timetable import Timetable

segments = st.lists(
    st.builds(
        Segment,
        num_batches=st.integers(1, 7),
        global_sequences=st.integers(1, 9),
        window_tokens=st.integers(1, 5),
    ),
    min_size=1,
    max_size=6,
)


@given(segments)
def test_sums_are_those_of_a_walk(parts: list[Segment]) -> None:
    timetable = Timetable(parts)
    walk = [part for part in parts for _ in range(part.num_batches)]
    assert timetable.num_batches == len(walk)
    sequences = tokens = 0
    for batch, part in enumerate(walk):
        assert timetable.segment_at(batch) is part
        assert timetable.segments_from(batch)[0] is part
        assert timetable.sequences_before(batch) == sequences
        assert timetable.tokens_before(batch) == tokens
        sequences += part.global_sequences
        tokens += part.global_sequences * part.window_tokens
    assert timetable.segments_from(len(walk)) == ()
    assert timetable.sequences_before(len(walk)) == timetable.num_sequences == sequences
    assert timetable.tokens_before(len(walk)) == timetable.num_tokens == tokens


@given(segments, st.integers(0, 400))
def test_a_batch_after_some_tokens_is_the_first_with_as_many_before_it(
    parts: list[Segment], tokens: int
) -> None:
    timetable = Timetable(parts)
    enough = [
        batch
        for batch in range(timetable.num_batches + 1)
        if timetable.tokens_before(batch) >= tokens
    ]
    assert timetable.batch_after(tokens) == (enough[0] if enough else timetable.num_batches)


def test_a_batch_that_is_not_there_is_refused() -> None:
    timetable = Timetable([Segment(num_batches=2, global_sequences=1)])
    with pytest.raises(ValueError, match=r"batch 2; allowed: 0 \.\. 1"):
        timetable.segment_at(2)
    with pytest.raises(ValueError, match=r"batch 3; allowed: 0 \.\. 2"):
        timetable.tokens_before(3)
    with pytest.raises(ValueError, match="no segments"):
        Timetable([])
