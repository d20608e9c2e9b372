"""Is every byte of a dataset what its manifest says, and where not; is every file there at least?

`verify` reads all files of all shards where they are, never from the block cache, and goes on after
a damaged one. Each part of a file is waited for with the dataset's patience. Of a file that is
damaged `damaged_windows` says where, as far as training would notice.
"""

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TypeVar

from data.indexed.dataset import Dataset
from data.indexed.dataset_manifest import Manifest
from data.indexed.format import DataError
from data.indexed.location import Location, with_ending
from data.indexed.patience import Patience, read_each
from data.indexed.remote import open_plain
from data.indexed.storage import FileKind, StoredFile
from data.indexed.window_reader import WindowReader

_CHUNK_BYTES = 2**24
_THREADS = 8
_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True, slots=True)
class DamagedFile:
    """A file that is not what the manifest says.

    Attributes:
        shard: path of the shard as in the manifest, without a suffix.
        path: the file, or its URL.
        expected: size and SHA-256 that the manifest gives.
        found: what is there.
    """

    shard: str
    path: Location
    expected: str
    found: str


def _silent(read: int, total: int, path: Location) -> None:
    """Show no progress."""


def verify(
    dataset: Dataset, *, progress: Callable[[int, int, Location], None] = _silent
) -> tuple[DamagedFile, ...]:
    """Return every file of a dataset that is not what its manifest says; reads all bytes.

    Args:
        dataset: its manifest is read again as well.
        progress: is called with bytes read, bytes of all files, and the file being read.

    Raises:
        DataError: if the manifest itself is missing, damaged or another one than was opened.
    """
    dataset.check_unchanged()
    manifest = dataset.manifest
    total, done = int(manifest.sizes.sum()), 0
    found: list[DamagedFile] = []
    for shard in range(manifest.num_shards):
        for kind, (path, size) in enumerate(_files(manifest, shard)):
            tell = partial(_tell, progress, done, total, path)
            actual = _describe(path, dataset.patience, tell)
            expected = f"{size} bytes, SHA-256 {manifest.sha256[shard, kind].tobytes().hex()}"
            if actual != expected:
                name = manifest.name(shard)
                found.append(DamagedFile(shard=name, path=path, expected=expected, found=actual))
            done += size
    return tuple(found)


def damaged_windows(dataset: Dataset, damaged: DamagedFile, *, most: int = 3) -> tuple[str, ...]:
    """Return what reading the windows of a damaged shard says, one message a window.

    Args:
        dataset: of the shard.
        damaged: one of its files.
        most: at most so many messages, of the first damaged windows.

    Returns:
        Messages that name file, window and bytes; or why the shard cannot be opened. None if no
        window is damaged: .idx, and what fills no window, are not read in training.
    """
    manifest = dataset.manifest
    names = (manifest.name(shard) for shard in range(manifest.num_shards))
    shard = next(number for number, name in enumerate(names) if name == damaged.shard)

    def opener(prefix: Location, kind: FileKind) -> StoredFile:
        return open_plain(with_ending(prefix if kind == "win" else manifest.pair(shard), kind))

    def said() -> Iterator[str]:
        try:
            reader = WindowReader(manifest.prefix(shard), opener=opener)
        except DataError as error:
            yield str(error)
            return
        with reader:
            for window in range(reader.header.num_windows):
                try:
                    reader.read(window)
                except DataError as error:
                    yield str(error)

    return tuple(islice(said(), most))


def check_files(dataset: Dataset) -> None:
    """Check that every file of a dataset is there with its size; reads no file.

    Raises:
        DataError: names the first that is missing or has another size, with both sizes.
    """
    places = [
        (path, size)
        for shard in range(dataset.manifest.num_shards)
        for path, size in _files(dataset.manifest, shard)
    ]
    with ThreadPoolExecutor(_THREADS) as threads:  # a parallel file system answers many at once
        for fault in threads.map(partial(_size_fault, dataset.patience), places):
            if fault:
                raise DataError(f"{fault}; {dataset.manifest.path} is of other files")


def _files(manifest: Manifest, shard: int) -> list[tuple[Location, int]]:
    """Return the three files of a shard and their sizes in bytes."""
    prefixes = {"bin": manifest.pair, "idx": manifest.pair, "win": manifest.prefix}
    return [
        (with_ending(prefix(shard), ending), int(manifest.sizes[shard, kind]))
        for kind, (ending, prefix) in enumerate(prefixes.items())
    ]


def _size_fault(patience: Patience, place: tuple[Location, int]) -> str:
    path, expected = place
    try:
        found = _patiently(path, patience, lambda stored: stored.size())
    except DataError as error:
        return f"{path}: {error.__cause__ or error}, {expected} bytes expected"
    return "" if found == expected else f"{path}: {found} bytes, {expected} expected"


def _tell(
    progress: Callable[[int, int, Location], None],
    before: int,
    total: int,
    path: Location,
    read: int,
) -> None:
    """Report bytes of a file as bytes of all files."""
    progress(before + read, total, path)


def _describe(path: Location, patience: Patience, progress: Callable[[int], None]) -> str:
    """Return size and SHA-256 of a file in words, telling how many bytes were read."""
    digest, done = hashlib.sha256(), 0
    try:
        size = _patiently(path, patience, lambda stored: stored.size())
        while done < size:
            wanted = min(_CHUNK_BYTES, size - done)  # a server refuses a range behind the end
            read = partial(_part, num_bytes=wanted, offset=done)
            chunk = _patiently(path, patience, read)
            digest.update(chunk)
            done += len(chunk)
            progress(done)
            if len(chunk) < wanted:
                break
    except DataError as error:
        return str(error.__cause__ or error)
    return f"{done} bytes, SHA-256 {digest.hexdigest()}"


def _part(stored: StoredFile, *, num_bytes: int, offset: int) -> bytes:
    return stored.pread(num_bytes, offset)


def _patiently(path: Location, patience: Patience, read: Callable[[StoredFile], _T]) -> _T:
    """Return what `read` makes of the open file; one of the tries opens, reads and closes it."""

    def fetch(_: int) -> _T:
        try:
            stored = open_plain(path)
            try:
                return read(stored)
            finally:
                stored.close()
        except OSError as error:
            raise DataError(error.strerror or str(error)) from error

    return read_each(
        fetch,
        1,
        place=path,
        patience=patience,
        describe=lambda _: f"bytes of {path}",
        reopen=lambda _: None,
    )[0]
