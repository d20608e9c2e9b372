"""How much may come out of a packed file?

A gzip file of one megabyte can hold a gigabyte of zeros, one of zstd far more: whoever sends such a
file stops the machine that unpacks it. Text packs to a third or a tenth, logs of equal lines to a
fiftieth. So a file may hold 200 times its own size, small
files at least 64 MiB, and a line 256 MiB.
"""

import gzip
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

from data.indexed.format import DataError

MAX_RATIO = 200
"""Bytes that come out of each byte of a packed file; our choice, four times that of equal lines."""
LEAST_LIMIT_BYTES = 64 * 2**20
"""A packed file may always hold so many."""
MAX_LINE_BYTES = 256 * 2**20
"""Of a document; a line is in memory as a whole."""


class LimitedReader(io.RawIOBase):
    """Bytes of an unpacked stream, until there are more than its file could hold."""

    def __init__(self, stream: BinaryIO, path: Path) -> None:
        """Take an unpacked stream over.

        Args:
            stream: gives the unpacked bytes.
            path: the packed file.
        """
        self._stream, self._path, self._num_bytes = stream, path, 0
        self._limit = max(MAX_RATIO * path.stat().st_size, LEAST_LIMIT_BYTES)

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: "memoryview[int]") -> int:  # type: ignore[override]  wider there
        """Fill `buffer`, as any raw stream.

        Raises:
            DataError: if more has come out of the file than is allowed.
        """
        found = self._stream.read(len(buffer))
        buffer[: len(found)] = found
        self._num_bytes += len(found)
        if self._num_bytes > self._limit:
            raise DataError(
                f"{self._path}: {os.stat(self._path).st_size} bytes unpack to more than"
                f" {self._limit}; allowed: {MAX_RATIO} times the size of the file. If it is meant,"
                " unpack it first"
            )
        return len(found)

    def close(self) -> None:
        """Close the stream, too."""
        self._stream.close()
        super().close()


def lines(stream: BinaryIO, *, path: Path) -> Iterator[bytes]:
    """Yield the lines of a stream, line ends included.

    Raises:
        DataError: if a line is longer than a document may be.
    """
    while line := stream.readline(MAX_LINE_BYTES + 1):
        if len(line) > MAX_LINE_BYTES:
            raise DataError(f"{path}: a longer line than {MAX_LINE_BYTES} bytes, which are allowed")
        yield line


def read_gzip(path: Path) -> bytes:
    """Return what a small gzip file holds.

    Raises:
        OSError, EOFError, zlib.error: if it is none, or damaged.
        DataError: if more comes out of it than is allowed.
    """
    packed = cast(BinaryIO, gzip.GzipFile(path, "rb"))
    with io.BufferedReader(LimitedReader(packed, path)) as stream:
        return stream.read()
