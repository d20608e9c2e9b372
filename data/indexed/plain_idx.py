"""Where do the documents of an .idx end, in memory that does not grow with the file?

`IndexedReader` keeps the start of every document; here they pass by, some 2**18 at a time, and what
`IndexedReader` checks is checked on the way: lengths, offsets against their running sum, bounds of
documents. A document may have several sequences, or none, and a sequence may have no token.
"""

import os
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.indexed.format import (
    HEADER_BYTES,
    LENGTH_DTYPE,
    OFFSET_DTYPE,
    DataError,
    IndexHeader,
)

CHUNK = 2**18
"""Sequences or documents in memory at once: 2 MiB a column."""


def read_index_header(path: Path) -> IndexHeader:
    """Return the header of an .idx whose size is what its header says.

    Raises:
        DataError: if it is missing, truncated, too long or of another format.
    """
    with open_to_read(path) as stream:
        header = IndexHeader.unpack(stream.read(HEADER_BYTES), path=path)
        actual_bytes = os.fstat(stream.fileno()).st_size
    if actual_bytes != header.index_bytes:
        raise DataError(
            f"{path}: {actual_bytes} bytes, its header says {header.index_bytes} "
            f"({header.num_sequences} sequences, {header.num_bounds} document bounds); "
            f"truncated, or written with multimodal sequence modes, which are not read here"
        )
    return header


def open_to_read(path: Path) -> BufferedReader:
    """Return a file of a pair, open.

    Raises:
        DataError: if it is not there or may not be read.
    """
    try:
        return path.open("rb")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error


def document_ends(
    path: Path, header: IndexHeader, *, chunk: int = CHUNK
) -> Iterator[NDArray[np.int64]]:
    """Yield where each document ends in the flat stream of tokens, in order.

    Args:
        path: the .idx.
        header: from `read_index_header`.
        chunk: documents of an array, the last excepted.

    Yields:
        `[<= chunk]` int64; a document begins where the one before it ends, the first at 0.

    Raises:
        DataError: if a length is negative, an offset is not the sum of the lengths before it, or
            the bounds of documents do not rise from 0 to the number of sequences.
    """
    bounds_at = HEADER_BYTES + 12 * header.num_sequences
    sequence = position = 0
    with open_to_read(path) as stream:
        _check_bounds(_column(stream, OFFSET_DTYPE, at=bounds_at, count=1), 0, 0, path=path)
        for first in range(1, header.num_bounds, chunk):
            count = min(chunk, header.num_bounds - first)
            bounds = _column(stream, OFFSET_DTYPE, at=bounds_at + 8 * first, count=count)
            _check_bounds(bounds, sequence, header.num_sequences, path=path)
            ends = np.full(count, position)
            while sequence < bounds[-1]:
                stop = min(sequence + chunk, int(bounds[-1]))
                running = _running_sum(stream, header, sequence, stop, position)
                low, high = np.searchsorted(bounds, (sequence, stop), side="right").tolist()
                ends[low:high] = running[bounds[low:high] - sequence]
                ends[high:] = running[-1]
                sequence, position = stop, int(running[-1])
            yield ends
    if sequence != header.num_sequences:
        raise DataError(
            f"{path}: the last document ends with sequence {sequence} of {header.num_sequences}; "
            f"every sequence must belong to a document"
        )


def locate(path: Path, header: IndexHeader, position: int) -> tuple[int, int]:
    """Return the document that holds a position of the flat stream, and the position inside it.

    Goes through the file: for a message, not for a loop.

    Raises:
        IndexError: if the position is outside the stream.
        DataError: as `document_ends`.
    """
    document = begin = 0
    for ends in document_ends(path, header):
        if position < ends[-1]:
            place = int(np.searchsorted(ends, position, side="right"))
            return document + place, position - (int(ends[place - 1]) if place else begin)
        document, begin = document + len(ends), int(ends[-1])
    raise IndexError(f"{path}: position {position} of {begin}")


def _column(
    stream: BufferedReader, dtype: np.dtype[np.signedinteger], *, at: int, count: int
) -> NDArray[np.signedinteger]:
    """Return `[count]` numbers that begin at a byte of the file."""
    stream.seek(at)
    raw = stream.read(count * dtype.itemsize)
    if len(raw) < count * dtype.itemsize:
        raise DataError(f"{stream.name}: ends at byte {at + len(raw)}: truncated while it was read")
    return np.frombuffer(raw, dtype)


def _check_bounds(
    bounds: NDArray[np.signedinteger], lowest: int, highest: int, *, path: Path
) -> None:
    """Refuse bounds of documents that do not rise within limits."""
    if not lowest <= bounds[0] or not bounds[-1] <= highest or (np.diff(bounds) < 0).any():
        raise DataError(
            f"{path}: document bounds {bounds.min()} .. {bounds.max()} found where they must rise "
            f"from {lowest} to at most {highest}, the numbers of sequences"
        )


def _running_sum(
    stream: BufferedReader, header: IndexHeader, first: int, stop: int, position: int
) -> NDArray[np.int64]:
    """Return where sequences `first .. stop` begin, in tokens, and where the last of them ends."""
    path, count = stream.name, stop - first
    lengths = _column(stream, LENGTH_DTYPE, at=HEADER_BYTES + 4 * first, count=count)
    offsets_at = HEADER_BYTES + 4 * header.num_sequences + 8 * first
    offsets = _column(stream, OFFSET_DTYPE, at=offsets_at, count=count)
    if (lengths < 0).any():
        number = int((lengths < 0).argmax())
        raise DataError(
            f"{path}: sequence {first + number} has length {lengths[number]}, allowed: >= 0"
        )
    running = np.full(count + 1, position)
    running[1:] += np.cumsum(lengths, dtype=np.int64)
    wrong = offsets != running[:-1] * header.dtype.itemsize
    if wrong.any():
        number = int(wrong.argmax())
        raise DataError(
            f"{path}: sequence {first + number} starts at byte {offsets[number]}, the lengths "
            f"before it add up to {running[number] * header.dtype.itemsize}"
        )
    return running
