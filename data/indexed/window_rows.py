"""What does .win say of a window: by a map, or by reads?

`MappedRows` looks into a map of the whole file, `ReadRows` reads the six places where the columns
of a window stand. They return the same; the second is the definition, and the only one that can be
waited for with a limit.

P pieces of a window.
"""

import mmap
import struct
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from data.indexed.format import DataError
from data.indexed.storage import StoredFile
from data.indexed.window_format import COUNT_DTYPE, HEADER_BYTES, PIECE_DTYPE, WindowHeader

_BOUNDS = struct.Struct("<QQ")


class WindowRow(NamedTuple):
    """What the columns hold for a window, copied; nothing is checked but bounds.

    Attributes:
        bounds: its first piece and that of the next window.
        ids_digest: digest of its ids.
        row_digest: digest of its row.
        piece_lengths: `[P]` u32.
        document_ids: `[P]` u64.
        piece_offsets: `[P]` u32.
    """

    bounds: tuple[int, int]
    ids_digest: int
    row_digest: int
    piece_lengths: NDArray[np.uint32]
    document_ids: NDArray[np.uint64]
    piece_offsets: NDArray[np.uint32]


class Rows(Protocol):
    """The rows of a shard."""

    def read(self, window: int) -> WindowRow:
        """Return the row of a window, 0 <= window < num_windows.

        Raises:
            DataError: if the file has shrunk, or the row's pieces lie outside the columns.
            OSError: if the file cannot be read.
        """
        ...

    def drop(self, window: int) -> bool:
        """Forget copies of a row, and return whether reading again reads another source.

        Raises:
            OSError: if the file cannot be read.
        """
        ...


class ReadRows:
    """Rows by reads; the file stays the caller's."""

    def __init__(self, header: WindowHeader, stored: StoredFile) -> None:
        """Hold the open file of a shard with this header."""
        self._header, self._stored = header, stored
        self._starts = _column_starts(header)

    def read(self, window: int) -> WindowRow:
        """Return the row of a window."""
        firsts, ids, rows, documents, offsets, lengths = self._starts
        first, last = _BOUNDS.unpack(self._bytes(16, firsts + 8 * window))
        if not first < last <= self._header.num_pieces:
            raise _outside(self._stored.name, window, (first, last), self._header)
        count = last - first
        return WindowRow(
            bounds=(first, last),
            ids_digest=int.from_bytes(self._bytes(8, ids + 8 * window), "little"),
            row_digest=int.from_bytes(self._bytes(8, rows + 8 * window), "little"),
            piece_lengths=np.frombuffer(self._bytes(4 * count, lengths + 4 * first), PIECE_DTYPE),
            document_ids=np.frombuffer(self._bytes(8 * count, documents + 8 * first), COUNT_DTYPE),
            piece_offsets=np.frombuffer(self._bytes(4 * count, offsets + 4 * first), PIECE_DTYPE),
        )

    def drop(self, window: int) -> bool:
        """Forget copies of a row and of the pieces that it claims to have."""
        firsts, ids, rows, documents, offsets, lengths = self._starts
        places = [(16, firsts + 8 * window), (8, ids + 8 * window), (8, rows + 8 * window)]
        first, last = _BOUNDS.unpack(self._bytes(*places[0]))
        if first < last <= self._header.num_pieces:
            count = last - first
            places += [
                (8 * count, documents + 8 * first),
                (4 * count, offsets + 4 * first),
                (4 * count, lengths + 4 * first),
            ]
        return any([self._stored.drop(*place) for place in places])

    def _bytes(self, num_bytes: int, offset: int) -> bytes:
        """Return bytes, all that were asked for."""
        raw = self._stored.pread(num_bytes, offset)
        if len(raw) != num_bytes:
            raise _shrunk(self._stored.name, offset + len(raw), self._header)
        return raw


class MappedRows:
    """Rows by a map, which goes with the last array that looks into it."""

    def __init__(self, header: WindowHeader, mapped: mmap.mmap, *, name: str) -> None:
        """Look into the map of a shard's .win with this header."""
        self._header, self._map, self._name = header, mapped, name
        self._win_bytes, self._num_pieces = header.win_bytes, header.num_pieces
        firsts, ids, rows, documents, offsets, lengths = _column_starts(header)
        windows, pieces = header.num_windows, header.num_pieces
        self._first = np.frombuffer(mapped, COUNT_DTYPE, count=windows + 1, offset=firsts)
        self._ids_digests = np.frombuffer(mapped, COUNT_DTYPE, count=windows, offset=ids)
        self._row_digests = np.frombuffer(mapped, COUNT_DTYPE, count=windows, offset=rows)
        self._documents = np.frombuffer(mapped, COUNT_DTYPE, count=pieces, offset=documents)
        self._offsets = np.frombuffer(mapped, PIECE_DTYPE, count=pieces, offset=offsets)
        self._lengths = np.frombuffer(mapped, PIECE_DTYPE, count=pieces, offset=lengths)

    def read(self, window: int) -> WindowRow:
        """Return the row of a window; a map of a truncated file ends in SIGBUS, so ask first."""
        if (size := self._map.size()) < self._win_bytes:
            raise _shrunk(self._name, size, self._header)
        first, last = int(self._first[window]), int(self._first[window + 1])
        if not first < last <= self._num_pieces:
            raise _outside(self._name, window, (first, last), self._header)
        # copies: what was checked is what the caller gets, and nothing of it looks into the map
        return WindowRow(
            (first, last),
            int(self._ids_digests[window]),
            int(self._row_digests[window]),
            self._lengths[first:last].copy(),
            self._documents[first:last].copy(),
            self._offsets[first:last].copy(),
        )

    def drop(self, window: int) -> bool:
        """Return False: a map is of the file itself."""
        return False


def _column_starts(header: WindowHeader) -> tuple[int, int, int, int, int, int]:
    """Return where first pieces, digests of ids and rows, documents, offsets, lengths begin."""
    windows, pieces = 8 * header.num_windows, 8 * header.num_pieces
    digests = HEADER_BYTES + windows + 8
    documents = digests + 2 * windows
    offsets = documents + pieces
    return HEADER_BYTES, digests, digests + windows, documents, offsets, offsets + pieces // 2


def _outside(name: str, window: int, bounds: tuple[int, int], header: WindowHeader) -> DataError:
    return DataError(
        f"{name}: window {window} has pieces {bounds[0]} .. {bounds[1]}; expected: at least one, "
        f"at most up to {header.num_pieces}"
    )


def _shrunk(name: str, size: int, header: WindowHeader) -> DataError:
    return DataError(
        f"{name}: {size} bytes, {header.win_bytes} expected: truncated since it was opened"
    )
