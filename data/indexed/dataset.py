"""Which shard holds window i of a bucket, and is everything that the manifest names still there?

A loader opens the manifest and nothing else when it starts. A shard is opened when one of its
windows is first read, and compared with the manifest then: the digest in its sidecar's header,
which depends on every byte of the shard, and the sizes of its files. How long a read may take and
how often it is tried is a matter of `patience.py`; bytes behind a URL stay in `block_cache.py`.

Window i of a bucket is window i of its shards one after the other, in the order of the manifest.
B buckets, C windows asked for, N shards, S inputs of a window.
"""

import hashlib
import logging
import math
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import pairwise
from threading import Lock

import numpy as np
from numpy.typing import ArrayLike, NDArray

from data.indexed.block_cache import BlockCacheConfig
from data.indexed.closing import Closing
from data.indexed.dataset_manifest import DatasetHeader, Manifest, Source, read_manifest
from data.indexed.format import DataError
from data.indexed.location import Location, Url, as_location
from data.indexed.patience import Patience, read_each
from data.indexed.shard_files import shard_opener
from data.indexed.storage import Opener
from data.indexed.window_format import HEADER_BYTES, StoredWindow
from data.indexed.window_reader import WindowReader, check_rows

log = logging.getLogger(__name__)

MAX_OPEN_SHARDS = 256
"""Two descriptors each: half of the 1,024 that a process may have by default."""


class Dataset(Closing):
    """Random access to the windows of every bucket.

    Safe to use from several threads. Close it, or use it as a context manager.

    Attributes:
        manifest: all that is known without opening a shard.
        patience: how long files are waited for.
        num_windows: `[B]` int64, windows of each bucket.
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        max_open_shards: int = MAX_OPEN_SHARDS,
        check_digests: bool,
        patience: Patience,
        cache: BlockCacheConfig,
    ) -> None:
        """Hold the manifest; nothing is opened.

        Args:
            manifest: from `read_manifest`.
            max_open_shards: shards that stay open, at least 1; those behind a URL hold no
                descriptor and all stay.
            check_digests: of each window that is read.
            patience: how long files are waited for.
            cache: where bytes behind a URL stay; not used for a local manifest.

        Raises:
            ValueError: if `max_open_shards` is below 1, or the cache's folder cannot be made.
        """
        if max_open_shards < 1:
            raise ValueError(f"max_open_shards={max_open_shards}; allowed: at least 1")
        if isinstance(manifest.path, Url):
            max_open_shards = max(max_open_shards, manifest.num_shards)
        self.manifest = manifest
        self.patience = patience
        self._check_digests = check_digests
        self._max_open_shards = max_open_shards
        self._opener = shard_opener(manifest, patience=patience, cache=cache)
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

    def bucket_digests(self) -> tuple[str, ...]:
        """Return the digest of each bucket, hexadecimal: of all its windows, in their order."""
        digests = self.manifest.sha256[:, 3]
        bounds = np.searchsorted(self.manifest.bucket, np.arange(len(self.num_windows) + 1))
        return tuple(
            hashlib.sha256(digests[start:end].tobytes()).hexdigest()
            for start, end in pairwise(bounds.tolist())
        )

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
        found = _read_manifest(self.manifest.path, self.patience).digest
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
        shards, numbers = self.locate(bucket, window)
        shard, number = int(shards[0]), int(numbers[0])
        return self._each([shard], [number], lambda _: self.shard(shard).read(number))[0]

    def read_into(
        self, buckets: ArrayLike, windows: ArrayLike, tokens_CS: NDArray[np.int32]
    ) -> list[StoredWindow]:
        """Read windows into the rows of an array that the caller owns, and return them.

        Where reads have a limit, a call costs one thread: ask for many windows at once.

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
        check_rows(tokens_CS, num_windows=len(shards), window_tokens=tokens_CS.shape[-1] - 1)
        of, at, rows = shards.tolist(), numbers.tolist(), list(tokens_CS)
        if math.isinf(self.patience.limit_s(self.manifest.path)):
            return self._each(of, at, lambda c: self.shard(of[c]).read_row(at[c], rows[c]))
        # A thread that was given up may still come back: it must not know the caller's array.
        found = self._each(of, at, lambda c: self.shard(of[c]).read(at[c]))
        return [_moved(window, row) for window, row in zip(found, rows, strict=True)]

    def _each(
        self, shards: Sequence[int], numbers: Sequence[int], fetch: Callable[[int], StoredWindow]
    ) -> list[StoredWindow]:
        """Return what `fetch` reads for each window of a shard, with patience."""
        return read_each(
            fetch,
            len(shards),
            place=self.manifest.path,
            patience=self.patience,
            describe=lambda c: self._describe(shards[c], numbers[c]),
            reopen=lambda c: self._forget(shards[c]),
        )

    def _describe(self, shard: int, number: int) -> str:
        """Return which window this is, from the manifest alone."""
        manifest = self.manifest
        bucket = self.header.buckets[int(manifest.bucket[shard])]
        ids = max(1, int(manifest.windows[shard])) * (bucket.window_tokens + 1)
        # a plain pair has up to one window more of ids behind its windows: less than twice as many
        itemsize = 1 << (int(manifest.sizes[shard, 0]) // ids).bit_length() >> 1
        size = itemsize * (bucket.window_tokens + 1)
        return (
            f"window {number} of shard {manifest.prefix(shard)} (bytes {number * size} .. "
            f"{(number + 1) * size} of .bin), bucket {bucket.name}"
        )

    def _forget(self, shard: int) -> None:
        """Have the next read open a shard anew; who reads from it now goes on."""
        with self._lock:
            self._open.pop(shard, None)

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
        """Return a newly opened shard; if a cached header may be why not, open it once more."""
        try:
            return self._compared(shard)
        except DataError as error:
            prefix = self.manifest.prefix(shard)
            if not isinstance(prefix, Url) or isinstance(error.__cause__, OSError):
                raise
            log.warning("%s; its header is dropped from the cache and fetched once more", error)
            self._opener(shard)(prefix, "win").drop(HEADER_BYTES, 0)
            return self._compared(shard)

    def _compared(self, shard: int) -> WindowReader:
        """Return a newly opened shard, compared with the manifest."""
        prefix, opener = self.manifest.prefix(shard), self._opener(shard)
        reader = WindowReader(prefix, check_digests=self._check_digests, opener=opener)
        expected = self.manifest.sha256[shard, 3].tobytes()
        if reader.header_sha256 != expected:
            raise DataError(
                f"{prefix}.win: names the shard {reader.header_sha256.hex()}, "
                f"{self.manifest.path} expects {expected.hex()}; the shard was written again, or "
                f"the manifest is of another version"
            )
        pair, wanted = self.manifest.pair(shard), int(self.manifest.sizes[shard, 1])
        if (size := _idx_size(opener, pair)) != wanted:
            raise DataError(
                f"{pair}.idx: {size} bytes, {self.manifest.path} expects {wanted} bytes"
            )
        return reader


def open_dataset(
    path: Location | str,
    *,
    max_open_shards: int = MAX_OPEN_SHARDS,
    check_digests: bool = True,
    patience: Patience | None = None,
    cache: BlockCacheConfig | None = None,
) -> Dataset:
    """Return the dataset of a manifest; no shard is opened.

    Args:
        path: the manifest, a path or a URL that fsspec opens, e.g. `s3://bucket/a/train.manifest`.
        max_open_shards: as `Dataset`.
        check_digests: as `Dataset`.
        patience: as `Dataset`; None is `Patience()`.
        cache: as `Dataset`; None is `BlockCacheConfig()`.

    Raises:
        DataError: if the manifest is missing, truncated, damaged or of another format, or was not
            answered for in time.
        ValueError: as `Dataset`, and if nothing is installed that reads such a URL.
    """
    patience = patience or Patience()
    return Dataset(
        _read_manifest(as_location(path), patience),
        max_open_shards=max_open_shards,
        check_digests=check_digests,
        patience=patience,
        cache=cache or BlockCacheConfig(),
    )


def _read_manifest(path: Location, patience: Patience) -> Manifest:
    """Return a manifest, waited for with patience."""
    return read_each(
        lambda _: read_manifest(path),
        1,
        place=path,
        patience=patience,
        describe=lambda _: f"the manifest {path}",
        reopen=lambda _: None,
    )[0]


def _moved(window: StoredWindow, tokens_S: NDArray[np.int32]) -> StoredWindow:
    """Return a window whose tokens are in a row that the caller owns."""
    if len(tokens_S) != len(window.tokens):
        check_rows(tokens_S[None], num_windows=1, window_tokens=len(window.tokens) - 1)
    tokens_S[:] = window.tokens
    return StoredWindow(
        tokens=tokens_S,
        piece_lengths=window.piece_lengths,
        document_ids=window.document_ids,
        piece_offsets=window.piece_offsets,
    )


def _idx_size(opener: Opener, prefix: Location) -> int:
    """Return the bytes of a shard's .idx."""
    try:
        stored = opener(prefix, "idx")
        try:
            return stored.size()
        finally:
            stored.close()
    except OSError as error:
        raise DataError(f"{prefix}.idx: {error.strerror or error}") from error
