"""Does a text repeat itself, n-gram after n-gram?

Text that came out of a broken page or a scanner repeats one line, word or sign for ever; what a
model learns from it in one batch may take it thousands of steps to forget.

Source: OLMo 2 (arXiv 2501.00656, section 3.1): documents with an n-gram of 1 to 13 tokens that is
repeated 32 times or more are left out of the loss, as they precede spikes of the gradient norm.
"""

import numpy as np
from numpy.typing import NDArray

LONGEST_PERIOD = 13
"""Tokens of the n-grams that are looked for, at most."""


def most_repeated(ids: NDArray[np.integer]) -> tuple[int, int]:
    """Return how long the n-gram is that is repeated most often in a row, and how often it stands.

    `5 7 5 7 5 7` is (2, 3): an n-gram of two ids, three times. Of two alike the shorter counts.

    Args:
        ids: `[T]` integers.

    Returns:
        Ids of the n-gram, 1 to 13, and how often it stands there, at least 1; (0, 0) of no ids.
    """
    if not len(ids):
        return (0, 0)
    period, times = 1, 1
    for length in range(1, min(LONGEST_PERIOD, len(ids) - 1) + 1):
        found = _longest_run(ids[length:] == ids[:-length]) // length + 1
        if found > times:
            period, times = length, found
    return (period, times)


def _longest_run(same: NDArray[np.bool_]) -> int:
    """Return the length of the longest row of true values."""
    ends = np.flatnonzero(~np.concatenate([[False], same, [False]]))
    return int(np.diff(ends).max()) - 1
