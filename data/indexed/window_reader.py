"""What does one window of a shard hold, and is it what was written?

Opening reads the 200 bytes of the header and compares sizes; a shard of 4 GiB opens as fast as an
empty one. A window is one `pread` of `.bin` and one row of `.win`, which is mapped: a map shares
the pages that all ranks of a machine read. A map of a file that was truncated ends in SIGBUS, so
each read asks for the size first. Both digests of a window are checked whenever it is read, before
anything of it is returned.

C windows asked for, S inputs of a window, P pieces.
"""

import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.indexed.closing import Closing
from data.indexed.format import DataError, bin_path
from data.indexed.window_format import (
    COUNT_DTYPE,
    HEADER_BYTES,
    PIECE_DTYPE,
    StoredWindow,
    WindowHeader,
    ids_digest,
    row_digest,
    win_path,
)


class WindowReader(Closing):
    """Random access to the windows of one shard.

    Safe to use from several threads. Close it, or use it as a context manager.

    Attributes:
        prefix: path without a suffix.
        header: what the header of .win says.
        header_sha256: names the content of the shard, 32 bytes.
    """

    def __init__(
        self, prefix: Path | str, *, check_digests: bool = True, pair: Path | str | None = None
    ) -> None:
        """Open the shard and check header and sizes.

        Args:
            prefix: path without a suffix.
            pair: path of .bin without its suffix; None: it stands beside .win.
            check_digests: compare both digests of each window that is read; without it a damaged
                window is found only if it breaks a bound.

        Raises:
            DataError: if a file is missing, truncated, too long or of another format; the message
                names the file, what was expected and what was found.
        """
        self.prefix = Path(prefix)
        self._bin_path, self._win_path = bin_path(pair or prefix), win_path(prefix)
        self._check_digests = check_digests
        self._descriptor = -1
        self.header, self.header_sha256, self._map = _map_sidecar(self._win_path)
        num_windows, num_pieces = self.header.num_windows, self.header.num_pieces
        offset = HEADER_BYTES
        self._first = np.frombuffer(self._map, COUNT_DTYPE, count=num_windows + 1, offset=offset)
        offset += 8 * (num_windows + 1)
        self._ids_digests = np.frombuffer(self._map, COUNT_DTYPE, count=num_windows, offset=offset)
        offset += 8 * num_windows
        self._row_digests = np.frombuffer(self._map, COUNT_DTYPE, count=num_windows, offset=offset)
        offset += 8 * num_windows
        self._documents = np.frombuffer(self._map, COUNT_DTYPE, count=num_pieces, offset=offset)
        offset += 8 * num_pieces
        self._offsets = np.frombuffer(self._map, PIECE_DTYPE, count=num_pieces, offset=offset)
        offset += 4 * num_pieces
        self._lengths = np.frombuffer(self._map, PIECE_DTYPE, count=num_pieces, offset=offset)
        # ids of the stored dtype are compared as unsigned: a negative one is then a large one
        self._unsigned = np.dtype(f"<u{self.header.dtype.itemsize}")
        self._descriptor = _open(self._bin_path)
        actual_bytes = os.fstat(self._descriptor).st_size
        if actual_bytes != self.header.bin_bytes:
            self.close()
            raise DataError(
                f"{self._bin_path}: {actual_bytes} bytes, {self._win_path.name} says "
                f"{self.header.bin_bytes}; the file is damaged or belongs to another shard"
            )

    def __del__(self) -> None:
        """Close the file if nobody did."""
        if getattr(self, "_descriptor", -1) >= 0:
            self.close()

    def close(self) -> None:
        """Close .bin; closing twice is allowed, reading afterwards is not.

        The map of .win goes with the last array that looks into it.
        """
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def read(self, window: int) -> StoredWindow:
        """Return one window.

        Args:
            window: 0 <= window < header.num_windows.

        Raises:
            IndexError: if there is no such window.
            DataError: if the reader is closed, a file has shrunk, a digest is another one than
                recorded, the row breaks a bound, or an id lies outside the vocabulary; the message
                names file and window.
        """
        tokens = np.empty(self.header.window_tokens + 1, dtype=np.int32)
        return self._read(window, tokens)

    def read_into(self, windows: Sequence[int], tokens_CS: NDArray[np.int32]) -> list[StoredWindow]:
        """Read windows into the rows of an array that the caller owns, and return them.

        The array is filled, not made here, so that it can be memory from which a device copies.

        Args:
            windows: C numbers, each 0 <= window < header.num_windows.
            tokens_CS: `[C, S+1]` int32; row c becomes window c, and the `tokens` of the result
                look into it. After an error its content is undefined.

        Raises:
            ValueError: if the array has another shape or dtype.
            IndexError: as `read`.
            DataError: as `read`.
        """
        check_rows(tokens_CS, num_windows=len(windows), window_tokens=self.header.window_tokens)
        return [self._read(window, row) for window, row in zip(windows, tokens_CS, strict=True)]

    def _read(self, window: int, tokens: NDArray[np.int32]) -> StoredWindow:
        """Fill `tokens` and return the window."""
        if not 0 <= window < self.header.num_windows:
            raise IndexError(f"{self.prefix}: window {window} of {self.header.num_windows}")
        row, digest = self._row(window)
        raw = self._ids(window)
        if self._check_digests and (found := ids_digest(raw)) != digest:
            raise DataError(
                f"{self._bin_path}: window {window} (bytes {window * len(raw)} .. "
                f"{(window + 1) * len(raw)}) has the digest {found:016x}, {self._win_path.name} "
                f"says {digest:016x}; the window is damaged"
            )
        stored = np.frombuffer(raw, dtype=self.header.dtype)
        if stored.view(self._unsigned).max() >= self.header.vocab_size:
            outside = stored.view(self._unsigned) >= self.header.vocab_size
            position = int(outside.argmax())
            raise DataError(
                f"{self._bin_path}: window {window}, position {position}: id {stored[position]}; "
                f"vocab_size={self.header.vocab_size} allows 0 .. {self.header.vocab_size - 1}"
            )
        tokens[:] = stored
        lengths, documents, offsets = row
        return StoredWindow(
            tokens=tokens, piece_lengths=lengths, document_ids=documents, piece_offsets=offsets
        )

    def _row(
        self, window: int
    ) -> tuple[tuple[NDArray[np.uint32], NDArray[np.uint64], NDArray[np.uint32]], int]:
        """Return lengths, documents and offsets of a window's pieces, and its ids' digest."""
        if self._map.size() < self.header.win_bytes:
            raise DataError(
                f"{self._win_path}: {self._map.size()} bytes, {self.header.win_bytes} expected: "
                f"truncated since it was opened"
            )
        first, last = int(self._first[window]), int(self._first[window + 1])
        if not first < last <= self.header.num_pieces:
            raise DataError(
                f"{self._win_path}: window {window} has pieces {first} .. {last}; expected: at "
                f"least one, at most up to {self.header.num_pieces}"
            )
        # copies: what was checked is what the caller gets, and nothing of it looks into the map
        lengths, offsets = self._lengths[first:last].copy(), self._offsets[first:last].copy()
        documents = self._documents[first:last].copy()
        digest = int(self._ids_digests[window])
        if self._check_digests:
            found = row_digest(
                (first, last),
                ids=digest,
                piece_lengths=lengths,
                piece_offsets=offsets,
                document_ids=documents,
            )
            if found != (expected := int(self._row_digests[window])):
                raise DataError(
                    f"{self._win_path}: the row of window {window} has the digest {found:016x}, "
                    f"{expected:016x} is recorded; the file is damaged"
                )
        elif (total := int(lengths.sum())) > self.header.window_tokens + 1:
            raise DataError(
                f"{self._win_path}: pieces of {total} tokens in window {window}; expected: at most "
                f"{self.header.window_tokens + 1}"
            )
        return (lengths, documents, offsets), digest

    def _ids(self, window: int) -> bytes:
        """Return the bytes of a window in .bin."""
        if self._descriptor < 0:
            raise DataError(f"{self._bin_path}: read after close")
        wanted = self.header.window_bytes
        offset = window * wanted
        raw = os.pread(self._descriptor, wanted, offset)
        while len(raw) < wanted:  # a signal or a network file system may return less
            more = os.pread(self._descriptor, wanted - len(raw), offset + len(raw))
            if not more:
                raise DataError(
                    f"{self._bin_path}: ends at byte {offset + len(raw)} in window {window}, which "
                    f"takes bytes {offset} .. {offset + wanted}: truncated since it was opened"
                )
            raw += more
        return raw


def check_rows(tokens_CS: NDArray[np.int32], *, num_windows: int, window_tokens: int) -> None:
    """Check that an array can hold windows.

    Raises:
        ValueError: if it is not `[num_windows, S+1]` int32.
    """
    wanted = (num_windows, window_tokens + 1)
    if tokens_CS.shape != wanted or tokens_CS.dtype != np.int32:
        raise ValueError(
            f"an array of shape {tokens_CS.shape}, dtype {tokens_CS.dtype} given for windows; "
            f"wanted: {wanted}, int32"
        )


def _open(path: Path) -> int:
    """Return a descriptor for reading."""
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error


def _map_sidecar(path: Path) -> tuple[WindowHeader, bytes, mmap.mmap]:
    """Return the header of .win, its SHA-256, and the whole file as a map."""
    descriptor = _open(path)
    try:
        raw = os.pread(descriptor, HEADER_BYTES, 0)
        header = WindowHeader.unpack(raw, path=path)
        actual_bytes = os.fstat(descriptor).st_size
        if actual_bytes != header.win_bytes:
            raise DataError(
                f"{path}: {actual_bytes} bytes, its header says {header.win_bytes} "
                f"({header.num_windows} windows, {header.num_pieces} pieces); truncated or damaged"
            )
        sidecar = mmap.mmap(descriptor, 0, prot=mmap.PROT_READ)
        # windows are read in random order: without this each first touch reads 128 KiB around it
        sidecar.madvise(mmap.MADV_RANDOM)
        return header, raw[-32:], sidecar
    finally:
        os.close(descriptor)
