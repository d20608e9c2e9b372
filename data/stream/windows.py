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
from data.stream.documents import window_documents

_DESCRIBED = ("loss_mask", "documents")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Windows:
    """Some windows of one length.

    Attributes:
        tokens: `[C, S+1]` int32; inputs are `tokens[:, :-1]`, labels `tokens[:, 1:]`.
        stored: each window as the store gave it: its pieces, and the documents they are of.
    """

    tokens: NDArray[np.int32]
    stored: Sequence[StoredWindow]

    def described(self, *, across_documents: bool) -> tuple[NDArray[np.bool_], NDArray[np.int32]]:
        """Return which labels count, and which document of its window each input is from.

        Args:
            across_documents: whether a label counts that is the first token of another document.

        Returns:
            `[C, S]` bool and `[C, S]` int32; padding is one document more.
        """
        found = [
            window_documents(
                window.piece_lengths,
                window_tokens=self.tokens.shape[1] - 1,
                across_documents=across_documents,
            )
            for window in self.stored
        ]
        masks, documents = ([getattr(one, name) for one in found] for name in _DESCRIBED)
        return np.stack(masks).astype(bool), np.stack(documents)


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
    return Windows(tokens=tokens, stored=stored)


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
