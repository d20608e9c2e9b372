"""What does one window of a shard hold, and is it what was written?

Opening reads the 200 bytes of the header and compares sizes; a shard of 4 GiB opens as fast as an
empty one. A window is one read of `.bin` and its row of `.win`. Both digests of a window are
checked whenever it is read, before anything of it is returned, wherever the bytes came from. Where
they may be a copy that was damaged, the copy is dropped and the window read once more before that
is an error.

C windows asked for, S inputs of a window, P pieces.
"""

import logging
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from data.indexed.closing import Closing
from data.indexed.format import DataError
from data.indexed.location import Location, as_location
from data.indexed.shard_files import open_mapped
from data.indexed.storage import FileKind, Opener, StoredFile
from data.indexed.window_format import (
    HEADER_BYTES,
    StoredWindow,
    WindowHeader,
    ids_digest,
    row_digest,
)
from data.indexed.window_rows import MappedRows, ReadRows, Rows, WindowRow

log = logging.getLogger(__name__)


class WindowReader(Closing):
    """Random access to the windows of one shard.

    Safe to use from several threads. Close it, or use it as a context manager.

    Attributes:
        prefix: where it is, without a suffix.
        header: what the header of .win says.
        header_sha256: names the content of the shard, 32 bytes.
    """

    def __init__(
        self,
        prefix: Location | str,
        *,
        check_digests: bool = True,
        opener: Opener = open_mapped,
    ) -> None:
        """Open the shard and check header and sizes.

        Args:
            prefix: where it is, without a suffix.
            check_digests: compare both digests of each window that is read; without it a damaged
                window is found only if it breaks a bound.
            opener: opens its files.

        Raises:
            DataError: if a file is missing, truncated, too long or of another format; the message
                names the file, what was expected and what was found.
        """
        self.prefix = as_location(prefix)
        self._check_digests = check_digests
        self._win = _open(opener, self.prefix, "win")
        self._bin = _open(opener, self.prefix, "bin")
        try:
            self.header, self.header_sha256 = self._read_header()
            self._check_sizes()
            self._rows = self._open_rows()
        except OSError as error:
            self.close()
            raise _unreadable(error, self._win.name) from error
        except DataError:
            self.close()
            raise
        self._window_bytes = self.header.window_bytes
        # ids of the stored dtype are compared as unsigned: a negative one is then a large one
        self._unsigned = np.dtype(f"<u{self.header.dtype.itemsize}")

    def close(self) -> None:
        """Close both files; closing twice is allowed, reading afterwards is not.

        A map of .win goes with the last array that looks into it.
        """
        self._win.close()
        self._bin.close()

    def read(self, window: int) -> StoredWindow:
        """Return one window.

        Args:
            window: 0 <= window < header.num_windows.

        Raises:
            IndexError: if there is no such window.
            DataError: if the reader is closed, a file has shrunk or cannot be read, a digest is
                another one than recorded, the row breaks a bound, or an id lies outside the
                vocabulary; the message names file and window. Its cause is an OSError if the file
                could not be read.
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
        try:
            row = self._row(window)
        except DataError as error:
            self._drop_or_raise(error, lambda: self._rows.drop(window))
            row = self._row(window)
        try:
            tokens[:] = self._ids(window, row.ids_digest)
        except DataError as error:
            size = self._window_bytes
            self._drop_or_raise(error, lambda: self._bin.drop(size, window * size))
            tokens[:] = self._ids(window, row.ids_digest)
        return StoredWindow(
            tokens=tokens,
            piece_lengths=row.piece_lengths,
            document_ids=row.document_ids,
            piece_offsets=row.piece_offsets,
        )

    def _row(self, window: int) -> WindowRow:
        """Return the row of a window, checked."""
        try:
            row = self._rows.read(window)
        except OSError as error:
            raise _unreadable(error, self._win.name) from error
        if self._check_digests:
            found = row_digest(
                row.bounds,
                ids=row.ids_digest,
                piece_lengths=row.piece_lengths,
                piece_offsets=row.piece_offsets,
                document_ids=row.document_ids,
            )
            if found != row.row_digest:
                raise DataError(
                    f"{self._win.name}: the row of window {window} has the digest {found:016x}, "
                    f"{row.row_digest:016x} is recorded; the file is damaged"
                )
        elif (total := int(row.piece_lengths.sum())) > self.header.window_tokens + 1:
            raise DataError(
                f"{self._win.name}: pieces of {total} tokens in window {window}; expected: at most "
                f"{self.header.window_tokens + 1}"
            )
        return row

    def _ids(self, window: int, digest: int) -> NDArray[np.integer]:
        """Return the ids of a window as they are stored, checked."""
        wanted = self._window_bytes
        try:
            raw = self._bin.pread(wanted, window * wanted)
        except OSError as error:
            raise _unreadable(error, self._bin.name) from error
        if len(raw) < wanted:
            raise DataError(
                f"{self._bin.name}: ends at byte {window * wanted + len(raw)} in window {window}, "
                f"which takes bytes {window * wanted} .. {(window + 1) * wanted}: truncated since "
                f"it was opened"
            )
        if self._check_digests and (found := ids_digest(raw)) != digest:
            raise DataError(
                f"{self._bin.name}: window {window} (bytes {window * len(raw)} .. "
                f"{(window + 1) * len(raw)}) has the digest {found:016x}, "
                f"{self.prefix.name}.win says {digest:016x}; the window is damaged"
            )
        stored = np.frombuffer(raw, dtype=self.header.dtype)
        if stored.view(self._unsigned).max() >= self.header.vocab_size:
            outside = stored.view(self._unsigned) >= self.header.vocab_size
            position = int(outside.argmax())
            raise DataError(
                f"{self._bin.name}: window {window}, position {position}: id {stored[position]}; "
                f"vocab_size={self.header.vocab_size} allows 0 .. {self.header.vocab_size - 1}"
            )
        return stored

    def _drop_or_raise(self, damage: DataError, drop: Callable[[], bool]) -> None:
        """Forget copies of what is damaged, or raise the damage if there are none."""
        if isinstance(damage.__cause__, OSError):
            raise damage
        try:
            dropped = drop()
        except OSError as error:
            raise _unreadable(error, self._win.name) from error
        if not dropped:
            raise damage
        log.warning("%s; its blocks are dropped from the cache and fetched once more", damage)

    def _read_header(self) -> tuple[WindowHeader, bytes]:
        """Return the header of .win and its SHA-256."""
        raw = self._win.pread(HEADER_BYTES, 0)
        return WindowHeader.unpack(raw, name=self._win.name), raw[-32:]

    def _open_rows(self) -> Rows:
        """Return the rows of .win, by a map if it may be mapped."""
        mapped = self._win.map()
        if mapped is None:
            return ReadRows(self.header, self._win)
        self._win.close()
        return MappedRows(self.header, mapped, name=self._win.name)

    def _check_sizes(self) -> None:
        """Refuse files that are shorter or longer than the header says."""
        header = self.header
        if (actual := self._win.size()) != header.win_bytes:
            raise DataError(
                f"{self._win.name}: {actual} bytes, its header says {header.win_bytes} "
                f"({header.num_windows} windows, {header.num_pieces} pieces); truncated or damaged"
            )
        if (actual := self._bin.size()) != header.bin_bytes:
            raise DataError(
                f"{self._bin.name}: {actual} bytes, {self.prefix.name}.win says "
                f"{header.bin_bytes}; the file is damaged or belongs to another shard"
            )


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


def _open(opener: Opener, prefix: Location, kind: FileKind) -> StoredFile:
    """Return an open file of a shard."""
    try:
        return opener(prefix, kind)
    except OSError as error:
        raise _unreadable(error, f"{prefix}.{kind}") from error


def _unreadable(error: OSError, name: str) -> DataError:
    """Return the error that says which file could not be read and why."""
    where = name if error.filename is None else str(error.filename)
    return DataError(f"{where}: {error.strerror or error}")
