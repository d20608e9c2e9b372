"""Which shard holds window i of a bucket, and is everything that the manifest names still there?

A loader opens the manifest and nothing else when it starts. A shard is opened when one of its
windows is first read, and compared with the manifest then: the digest in its sidecar's header,
which depends on every byte of the shard, and the sizes of its files. At most `max_open_shards` stay
open. `verify` reads everything.

Window i of a bucket is window i of its shards one after the other, in the order of the manifest.
B buckets, C windows asked for, N shards, S inputs of a window.
"""

import hashlib
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Lock

import numpy as np
from numpy.typing import ArrayLike, NDArray

from data.indexed.closing import Closing
from data.indexed.dataset_manifest import DatasetHeader, Manifest, Source, read_manifest
from data.indexed.format import DataError, bin_path, idx_path
from data.indexed.window_format import StoredWindow, win_path
from data.indexed.window_reader import WindowReader, check_rows

MAX_OPEN_SHARDS = 256
"""Two descriptors each: half of the 1,024 that a process may have by default."""
_CHUNK_BYTES = 2**24


@dataclass(frozen=True, kw_only=True, slots=True)
class DamagedFile:
    """A file that is not what the manifest says.

    Attributes:
        shard: path of the shard as in the manifest, without a suffix.
        path: the file.
        expected: size and SHA-256 that the manifest gives.
        found: what is there.
    """

    shard: str
    path: Path
    expected: str
    found: str


class Dataset(Closing):
    """Random access to the windows of every bucket.

    Safe to use from several threads. Close it, or use it as a context manager.

    Attributes:
        manifest: all that is known without opening a shard.
        num_windows: `[B]` int64, windows of each bucket.
    """

    def __init__(
        self, manifest: Manifest, *, max_open_shards: int = MAX_OPEN_SHARDS, check_digests: bool
    ) -> None:
        """Hold the manifest; nothing is opened.

        Args:
            manifest: from `read_manifest`.
            max_open_shards: shards that stay open, at least 1.
            check_digests: of each window that is read.

        Raises:
            ValueError: if `max_open_shards` is below 1.
        """
        if max_open_shards < 1:
            raise ValueError(f"max_open_shards={max_open_shards}; allowed: at least 1")
        self.manifest = manifest
        self._check_digests = check_digests
        self._max_open_shards = max_open_shards
        self._open: OrderedDict[int, WindowReader] = OrderedDict()
        self._lock = Lock()
        # windows before each shard, all buckets one after the other; the last entry is their number
        self._before = np.zeros(manifest.num_shards + 1, dtype=np.int64)
        np.cumsum(manifest.windows, out=self._before[1:])
        num_buckets = len(manifest.header.buckets)
        bounds = np.searchsorted(manifest.bucket, np.arange(num_buckets + 1))
        self._bucket_base = self._before[bounds[:-1]]
        self.num_windows = np.diff(self._before[bounds])

    def close(self) -> None:
        """Close every shard; a later read opens what it needs."""
        with self._lock:
            readers = list(self._open.values())
            self._open.clear()
        for reader in readers:
            reader.close()

    @property
    def header(self) -> DatasetHeader:
        """What the manifest says of the dataset as a whole."""
        return self.manifest.header

    @property
    def digest(self) -> bytes:
        """Digest of the dataset, 32 bytes: of the manifest, and through it of every file."""
        return self.manifest.digest

    def require_tokenizer(self, sha256: str) -> None:
        """Check that the ids are those of a tokenizer.

        Args:
            sha256: SHA-256 of its tokenizer.json, hexadecimal.

        Raises:
            DataError: if they are another's.
        """
        if sha256 != self.header.tokenizer_sha256:
            raise DataError(
                f"{self.manifest.path}: ids of the tokenizer with SHA-256 "
                f"{self.header.tokenizer_sha256}, expected that with {sha256}; a model trained on "
                f"ids of another tokenizer learns noise"
            )

    def require_digest(self, digest: bytes) -> None:
        """Check that this is the dataset with which a run began.

        Raises:
            DataError: if it is another one.
        """
        if digest != self.digest:
            raise DataError(
                f"{self.manifest.path}: the dataset has the digest {self.digest.hex()}, expected "
                f"{digest.hex()}; the manifest was written again since the run began"
            )

    def check_unchanged(self) -> None:
        """Read the manifest again and compare it; for a job that runs for weeks.

        Raises:
            DataError: if the file is gone, damaged or another one.
        """
        found = read_manifest(self.manifest.path).digest
        if found != self.digest:
            raise DataError(
                f"{self.manifest.path}: has the digest {found.hex()}, {self.digest.hex()} when it "
                f"was opened; the manifest was changed under a running job"
            )

    def source_of(self, document_id: int) -> tuple[Source, int]:
        """Return the source of a document and the document's number in it.

        Raises:
            DataError: if the manifest names no source with such a document.
        """
        sources = self.header.sources
        place = bisect_right(sources, document_id, key=lambda source: source.first_document_id) - 1
        number = document_id - sources[place].first_document_id if place >= 0 else -1
        if place < 0 or number >= sources[place].num_documents:
            raise DataError(f"{self.manifest.path}: no source has a document {document_id}")
        return sources[place], number

    def locate(
        self, buckets: ArrayLike, windows: ArrayLike
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the shards of windows of buckets, and their numbers there.

        Args:
            buckets: `[C]` integers, 0 <= bucket < B, or one for all.
            windows: `[C]` integers, 0 <= window < num_windows[bucket].

        Returns:
            Shard and window in the shard, each `[C]` int64.

        Raises:
            IndexError: if there is no such bucket or window.
        """
        window = np.array(windows, dtype=np.int64, ndmin=1)
        bucket = np.broadcast_to(np.asarray(buckets, dtype=np.int64), window.shape)
        if bucket.size and not 0 <= bucket.min() <= bucket.max() < len(self.num_windows):
            raise IndexError(
                f"{self.manifest.path}: buckets {bucket.min()} .. {bucket.max()} of "
                f"{len(self.num_windows)}"
            )
        outside = (window < 0) | (window >= self.num_windows[bucket])
        if outside.any():
            first = int(outside.argmax())
            raise IndexError(
                f"{self.manifest.path}: window {window[first]} of bucket {bucket[first]}, which "
                f"has {self.num_windows[bucket[first]]}"
            )
        position = self._bucket_base[bucket] + window
        # of several shards that begin here all but the last are empty
        shard = np.searchsorted(self._before, position, side="right") - 1
        return shard, position - self._before[shard]

    def read(self, bucket: int, window: int) -> StoredWindow:
        """Return one window of a bucket.

        Raises:
            IndexError: if there is no such bucket or window.
            DataError: as `shard` and `WindowReader.read`.
        """
        shard, number = self.locate(bucket, window)
        return self.shard(int(shard[0])).read(int(number[0]))

    def read_into(
        self, buckets: ArrayLike, windows: ArrayLike, tokens_CS: NDArray[np.int32]
    ) -> list[StoredWindow]:
        """Read windows into the rows of an array that the caller owns, and return them.

        Args:
            buckets: `[C]` integers, all of one window length S.
            windows: `[C]` integers.
            tokens_CS: `[C, S+1]` int32, as `WindowReader.read_into`.

        Raises:
            ValueError: if the array has another shape or dtype.
            IndexError: as `locate`.
            DataError: as `read`.
        """
        shards, numbers = self.locate(buckets, windows)
        found: list[StoredWindow] = []
        check_rows(tokens_CS, num_windows=len(shards), window_tokens=tokens_CS.shape[-1] - 1)
        for row, (shard, number) in enumerate(zip(shards.tolist(), numbers.tolist(), strict=True)):
            found += self.shard(shard).read_into([number], tokens_CS[row : row + 1])
        return found

    def shard(self, shard: int) -> WindowReader:
        """Return a shard, opened and compared with the manifest if it is not open.

        Raises:
            DataError: if a file is missing, has another size, or is not of the shard that the
                manifest names.
        """
        with self._lock:
            reader = self._open.get(shard)
            if reader is not None:
                self._open.move_to_end(shard)
                return reader
        # not under the lock: a slow file system must not stop the other threads
        reader = self._opened(shard)
        with self._lock:
            self._open[shard] = reader
            if len(self._open) > self._max_open_shards:
                # Not closed here: another thread may be reading; it closes with its last user.
                self._open.popitem(last=False)
        return reader

    def _opened(self, shard: int) -> WindowReader:
        """Return a newly opened shard, compared with the manifest."""
        prefix, pair = self.manifest.prefix(shard), self.manifest.pair(shard)
        reader = WindowReader(prefix, check_digests=self._check_digests, pair=pair)
        expected = self.manifest.sha256[shard, 3].tobytes()
        if reader.header_sha256 != expected:
            raise DataError(
                f"{win_path(prefix)}: names the shard {reader.header_sha256.hex()}, "
                f"{self.manifest.path} expects {expected.hex()}; the shard was written again, or "
                f"the manifest is of another version"
            )
        path, wanted = idx_path(pair), int(self.manifest.sizes[shard, 1])
        if (size := _size(path)) != wanted:
            raise DataError(f"{path}: {_bytes(size)}, {self.manifest.path} expects {wanted} bytes")
        return reader


def open_dataset(
    path: Path | str, *, max_open_shards: int = MAX_OPEN_SHARDS, check_digests: bool = True
) -> Dataset:
    """Return the dataset of a manifest; no shard is opened.

    Args:
        path: the manifest.
        max_open_shards: as `Dataset`.
        check_digests: as `Dataset`.

    Raises:
        DataError: if the manifest is missing, truncated, damaged or of another format.
        ValueError: as `Dataset`.
    """
    return Dataset(
        read_manifest(path), max_open_shards=max_open_shards, check_digests=check_digests
    )


def _silent(read: int, total: int, path: Path) -> None:
    """Show no progress."""


def verify(
    dataset: Dataset, *, progress: Callable[[int, int, Path], None] = _silent
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
        prefix, pair = manifest.prefix(shard), manifest.pair(shard)
        paths = (bin_path(pair), idx_path(pair), win_path(prefix))
        for kind, path in enumerate(paths):
            size = int(manifest.sizes[shard, kind])
            tell = partial(_tell, progress, done, total, path)
            actual = _describe(path, tell)
            expected = f"{size} bytes, SHA-256 {manifest.sha256[shard, kind].tobytes().hex()}"
            if actual != expected:
                name = manifest.name(shard)
                found.append(DamagedFile(shard=name, path=path, expected=expected, found=actual))
            done += size
    return tuple(found)


def _tell(
    progress: Callable[[int, int, Path], None], before: int, total: int, path: Path, read: int
) -> None:
    """Report bytes of a file as bytes of all files."""
    progress(before + read, total, path)


def _describe(path: Path, progress: Callable[[int], None]) -> str:
    """Return size and SHA-256 of a file in words, telling how many bytes were read."""
    digest, size = hashlib.sha256(), 0
    try:
        with path.open("rb") as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                digest.update(chunk)
                size += len(chunk)
                progress(size)
    except OSError as error:
        return f"{error.strerror}"
    return f"{size} bytes, SHA-256 {digest.hexdigest()}"


def _size(path: Path) -> int | None:
    """Return the size of a file in bytes, None if it is not there."""
    try:
        return path.stat().st_size
    except OSError:
        return None


def _bytes(size: int | None) -> str:
    return "not there" if size is None else f"{size} bytes"
