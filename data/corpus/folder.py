"""How do two preparations of one folder keep out of each other's way?

By a lock that the system drops with the process that holds it, however that ends. Where the file
system knows no locks, this is said in the log, and what remains is that every file appears under
its name all at once.
"""

import errno
import fcntl
import logging
import os
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from data.corpus.manifest import SPLITS, CorpusManifest
from data.indexed.atomic import TEMPORARY_PREFIX
from data.indexed.format import bin_path, idx_path
from data.indexed.window_format import win_path

LOCK_NAME = ".lock"
log = logging.getLogger(__name__)


def exclusive(folder: Path, *, waiting: Callable[[], None]) -> AbstractContextManager[None]:
    """Hold the folder alone; wait, after calling `waiting`, while another process holds it.

    Raises:
        OSError: if the lock file cannot be made.
    """
    return _held(folder, fcntl.LOCK_EX, waiting)


def shared(folder: Path, *, waiting: Callable[[], None]) -> AbstractContextManager[None]:
    """Hold the folder with others that hold it so; wait while a process holds it alone.

    For processes that each make files of their own in it.

    Raises:
        OSError: if the lock file cannot be made.
    """
    return _held(folder, fcntl.LOCK_SH, waiting)


@contextmanager
def _held(folder: Path, operation: int, waiting: Callable[[], None]) -> Generator[None]:
    descriptor = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(descriptor, operation | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(descriptor, operation)
        except OSError as error:
            if error.errno not in {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}:
                raise
            log.warning(
                "%s: no file locks here (%s); start one preparation at a time", folder, error
            )
        yield
    finally:
        os.close(descriptor)


def remove_unfinished(folder: Path) -> None:
    """Remove the unfinished files that killed runs left; the folder must be held alone."""
    for place in (folder, *(folder / split for split in SPLITS)):
        for path in place.glob(f"{TEMPORARY_PREFIX}*"):
            path.unlink(missing_ok=True)


def remove_unlisted(folder: Path, manifest: CorpusManifest) -> None:
    """Remove shards of earlier configurations, which the manifest does not name."""
    for split in SPLITS:
        place = folder / split
        prefixes = [
            place / shard.name for text in manifest.splits[split].values() for shard in text.shards
        ]
        listed = {path(prefix) for prefix in prefixes for path in (bin_path, idx_path, win_path)}
        for pattern in ("*.bin", "*.idx", "*.win"):
            for found in place.glob(pattern):
                if found not in listed:
                    found.unlink()
