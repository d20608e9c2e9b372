"""Which document is each token of a window from, where in it, and which labels count?

A window of S + 1 ids gives S inputs, `ids[:-1]`, and S labels, `ids[1:]`. Its pieces cover the
first ids of the S + 1; what is left is padding. So of the last piece the inputs may lack the last
token, which is a label only; a piece of nothing else has no input and is left out. Padding among
the inputs forms a piece of its own, the last one, so that the pieces of the inputs cover them all.

Only lengths are asked for: a document that was cut, or that contains the id which ends documents,
is counted right.

S inputs, P pieces of a window, Q pieces of its inputs, the padding's included: P - 1 <= Q <= P + 1.
"""

from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class WindowDocuments:
    """The pieces of the inputs of a window, in the forms in which a model asks for them.

    Attributes:
        positions: `[S]` int64, 0 at the beginning of each piece.
        documents: `[S]` int32, the piece of each input, rising from 0 in steps of 1.
        cu_seqlens: `[Q+1]` int32, where each piece begins, from 0; the last entry is S.
        loss_mask: `[S]` float32, 1 where the label counts, 0 where it does not.
    """

    positions: NDArray[np.int64]
    documents: NDArray[np.int32]
    cu_seqlens: NDArray[np.int32]
    loss_mask: NDArray[np.float32]


def window_documents(
    piece_lengths: NDArray[np.integer], *, window_tokens: int, across_documents: bool
) -> WindowDocuments:
    """Return positions, documents and loss mask of the inputs of one window.

    Args:
        piece_lengths: `[P]` integers as in a `StoredWindow`: each at least 1, at most S + 1 in all.
        window_tokens: S, at least 1.
        across_documents: whether the label of the last token of a piece counts where it is the
            first token of the next. A label that is padding never counts.

    Returns:
        New arrays. S 6 and lengths 3, 2 give positions 0 1 2 0 1 0, cu_seqlens 0 3 5 6 and the mask
        1 1 0 1 0 0, or 1 1 1 1 0 0 across documents.

    Raises:
        ValueError: if there is no piece, one is empty, or they have more than S + 1 tokens.
    """
    lengths: list[int] = piece_lengths.tolist()  # a handful: lists are faster than arrays
    ends = list(accumulate(lengths))
    num_tokens = ends[-1] if ends else 0
    if not 0 < num_tokens <= window_tokens + 1 or 0 in lengths:
        raise ValueError(
            f"pieces of {lengths[:8]} ... tokens, {num_tokens} together, given for a window of"
            f" {window_tokens} + 1 ids; at least one piece and no empty one is allowed"
        )
    bounds = np.array([0, *ends[: bisect_left(ends, window_tokens)], window_tokens])
    sizes = bounds[1:] - bounds[:-1]
    # Repeating is three times as fast as a cumulative sum over S of steps back to 0.
    positions_S = np.arange(window_tokens)
    positions_S -= bounds[:-1].repeat(sizes)
    loss_mask_S = np.ones(window_tokens, dtype=np.float32)
    loss_mask_S[num_tokens - 1 :] = 0.0
    if not across_documents:
        loss_mask_S[bounds[1 : bisect_right(ends, window_tokens) + 1] - 1] = 0.0
    return WindowDocuments(
        positions=positions_S,
        documents=np.arange(len(sizes), dtype=np.int32).repeat(sizes),
        cu_seqlens=bounds.astype(np.int32),
        loss_mask=loss_mask_S,
    )
