"""How are bytes of a file on this machine's file systems had at an offset?

`LocalFile` is a descriptor and `pread`, which lets other threads run while it waits. It can be
mapped, too: the pages are shared by all processes of a machine and cost no call, but a page that
does not come stops every thread of the process, and one that cannot come (EIO, a file that was
truncated) ends it with SIGBUS. So a map is for files that are waited for without a limit anyway.
"""

import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal, Protocol

from data.indexed.format import DataError
from data.indexed.location import Location

FileKind = Literal["bin", "idx", "win"]
"""The files of a shard by their endings."""


class StoredFile(Protocol):
    """Bytes of a file at an offset. Safe to use from several threads."""

    @property
    def name(self) -> str:
        """Path or URL, for messages."""
        ...

    def size(self) -> int:
        """Return the bytes of the file as they are now.

        Raises:
            OSError: if nobody can say.
        """
        ...

    def pread(self, num_bytes: int, offset: int) -> bytes:
        """Return bytes; fewer than asked for only where the file ends.

        Raises:
            OSError: if they cannot be had.
            DataError: if the file is closed.
        """
        ...

    def drop(self, num_bytes: int, offset: int) -> bool:
        """Forget copies of a range, and return whether reading again reads another source."""
        ...

    def map(self) -> mmap.mmap | None:
        """Return the whole file as a map; None where a wait that never ends must not be risked."""
        ...

    def close(self) -> None:
        """Give up what is held; closing twice is allowed."""
        ...


Opener = Callable[[Location, FileKind], StoredFile]
"""Opens one of the files of the shard with a prefix; raises OSError."""


class LocalFile:
    """A file that is read through a descriptor; closed with its last user at the latest.

    Attributes:
        name: its path.
    """

    def __init__(self, path: Path, *, may_map: bool) -> None:
        """Open the file.

        Args:
            path: the file.
            may_map: whether `map` maps it.

        Raises:
            OSError: if it is missing or may not be read.
        """
        self.name = str(path)
        self._may_map = may_map
        self._descriptor = -1
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        """Close the file if nobody did."""
        self.close()

    def size(self) -> int:
        """Return the bytes of the file as they are now."""
        return os.fstat(self._descriptor).st_size

    def pread(self, num_bytes: int, offset: int) -> bytes:
        """Return bytes; fewer than asked for only where the file ends."""
        if (descriptor := self._descriptor) < 0:
            raise DataError(f"{self.name}: read after close")
        raw = os.pread(descriptor, num_bytes, offset)
        while len(raw) < num_bytes:  # a signal or a network file system may return less
            more = os.pread(descriptor, num_bytes - len(raw), offset + len(raw))
            if not more:
                break
            raw += more
        return raw

    def drop(self, num_bytes: int, offset: int) -> bool:
        """Return False: the page cache is not ours to empty."""
        return False

    def close(self) -> None:
        """Close the descriptor; closing twice is allowed, reading afterwards is not."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def map(self) -> mmap.mmap | None:
        """Return the whole file as a map, which outlives the descriptor; None if it may not be."""
        if not self._may_map:
            return None
        mapped = mmap.mmap(self._descriptor, 0, prot=mmap.PROT_READ)
        # windows are read in random order: without this each first touch reads 128 KiB around it
        mapped.madvise(mmap.MADV_RANDOM)
        return mapped
