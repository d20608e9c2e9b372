"""Which window of which bucket stands in which slot of which global batch?

A pure function of the batch's number: nothing is materialised, so step 1 and step 150,000 are
reached alike, and resuming is knowing one integer. Four layers:

1. A segment is a run of batches of one size, window length and mixture. Item n of a segment is
   apportioned to a bucket and numbered there (`apportion.py`), exactly.
2. Segments go on where the last one left each bucket: its ordinal is what it gave before plus the
   number. Epoch e = ordinal // windows, and a keyed permutation per bucket and epoch says which
   window stands at ordinal % windows (`shuffle.py`): each once before any comes again.
3. The items of a batch are put into its slots by a permutation keyed by the batch: without it, a
   rank that reads every 610th slot of so even a mixture may miss a bucket for good.
4. Ranks take slots; that is the caller's, so that ranks never change what is in a batch.

C slots asked for, B buckets.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from data.stream.apportion import MAX_ITEMS, Apportionment
from data.stream.shuffle import permutation_key, permute


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """Batches of one size, window length and mixture.

    Raises:
        ValueError: if a size is out of range.
    """

    num_batches: int
    """Global batches, at least 1."""
    global_sequences: int
    """Sequences of a batch, at least 1."""
    weights: tuple[int, ...] = ()
    """Of each bucket, in windows; those of another window length have 0."""
    window_tokens: int = 1
    """S of its windows."""
    stage: str = ""
    """Of the curriculum, for people."""

    def __post_init__(self) -> None:
        if min(self.num_batches, self.global_sequences, self.window_tokens) < 1:
            raise ValueError(
                f"a segment of num_batches={self.num_batches}, global_sequences="
                f"{self.global_sequences}, window_tokens={self.window_tokens} given; at least 1 is"
                " allowed"
            )
        if self.num_batches * self.global_sequences > MAX_ITEMS:
            raise ValueError(
                f"a segment of {self.num_batches} * {self.global_sequences} sequences given; at"
                f" most {MAX_ITEMS} are allowed: divide it"
            )

    @property
    def batch_tokens(self) -> int:
        """Input tokens of a batch, padding included."""
        return self.global_sequences * self.window_tokens


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Addresses:
    """Where the windows of some slots are.

    Attributes:
        bucket: `[C]` int64, index into the buckets.
        window: `[C]` int64, which window of its bucket.
        epoch: `[C]` int64, how often the bucket was gone through before.
    """

    bucket: NDArray[np.int64]
    window: NDArray[np.int64]
    epoch: NDArray[np.int64]


class Order:
    """The addresses of every slot of a run.

    Attributes:
        num_batches: of all segments.
        windows: of each bucket, in one epoch.
    """

    def __init__(self, windows: Sequence[int], segments: Sequence[Segment], *, seed: int) -> None:
        """Prepare the segments; their number is what start-up costs.

        Args:
            windows: of each bucket in one epoch, >= 0.
            segments: one after the other, at least one.
            seed: decides every permutation.

        Raises:
            ValueError: if a segment has weights for another number of buckets, or takes from a
                bucket that has no window.
        """
        self.windows = tuple(windows)
        self._segments = tuple(segments)
        self._seed = seed
        self._mixtures: list[Apportionment] = []
        self._given: list[NDArray[np.int64]] = [np.zeros(len(windows), dtype=np.int64)]
        self._ends: list[int] = []
        for number, segment in enumerate(segments):
            self._check(number, segment)
            self._mixtures.append(Apportionment(segment.weights))
            items = segment.num_batches * segment.global_sequences
            self._given.append(self._given[-1] + self._mixtures[-1].counts(items))
            self._ends.append(segment.num_batches + (self._ends[-1] if self._ends else 0))
        if not segments:
            raise ValueError("no segments given; at least one is needed")
        self.num_batches = self._ends[-1]

    def _check(self, number: int, segment: Segment) -> None:
        if len(segment.weights) != len(self.windows):
            raise ValueError(
                f"segment {number} has {len(segment.weights)} weights for"
                f" {len(self.windows)} buckets"
            )
        empty = [
            idx
            for idx, (weight, windows) in enumerate(zip(segment.weights, self.windows, strict=True))
            if weight and not windows
        ]
        if empty:
            raise ValueError(f"segment {number} takes from buckets {empty}, which have no window")

    def global_sequences(self, batch: int) -> int:
        """Return the slots of a batch.

        Raises:
            ValueError: if there is no such batch.
        """
        return self._segments[self._segment_of(batch)].global_sequences

    def addresses(self, batch: int, slots: ArrayLike) -> Addresses:
        """Return what stands in some slots of a batch.

        Args:
            batch: its number, 0 <= batch < num_batches.
            slots: `[C]` integers, 0 <= slot < global_sequences(batch).

        Raises:
            ValueError: if the batch or a slot is out of range.
        """
        number = self._segment_of(batch)
        segment = self._segments[number]
        first = (batch - self._first_batch(number)) * segment.global_sequences
        key = permutation_key("slots", self._seed, batch)
        places = permute(slots, num_items=segment.global_sequences, key=key)
        bucket, ordinal = self._mixtures[number].locate(first + places)
        ordinal += self._given[number][bucket]
        windows = np.array(self.windows, dtype=np.int64)[bucket]
        epoch, position = np.divmod(ordinal, windows)
        window = np.empty_like(position)
        # One permutation for each bucket and epoch that occurs.
        groups, group = np.unique(np.stack([bucket, epoch]), axis=1, return_inverse=True)
        by_group = np.argsort(group, kind="stable")
        ends = np.cumsum(np.bincount(group, minlength=groups.shape[1]))
        occurring: list[tuple[int, int]] = groups.T.tolist()
        for chosen, (b, e) in zip(np.split(by_group, ends[:-1]), occurring, strict=True):
            key = permutation_key("windows", self._seed, b, e)
            window[chosen] = permute(position[chosen], num_items=self.windows[b], key=key)
        return Addresses(bucket=bucket, window=window, epoch=epoch)

    def given(self, batch: int) -> NDArray[np.int64]:
        """Return how many windows each bucket has given before a batch, `[B]` int64.

        Args:
            batch: 0 <= batch <= num_batches.

        Raises:
            ValueError: if the batch is out of range.
        """
        if batch == self.num_batches:
            return self._given[-1].copy()
        number = self._segment_of(batch)
        items = (batch - self._first_batch(number)) * self._segments[number].global_sequences
        return self._given[number] + self._mixtures[number].counts(items)

    def _first_batch(self, number: int) -> int:
        return self._ends[number - 1] if number else 0

    def _segment_of(self, batch: int) -> int:
        if not 0 <= batch < self.num_batches:
            raise ValueError(f"batch {batch}; allowed: 0 .. {self.num_batches - 1}")
        return bisect_right(self._ends, batch)
