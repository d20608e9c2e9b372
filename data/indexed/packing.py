"""Which tokens of which documents fill which window?

A window holds `capacity` ids: S inputs and, one place on, S targets, so S + 1. Two policies:

`best_fit`: a document keeps its boundaries. One that is longer than the capacity is cut into full
windows first; its rest and all shorter documents are packed by best fit, longest first: each goes
into the fullest window that still has room for it. What is left of a window is padding.

`concat`: documents back to back, cut where a window ends; only the last window has padding.

Best fit runs over lengths, not over documents: documents of one length are interchangeable, and so
are windows of one history, so a step moves a whole group of windows at once. The result is that of
best fit document by document, at a cost that hardly grows with their number.

Afterwards the windows are shuffled, since packing leaves those of like lengths side by side, and
the pieces of a window stand in the order of their documents, not of their lengths.

N documents, P pieces, W windows.

Source: Krell et al., "Efficient sequence packing without cross-contamination", arXiv 2107.02027
(packing by histogram); Ding et al., "Fewer truncations improve language modeling",
arXiv 2404.10830 (best-fit decreasing, long documents cut first).
"""

from bisect import bisect_left, insort
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from data.stream.shuffle import permutation_key, permute

PackingPolicy = Literal["best_fit", "concat"]
POLICIES: tuple[PackingPolicy, ...] = get_args(PackingPolicy)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Packing:
    """Pieces of documents, in the order in which they stand in their windows.

    Attributes:
        capacity: ids of a window, padding included.
        first_piece: `[W+1]` int64; window w holds pieces first_piece[w] .. first_piece[w + 1].
        document_idx: `[P]` int64, the document of each piece.
        piece_offsets: `[P]` int64, where in its document a piece begins, in tokens.
        piece_lengths: `[P]` int64, tokens of each piece, at least 1.
    """

    capacity: int
    first_piece: NDArray[np.int64]
    document_idx: NDArray[np.int64]
    piece_offsets: NDArray[np.int64]
    piece_lengths: NDArray[np.int64]

    @property
    def num_windows(self) -> int:
        """W."""
        return len(self.first_piece) - 1

    @property
    def num_tokens(self) -> int:
        """Tokens of all windows without padding."""
        return int(self.piece_lengths.sum())

    @property
    def padding_fraction(self) -> float:
        """Share of all places that hold padding, 0 .. 1; 0 without windows."""
        places = self.num_windows * self.capacity
        return 1 - self.num_tokens / places if places else 0.0


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Pieces:
    """Pieces before they are ordered, `[P]` int64 each."""

    window: NDArray[np.int64]
    document: NDArray[np.int64]
    offset: NDArray[np.int64]
    length: NDArray[np.int64]


def pack(
    document_lengths: ArrayLike, *, capacity: int, policy: PackingPolicy, seed: int
) -> Packing:
    """Return the windows that hold every token of every document once.

    Args:
        document_lengths: `[N]` integers, tokens of each document, >= 0; empty ones have no piece.
        capacity: ids of a window, S + 1; at least 2.
        policy: see the module.
        seed: of the order of windows, and of which of the documents of one length go where; the
            same arguments give the same packing on any machine.

    Raises:
        ValueError: if the lengths are not one dimension of integers >= 0, `capacity` is below 2, or
            there is no such policy.
    """
    lengths = np.asarray(document_lengths)
    if lengths.size == 0:
        lengths = np.zeros(0, dtype=np.int64)
    if lengths.ndim != 1 or not np.issubdtype(lengths.dtype, np.integer):
        raise ValueError(
            f"document lengths of shape {lengths.shape}, dtype {lengths.dtype} given; wanted: one "
            f"dimension of integers"
        )
    if lengths.size and lengths.min() < 0:
        number = int(lengths.argmin())
        raise ValueError(f"document {number} has {lengths[number]} tokens; allowed: >= 0")
    if capacity < 2:
        raise ValueError(f"capacity={capacity} ids given; at least 2: one input and its target")
    if policy not in POLICIES:
        raise ValueError(f"packing policy {policy!r} given; allowed: {', '.join(POLICIES)}")
    lengths = lengths.astype(np.int64)
    if policy == "best_fit":
        pieces = _best_fit(lengths, capacity=capacity, seed=seed)
    else:
        pieces = _concat(lengths, capacity=capacity)
    return _ordered(pieces, capacity=capacity, seed=seed)


def _ordered(pieces: _Pieces, *, capacity: int, seed: int) -> Packing:
    """Return the packing with its windows shuffled, pieces of a window in document order."""
    num_windows = int(pieces.window.max()) + 1 if pieces.window.size else 0
    key = permutation_key("windows of a shard", seed)
    shuffled = permute(np.arange(num_windows), num_items=num_windows, key=key)
    window = shuffled[pieces.window]
    order = np.lexsort((pieces.offset, pieces.document, window))
    first = np.zeros(num_windows + 1, dtype=np.int64)
    np.cumsum(np.bincount(window, minlength=num_windows), out=first[1:])
    return Packing(
        capacity=capacity,
        first_piece=first,
        document_idx=pieces.document[order],
        piece_offsets=pieces.offset[order],
        piece_lengths=pieces.length[order],
    )


def _concat(lengths: NDArray[np.int64], *, capacity: int) -> _Pieces:
    """Return the pieces of documents back to back."""
    starts = np.cumsum(lengths) - lengths
    total = int(lengths.sum())
    cuts = np.union1d(starts[lengths > 0], np.arange(0, total, capacity))
    # of several documents that start here all but the last are empty
    document = np.searchsorted(starts, cuts, side="right") - 1
    return _Pieces(
        window=cuts // capacity,
        document=document,
        offset=cuts - starts[document],
        length=np.diff(cuts, append=total),
    )


def _best_fit(lengths: NDArray[np.int64], *, capacity: int, seed: int) -> _Pieces:
    """Return the pieces of best fit, longest first."""
    per_document = -(-lengths // capacity)
    document = np.repeat(np.arange(len(lengths)), per_document)
    number = _count_up(per_document)
    offset = number * capacity
    length = np.minimum(lengths[document] - offset, capacity)
    places, place_lengths = _windows_by_length(length, capacity)
    # both hold the same lengths: the k-th longest piece goes into the k-th longest place; pieces of
    # one length are shuffled, or neighbours among the documents would share windows
    key = permutation_key("pieces of one length", seed)
    shuffled = permute(np.arange(len(length)), num_items=len(length), key=key)
    by_length = shuffled[np.argsort(-length[shuffled], kind="stable")]
    window = np.empty(len(length), dtype=np.int64)
    window[by_length] = places[np.argsort(-place_lengths, kind="stable")]
    return _Pieces(window=window, document=document, offset=offset, length=length)


def _windows_by_length(
    lengths: NDArray[np.int64], capacity: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return window and length of each place, `[P]` int64 each, the same lengths as `lengths`."""
    groups = _Groups(capacity)
    values, counts = np.unique(lengths, return_counts=True)
    for length, count in zip(values[::-1].tolist(), counts[::-1].tolist(), strict=True):
        groups.add(length, count)
    records = groups.records()
    length, times, first, count = records.T
    places = times * count
    within = _count_up(places)
    window = np.repeat(first, places) + within // np.repeat(times, places)
    return window, np.repeat(length, places)


def _count_up(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return 0 .. counts[0] - 1, 0 .. counts[1] - 1 and so on, one after the other."""
    starts = np.cumsum(counts) - counts
    return np.arange(int(counts.sum())) - np.repeat(starts, counts)


class _Groups:
    """Windows of one history in groups, by the room that is left in each.

    A history is a chain of nodes (node before, length, times): `times` pieces of `length` were put
    into each of its windows. Groups that are divided share the chain up to there.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._nodes: list[tuple[int, int, int]] = []
        self._rooms: list[int] = []  # sorted, those that have groups
        self._groups: dict[int, list[tuple[int, int]]] = {}  # room -> (node, windows)

    def add(self, length: int, count: int) -> None:
        """Put `count` pieces of `length` where they fit best; no longer piece may follow."""
        while count:
            room, node, windows = self._take(length, count)
            times = room // length
            full, rest = divmod(count, times)
            full = min(full, windows)
            count -= full * times
            self._put(room, node=node, length=length, times=times, windows=full)
            windows -= full
            if windows and count:  # then count is below times, and one window takes all
                self._put(room, node=node, length=length, times=rest, windows=1)
                windows, count = windows - 1, 0
            self._return(room, node, windows)

    def records(self) -> NDArray[np.int64]:
        """Return (length, times, first window, number of windows), `[R, 4]` int64."""
        found: list[tuple[int, int, int, int]] = []
        first = 0
        for room in sorted(self._groups):
            for node, windows in self._groups[room]:
                while node >= 0:
                    node, length, times = self._nodes[node]
                    found.append((length, times, first, windows))
                first += windows
        return np.array(found, dtype=np.int64).reshape(-1, 4)

    def _take(self, length: int, count: int) -> tuple[int, int, int]:
        """Return room, node and windows of a group in which `length` fits best."""
        number = bisect_left(self._rooms, length)
        if number == len(self._rooms):
            return self._capacity, -1, -(-count // (self._capacity // length))
        room = self._rooms[number]
        node, windows = self._groups[room].pop()
        if not self._groups[room]:
            del self._groups[room], self._rooms[number]
        return room, node, windows

    def _put(self, room: int, *, node: int, length: int, times: int, windows: int) -> None:
        """Put `times` pieces into each of some windows of a group."""
        if windows:
            self._nodes.append((node, length, times))
            self._return(room - length * times, len(self._nodes) - 1, windows)

    def _return(self, room: int, node: int, windows: int) -> None:
        """Keep a group under its room."""
        if windows:
            if room not in self._groups:
                self._groups[room] = []
                insort(self._rooms, room)
            self._groups[room].append((node, windows))
