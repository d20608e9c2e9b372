"""How does a file come into being all at once?

A file is written under a name of its own in the folder it will stand in, flushed to disk, and then
renamed. A reader sees the old file, or the new one, or none, never a part. Names of unfinished
files begin with `.tmp-`, so that what a killed run left can be told apart and removed.
"""

import os
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

TEMPORARY_PREFIX = ".tmp-"


@contextmanager
def temporary_file(folder: Path) -> Generator[tuple[BinaryIO, Path]]:
    """Yield an open binary file of an unfinished name in `folder`; gone in the end unless renamed.

    Args:
        folder: where the finished file will stand; it must exist.

    Raises:
        OSError: if the folder cannot be written to.
    """
    descriptor, name = tempfile.mkstemp(prefix=TEMPORARY_PREFIX, dir=folder)
    path = Path(name)
    os.fchmod(descriptor, 0o666 & ~_umask())
    try:
        with os.fdopen(descriptor, "wb") as stream:
            yield stream, path
    finally:
        path.unlink(missing_ok=True)


def flush_to_disk(stream: BinaryIO) -> None:
    """Write what the stream has buffered and wait until the disk has it."""
    stream.flush()
    os.fsync(stream.fileno())


def publish(temporary: Path, final: Path) -> None:
    """Give a finished file its name, and wait until the folder's entry is on disk."""
    os.replace(temporary, final)
    sync_folder(final.parent)


def sync_folder(folder: Path) -> None:
    """Wait until the entries of `folder` are on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, content: bytes) -> None:
    """Make `path` hold `content`, all at once.

    Raises:
        OSError: if the folder cannot be written to.
    """
    with temporary_file(path.parent) as (stream, temporary):
        stream.write(content)
        flush_to_disk(stream)
        publish(temporary, path)


def _umask() -> int:
    """Return the process's umask.

    It can only be read by setting it: what another thread creates meanwhile is its owner's alone,
    rather than everybody's.
    """
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
