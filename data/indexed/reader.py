"""What tokens does a .bin/.idx pair hold, and is the pair whole?

Everything that can be checked without reading the ids is checked when the pair is opened: magic,
version, dtype, the size of `.idx`, lengths and offsets against each other, document bounds, and the
size of `.bin` to the byte. Afterwards a read is one `pread`: no seek, no lock, no memory map (a map
of a file that is truncated later ends in SIGBUS, a `pread` in a message). 8 bytes a document stay
in memory: where each starts.
"""

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.indexed.closing import Closing
from data.indexed.format import (
    HEADER_BYTES,
    LENGTH_DTYPE,
    OFFSET_DTYPE,
    DataError,
    IndexHeader,
    bin_path,
    idx_path,
)


class IndexedReader(Closing):
    """Random access to the documents of one pair, and to their ids as one flat stream.

    Safe to use from several threads, and after a fork. Close it, or use it as a context manager.

    Attributes:
        prefix: path without `.bin`/`.idx`.
        dtype: dtype of the stored ids.
        num_documents: documents in the pair.
        num_tokens: ids in the pair.
    """

    def __init__(self, prefix: Path | str) -> None:
        """Open the pair and check it.

        Args:
            prefix: path without `.bin`/`.idx`.

        Raises:
            DataError: if a file is missing, truncated, too long, of another format, or contradicts
                the other; the message names the file, what was expected and what was found.
        """
        self.prefix = Path(prefix)
        header, self._starts = _read_index(idx_path(prefix))
        self.dtype = header.dtype
        self.num_documents = len(self._starts) - 1
        self.num_tokens = int(self._starts[-1])
        self._descriptor = _open_bin(
            bin_path(prefix), expected_bytes=self.num_tokens * header.dtype.itemsize
        )

    def __del__(self) -> None:
        """Close the file if nobody did."""
        if getattr(self, "_descriptor", -1) >= 0:
            self.close()

    def close(self) -> None:
        """Close the file; closing twice is allowed, reading afterwards is not."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    @property
    def document_starts(self) -> NDArray[np.int64]:
        """Where each document begins in the flat stream, `[documents + 1]`; last: num_tokens."""
        return self._starts

    def tokens(self, start: int, count: int) -> NDArray[np.integer]:
        """Return ids `start .. start + count` of the flat stream of all documents.

        Args:
            start: position of the first id; 0 <= start.
            count: number of ids; start + count <= num_tokens.

        Returns:
            `[count]` in the stored dtype.

        Raises:
            IndexError: if the range leaves the stream.
            DataError: if the reader is closed or the file has shrunk since it was opened.
        """
        if start < 0 or count < 0 or start + count > self.num_tokens:
            raise IndexError(
                f"{self.prefix}: tokens {start} .. {start + count} of a stream of {self.num_tokens}"
            )
        if self._descriptor < 0:
            raise DataError(f"{bin_path(self.prefix)}: read after close")
        wanted = count * self.dtype.itemsize
        offset = start * self.dtype.itemsize
        raw = os.pread(self._descriptor, wanted, offset)
        while len(raw) < wanted:  # Linux returns at most 2 GiB a call
            more = os.pread(self._descriptor, wanted - len(raw), offset + len(raw))
            if not more:
                raise DataError(
                    f"{bin_path(self.prefix)}: {offset + len(raw)} bytes, "
                    f"at least {offset + wanted} expected: truncated since it was opened"
                )
            raw += more
        return np.frombuffer(raw, dtype=self.dtype)

    def document(self, number: int) -> NDArray[np.integer]:
        """Return the ids of one document, `[T]` in the stored dtype.

        Args:
            number: 0 <= number < num_documents.

        Raises:
            IndexError: if there is no such document.
            DataError: as `tokens`.
        """
        if not 0 <= number < self.num_documents:
            raise IndexError(f"{self.prefix}: document {number} of {self.num_documents}")
        start, end = int(self._starts[number]), int(self._starts[number + 1])
        return self.tokens(start, end - start)

    def locate(self, position: int) -> tuple[int, int]:
        """Return the document that holds a position of the flat stream, and the position inside it.

        Args:
            position: 0 <= position < num_tokens.

        Raises:
            IndexError: if the position is outside the stream.
        """
        if not 0 <= position < self.num_tokens:
            raise IndexError(f"{self.prefix}: position {position} of {self.num_tokens}")
        number = int(np.searchsorted(self._starts, position, side="right")) - 1
        return number, position - int(self._starts[number])


def _open_bin(path: Path, *, expected_bytes: int) -> int:
    """Return a descriptor of .bin after checking its size."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    actual_bytes = os.fstat(descriptor).st_size
    if actual_bytes != expected_bytes:
        os.close(descriptor)
        raise DataError(
            f"{path}: {actual_bytes} bytes, its index says {expected_bytes}; "
            f"the file is damaged or belongs to another index, write the pair again"
        )
    return descriptor


def _read_index(path: Path) -> tuple[IndexHeader, NDArray[np.int64]]:
    """Return the header and where each document starts, in tokens; the last entry is the total."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    header = IndexHeader.unpack(raw, path=path)
    if len(raw) != header.index_bytes:
        raise DataError(
            f"{path}: {len(raw)} bytes, its header says {header.index_bytes} "
            f"({header.num_sequences} sequences, {header.num_bounds} document bounds); "
            f"truncated, or written with multimodal sequence modes, which are not read here"
        )
    num_sequences = header.num_sequences
    lengths = np.frombuffer(raw, LENGTH_DTYPE, count=num_sequences, offset=HEADER_BYTES)
    offsets = np.frombuffer(
        raw, OFFSET_DTYPE, count=num_sequences, offset=HEADER_BYTES + 4 * num_sequences
    )
    bounds = np.frombuffer(raw, OFFSET_DTYPE, offset=HEADER_BYTES + 12 * num_sequences)
    ends = np.zeros(num_sequences + 1, dtype=np.int64)
    np.cumsum(lengths, dtype=np.int64, out=ends[1:])
    _check_arrays(lengths, offsets, ends * header.dtype.itemsize, path=path)
    if bounds[0] != 0 or bounds[-1] != num_sequences or (np.diff(bounds) < 0).any():
        raise DataError(
            f"{path}: document bounds run from {bounds[0]} to {bounds[-1]}; "
            f"they must rise from 0 to the number of sequences, {num_sequences}"
        )
    return header, ends[bounds]


def _check_arrays(
    lengths: NDArray[np.int32], offsets: NDArray[np.int64], ends: NDArray[np.int64], *, path: Path
) -> None:
    """Refuse negative lengths, and offsets that are not the running sum of the lengths."""
    if (lengths < 0).any():
        number = int((lengths < 0).argmax())
        raise DataError(f"{path}: sequence {number} has length {lengths[number]}, allowed: >= 0")
    wrong = offsets != ends[:-1]
    if wrong.any():
        number = int(wrong.argmax())
        raise DataError(
            f"{path}: sequence {number} starts at byte {offsets[number]}, "
            f"the lengths before it add up to {ends[number]}"
        )
