"""Positions, documents and masks of a window are what counting token by token gives."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.stream.documents import window_documents


@st.composite
def windows(draw: st.DrawFn) -> tuple[int, list[int]]:
    """Draw S and lengths of pieces of at most S + 1 tokens, often exactly so many."""
    window_tokens = draw(st.integers(1, 40))
    cuts = draw(st.sets(st.integers(1, window_tokens), max_size=window_tokens))
    end = draw(st.sampled_from([window_tokens + 1, window_tokens, window_tokens - 1, 1]))
    bounds = [0, *sorted(cut for cut in cuts if cut < end), end]
    lengths = [after - before for before, after in pairwise(bounds)]
    return window_tokens, [length for length in lengths if length] or [1]


def counted(
    lengths: list[int], window_tokens: int, *, across_documents: bool
) -> tuple[list[int], list[int], list[int], list[float]]:
    """Return positions, documents, bounds and mask, token by token."""
    padded = [(piece, place) for piece, length in enumerate(lengths) for place in range(length)]
    num_tokens = len(padded)
    padded += [(len(lengths), place) for place in range(window_tokens + 1 - num_tokens)]
    mask: list[float] = []
    for at in range(window_tokens):
        is_padding = at + 1 >= num_tokens
        is_last = padded[at + 1][0] != padded[at][0]
        mask.append(0.0 if is_padding or (is_last and not across_documents) else 1.0)
    inputs = padded[:window_tokens]
    bounds = [at for at, (_, place) in enumerate(inputs) if place == 0]
    positions, documents = [place for _, place in inputs], [piece for piece, _ in inputs]
    return positions, documents, [*bounds, window_tokens], mask


@settings(deadline=None)
@given(windows(), st.booleans())
def test_it_is_what_counting_token_by_token_gives(
    window: tuple[int, list[int]], across_documents: bool
) -> None:
    window_tokens, lengths = window
    found = window_documents(
        np.array(lengths, dtype=np.uint32),
        window_tokens=window_tokens,
        across_documents=across_documents,
    )
    arrays = (found.positions, found.documents, found.cu_seqlens, found.loss_mask)
    assert [array.dtype.name for array in arrays] == ["int64", "int32", "int32", "float32"]
    expected = counted(lengths, window_tokens, across_documents=across_documents)
    assert tuple(array.tolist() for array in arrays) == expected


@pytest.mark.parametrize(
    ("lengths", "bounds", "mask"),
    [
        ([5], [0, 4], [1, 1, 1, 1]),
        ([4], [0, 4], [1, 1, 1, 0]),
        ([4, 1], [0, 4], [1, 1, 1, 0]),
        ([3], [0, 3, 4], [1, 1, 0, 0]),
        ([1], [0, 1, 4], [0, 0, 0, 0]),
        ([1, 1, 1, 1, 1], [0, 1, 2, 3, 4], [0, 0, 0, 0]),
        ([2, 3], [0, 2, 4], [1, 0, 1, 1]),
    ],
)
def test_the_end_of_a_window_is_cut_where_its_inputs_end(
    lengths: list[int], bounds: list[int], mask: list[int]
) -> None:
    found = window_documents(np.array(lengths), window_tokens=4, across_documents=False)
    assert found.cu_seqlens.tolist() == bounds
    assert found.loss_mask.tolist() == mask


@pytest.mark.parametrize("lengths", [[], [3, 3], [2, 0, 1], [6]])
def test_pieces_that_cannot_fill_a_window_are_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match=r"4 \+ 1 ids; at least one piece"):
        window_documents(np.array(lengths, dtype=int), window_tokens=4, across_documents=True)
