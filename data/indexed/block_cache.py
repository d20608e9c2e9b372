"""How do blocks of remote files stay on a local disk, for all processes of a machine?

A file is cut into blocks of one size; a block is a file of the cache's folder, named by what its
content is (the digest of the shard, which file of it, block size and number), never by where it
came from: a shard that is written again has another digest, and with it other blocks. Blocks appear
by a rename. They are not flushed to disk: what a power failure leaves of one is found by its size
or by a window's digest, and fetched again.

The folder has no owner. Any process may remove any block at any time, which the others see as a
miss. A reader marks a block as used by its modification time. Who writes a block adds its size to a
ledger that all processes share; who brings the ledger above `max_bytes` counts the files anew and
removes the ones unused for longest, down to nine tenths. A ledger that stays locked, because its
holder was stopped, is waited for only shortly: the bytes are entered with the next block. So all
processes together exceed the bound by the blocks in flight, whatever the number of processes.

Source: our choice, docs/decisions/0019-reading-remote-shards.md.
"""

import fcntl
import logging
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from stat import S_IWOTH
from threading import Event, Lock

from data.indexed.atomic import TEMPORARY_PREFIX

log = logging.getLogger(__name__)

_BLOCK = re.compile(r"[0-9a-f]{64}\.(bin|idx|win)\.\d+\.\d+")
_LEDGER = ".bytes"
_LEDGER_BYTES = 8
_LOW_WATER = 0.9
_MIN_BLOCKS = 8
_TOUCH_S = 10
"""A block is marked as used at most this often."""
_LOCK_S = 1.0
"""The ledger is waited for this long; counting 64 GiB of blocks takes a third of it."""
_ABANDONED_S = 3600
"""An unfinished file of this age is of a process that was killed."""


def _default_folder() -> Path:
    """Return a folder of this user where temporary files go, a local disk on most clusters."""
    return Path(tempfile.gettempdir()) / f"window-blocks-{os.getuid()}"


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockCacheConfig:
    """Where blocks of remote files stay.

    Attributes:
        folder: on a local disk; made if it is not there, for this user alone.
        max_bytes: of all blocks of the folder, at least 8 blocks.
        block_bytes: bytes that are fetched at once, >= 1.
    """

    folder: Path = field(default_factory=_default_folder)
    max_bytes: int = 16 * 2**30
    block_bytes: int = 4 * 2**20

    def __post_init__(self) -> None:
        if self.block_bytes < 1 or self.max_bytes < _MIN_BLOCKS * self.block_bytes:
            raise ValueError(
                f"block_bytes={self.block_bytes}, max_bytes={self.max_bytes}; allowed: blocks of "
                f"at least 1 byte, and {_MIN_BLOCKS} of them in max_bytes"
            )


class _Download:
    """A block on its way; threads that want it wait for `done`."""

    def __init__(self) -> None:
        self.since = time.monotonic()
        self.done = Event()
        self.block: bytes | None = None
        self.error: Exception | None = None

    def result(self) -> bytes:
        """Return the block that came, or raise what came instead."""
        if self.block is None:
            assert self.error is not None
            raise self.error
        return self.block


class BlockCache:
    """Blocks by name, from the folder or from whoever has them. Safe to use from several threads.

    Attributes:
        config: folder and sizes.
    """

    def __init__(self, config: BlockCacheConfig, *, limit_s: float) -> None:
        """Make the folder.

        Args:
            config: folder and sizes.
            limit_s: a download of another thread is waited for this long, then it is begun again.

        Raises:
            ValueError: if the folder cannot be made or everybody may write to it.
        """
        self.config = config
        self._limit_s = limit_s
        self._lock = Lock()
        self._downloads: dict[str, _Download] = {}
        self._unentered_bytes = 0
        self._warned = False
        _make_folder(config.folder)

    def read(self, name: str, part: slice, *, num_bytes: int, fetch: Callable[[], bytes]) -> bytes:
        """Return a part of a block.

        Args:
            name: `<digest of the shard, hexadecimal>.<kind>.<block bytes>.<number>`.
            part: of the block, within it.
            num_bytes: of the block.
            fetch: returns the block if the folder does not have it; called by one thread at a time.

        Raises:
            Exception: what `fetch` raised, here or on the thread that fetched it.
        """
        path = self._path(name)
        found = self._stored(path, part, num_bytes)
        while found is None:
            with self._lock:
                download = self._downloads.get(name)
                mine = download is None or download.since + self._limit_s <= time.monotonic()
                if download is None or mine:
                    download = self._downloads[name] = _Download()
            if mine:
                found = self._download(download, path, num_bytes, fetch)[part]
            elif download.done.wait(max(0.0, download.since + self._limit_s - time.monotonic())):
                found = download.result()[part]
        return found

    def drop(self, name: str) -> None:
        """Remove a block if it is there."""
        try:
            self._path(name).unlink(missing_ok=True)
        except OSError as error:
            self._warn(error)

    def _path(self, name: str) -> Path:
        """Return the file of a block; folders of 1/256 of the blocks are quick to list."""
        return self.config.folder / name[:2] / name

    def _stored(self, path: Path, part: slice, num_bytes: int) -> bytes | None:
        """Return a part of a block of the folder, None if it is not there whole."""
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        except OSError as error:
            self._warn(error)
            return None
        try:
            status = os.fstat(descriptor)
            if status.st_size != num_bytes:
                return None
            raw = os.pread(descriptor, part.stop - part.start, part.start)
            if time.time() - status.st_mtime > _TOUCH_S:
                os.utime(descriptor)
        except OSError as error:
            self._warn(error)
            return None
        finally:
            os.close(descriptor)
        return raw if len(raw) == part.stop - part.start else None

    def _download(
        self, download: _Download, path: Path, num_bytes: int, fetch: Callable[[], bytes]
    ) -> bytes:
        """Return a block after fetching and storing it, and tell who waits for it."""
        try:
            # another thread may have stored it since this one looked
            found = self._stored(path, slice(0, num_bytes), num_bytes)
            if found is None:
                found = fetch()
                self._store(path, found)
            download.block = found
            return found
        except Exception as error:
            download.error = error
            raise
        finally:
            with self._lock:
                if self._downloads.get(path.name) is download:
                    del self._downloads[path.name]
            download.done.set()

    def _store(self, path: Path, block: bytes) -> None:
        """Write a block; a folder that cannot hold it is reported once and done without."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(prefix=TEMPORARY_PREFIX, dir=path.parent)
            temporary = Path(name)
            try:
                with os.fdopen(descriptor, "wb") as stream:
                    stream.write(block)
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
            self._enter(len(block))
        except OSError as error:
            self._warn(error)

    def _enter(self, num_bytes: int) -> None:
        """Add bytes to the ledger, and make room if they are too many."""
        with self._lock:
            num_bytes += self._unentered_bytes
            self._unentered_bytes = 0
        descriptor = os.open(self.config.folder / _LEDGER, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            if not _locked(descriptor):
                with self._lock:
                    self._unentered_bytes += num_bytes
                return
            raw = os.pread(descriptor, _LEDGER_BYTES, 0)
            total = int.from_bytes(raw, "little") + num_bytes
            if len(raw) != _LEDGER_BYTES or total > self.config.max_bytes:
                total = self._make_room()
            os.pwrite(descriptor, total.to_bytes(_LEDGER_BYTES, "little"), 0)
        finally:
            os.close(descriptor)  # and with it the lock

    def _make_room(self) -> int:
        """Remove the blocks unused for longest if there are too many, and return what is left."""
        blocks = sorted(self._blocks())
        total = sum(size for _, size, _ in blocks)
        if total > self.config.max_bytes:
            for _, size, path in blocks:
                if total <= _LOW_WATER * self.config.max_bytes:
                    break
                path.unlink(missing_ok=True)
                total -= size
        return total

    def _blocks(self) -> Iterator[tuple[float, int, Path]]:
        """Yield time of last use, size and path of each block; remove what was never finished.

        Whatever else somebody keeps in the folder is neither counted nor removed.
        """
        for folder in self.config.folder.glob("[0-9a-f][0-9a-f]"):
            with os.scandir(folder) as entries:
                for entry in entries:
                    unfinished = entry.name.startswith(TEMPORARY_PREFIX)
                    if not unfinished and not _BLOCK.fullmatch(entry.name):
                        continue
                    try:
                        status = entry.stat(follow_symlinks=False)
                    except FileNotFoundError:
                        continue  # removed by another process
                    if not unfinished:
                        yield status.st_mtime, status.st_size, Path(entry.path)
                    elif time.time() - status.st_mtime > _ABANDONED_S:
                        Path(entry.path).unlink(missing_ok=True)

    def _warn(self, error: OSError) -> None:
        """Say once that blocks do not stay on disk."""
        if not self._warned:
            self._warned = True
            log.warning(
                "block cache %s: %s; blocks that it cannot hold are fetched each time",
                *(self.config.folder, error),
            )


def _locked(descriptor: int) -> bool:
    """Return whether a file could be locked within a short time."""
    until = time.monotonic() + _LOCK_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= until:
                return False
            time.sleep(_LOCK_S / 100)


def _make_folder(folder: Path) -> None:
    """Make a folder for this user alone, and refuse one that everybody may write to."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except OSError as error:
        raise ValueError(f"block cache folder {folder}: {error.strerror}; give another") from error
    if status.st_mode & S_IWOTH:
        raise ValueError(
            f"block cache folder {folder} may be written to by everybody; give another, or "
            f"`chmod o-w` it"
        )
    if status.st_uid not in (os.getuid(), 0):
        # its name is known beforehand, so another user of the machine may have been there first
        raise ValueError(
            f"block cache folder {folder} belongs to user {status.st_uid}; give another"
        )
