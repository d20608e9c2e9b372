"""How are bytes of a file behind a URL had at an offset?

Through fsspec, which knows `s3://`, `gs://`, `hf://`, `memory://` and many more, each by a package
of its own. It is an optional dependency: this file alone imports it, when the first URL is opened.

A backend raises the errors of its own libraries; here they become OSError, ENOENT where the file is
not there and EIO otherwise, so that whoever reads need not know the backend.
"""

import errno
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

from data.indexed.location import Location, Url
from data.indexed.storage import LocalFile, StoredFile

_T = TypeVar("_T")
_CHUNK_BYTES = 2**24


class _FileSystem(Protocol):
    """What of fsspec's AbstractFileSystem is used here."""

    def cat_file(self, path: str, start: int | None = None, end: int | None = None) -> bytes: ...

    def size(self, path: str) -> int | None: ...


class RemoteFile:
    """A file that fsspec reads; nothing is asked of the server before the first read.

    Attributes:
        name: its URL.
    """

    def __init__(self, url: Url) -> None:
        """Find who is asked for files of the URL.

        Raises:
            ValueError: if fsspec or its package for this kind of URL is not installed.
        """
        self.name = str(url)
        self._system, self._path = _file_system(url)

    def size(self) -> int:
        """Return the bytes of the file as they are now."""
        found = _asked(self.name, lambda: self._system.size(self._path))
        if found is None:
            raise OSError(errno.EIO, "the server does not say how long the file is", self.name)
        return found

    def pread(self, num_bytes: int, offset: int) -> bytes:
        """Return bytes; fewer than asked for only where the file ends."""
        end = offset + num_bytes
        raw = _asked(self.name, lambda: self._system.cat_file(self._path, offset, end))
        if len(raw) > num_bytes:
            found = f"{len(raw)} bytes came for {num_bytes}; it does not answer range requests"
            raise OSError(errno.EIO, found, self.name)
        return raw

    def drop(self, num_bytes: int, offset: int) -> bool:
        """Return False: there is no copy."""
        return False

    def map(self) -> None:
        """Return None: the file is elsewhere."""

    def close(self) -> None:
        """Do nothing: connections are fsspec's, which shares them between files."""


def open_plain(place: Location) -> StoredFile:
    """Return a file that is read where it is, without a cache and without a limit.

    Raises:
        OSError: if it is missing or may not be read; behind a URL only when it is read.
        ValueError: as `RemoteFile`.
    """
    return LocalFile(place, may_map=False) if isinstance(place, Path) else RemoteFile(place)


def read_all(place: Location) -> bytes:
    """Return all bytes of a file.

    Raises:
        OSError: if they cannot be had.
        ValueError: as `RemoteFile`.
    """
    stored = open_plain(place)
    try:
        return b"".join(chunks(stored))
    finally:
        stored.close()


def chunks(stored: StoredFile) -> Iterator[bytes]:
    """Yield all bytes of a file in order.

    Raises:
        OSError: if they cannot be had, or fewer than its size.
    """
    size = stored.size()  # a server refuses a range behind the end
    for offset in range(0, size, _CHUNK_BYTES):
        wanted = min(_CHUNK_BYTES, size - offset)
        chunk = stored.pread(wanted, offset)
        if len(chunk) != wanted:
            raise OSError(errno.EIO, f"{offset + len(chunk)} bytes of {size}", stored.name)
        yield chunk


def _file_system(url: Url) -> tuple[_FileSystem, str]:
    """Return fsspec's file system of a URL and the path in it."""
    try:
        # optional: local datasets never come here; pyright: it ships no types
        import fsspec.core as fsspec_core  # pyright: ignore[reportMissingTypeStubs]
    except ImportError as error:
        raise ValueError(f"{url}: a URL needs fsspec: pip install -e '.[remote]'") from error
    core: Any = fsspec_core  # no types of its own
    try:
        system, path = core.url_to_fs(str(url))
    except ImportError as error:
        raise ValueError(f"{url}: {error}") from error
    return cast(_FileSystem, system), cast(str, path)


def _asked(name: str, ask: Callable[[], _T]) -> _T:
    """Return what a backend answers; its errors become OSError with a number and a reason."""
    try:
        return ask()
    except FileNotFoundError as error:
        raise FileNotFoundError(errno.ENOENT, "No such file on the server", name) from error
    except Exception as error:  # backends raise what their own libraries do
        reason = f"{type(error).__name__}: {error}"
        raise OSError(getattr(error, "errno", None) or errno.EIO, reason, name) from error
