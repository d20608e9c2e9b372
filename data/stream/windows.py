"""What does training read of some windows?

Tokens, which labels count, and which document of its window each token is from. Labels are the
tokens one place on; a label that is padding never counts.

C windows, S inputs of a window; S + 1 ids are stored.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from data.indexed.dataset import Dataset
from data.indexed.window_format import StoredWindow


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Windows:
    """Some windows of one length.

    Attributes:
        tokens: `[C, S+1]` int32; inputs are `tokens[:, :-1]`, labels `tokens[:, 1:]`.
        num_tokens: `[C]` int64, ids of each window without padding, 1 .. S + 1.
        stored: each window as the store gave it: its pieces, and the documents they are of.
    """

    tokens: NDArray[np.int32]
    num_tokens: NDArray[np.int64]
    stored: Sequence[StoredWindow]

    @property
    def loss_mask(self) -> NDArray[np.bool_]:
        """`[C, S]`: where the label is no padding."""
        places = np.arange(1, self.tokens.shape[1])
        return places < self.num_tokens[:, None]

    @property
    def documents(self) -> NDArray[np.int32]:
        """`[C, S+1]`: which piece of its window each id is from; padding is one more."""
        numbers = np.zeros_like(self.tokens)
        for row, window in zip(numbers, self.stored, strict=True):
            ends = np.cumsum(window.piece_lengths, dtype=np.int64)
            row[ends[ends < len(row)]] = 1
        return np.cumsum(numbers, axis=1, dtype=np.int32)


def read_windows(
    dataset: Dataset,
    buckets: ArrayLike,
    windows: ArrayLike,
    *,
    tokens: NDArray[np.int32] | None = None,
) -> Windows:
    """Return some windows of one length.

    Args:
        dataset: of which.
        buckets: `[C]` integers, all of one window length; C >= 1.
        windows: `[C]` integers.
        tokens: `[C, S+1]` int32 to read into; None: new memory.

    Raises:
        DataError: as `Dataset.read_into`.
    """
    bucket = np.atleast_1d(np.asarray(buckets, dtype=np.int64))
    if tokens is None:
        window_tokens = dataset.header.buckets[int(bucket[0])].window_tokens
        tokens = np.empty((len(bucket), window_tokens + 1), dtype=np.int32)
    stored = dataset.read_into(bucket, windows, tokens)
    num_tokens = np.array([window.num_tokens for window in stored], dtype=np.int64)
    return Windows(tokens=tokens, num_tokens=num_tokens, stored=stored)


def spread_windows(dataset: Dataset, *, per_domain: int) -> tuple[NDArray[np.int64], ...]:
    """Return buckets and windows of a fixed choice, the same for every seed; for validation.

    Domain by domain, `per_domain` windows of each, evenly spaced from its first to its last (all of
    them where there are fewer).

    Args:
        dataset: its buckets are of one window length.
        per_domain: at least 1.

    Returns:
        Bucket and window, `[C]` int64 each.

    Raises:
        ValueError: if `per_domain` is below 1.
    """
    if per_domain < 1:
        raise ValueError(f"per_domain={per_domain}; allowed: >= 1")
    by_domain: dict[str, list[int]] = {}
    for number, bucket in enumerate(dataset.header.buckets):
        by_domain.setdefault(bucket.domain, []).append(number)
    buckets: list[NDArray[np.int64]] = []
    windows: list[NDArray[np.int64]] = []
    for domain in sorted(by_domain):
        numbers = np.array(by_domain[domain], dtype=np.int64)
        ends = np.cumsum(dataset.num_windows[numbers])
        chosen = min(per_domain, int(ends[-1]))
        places = np.arange(chosen, dtype=np.int64) * int(ends[-1]) // max(chosen, 1)
        which = np.searchsorted(ends, places, side="right")
        buckets.append(numbers[which])
        windows.append(places - (ends - dataset.num_windows[numbers])[which])
    return np.concatenate(buckets), np.concatenate(windows)
