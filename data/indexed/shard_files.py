"""Where do the files of a dataset's shards come from?

Beside a local manifest they are opened where they are, and mapped if nobody limits how long they
are waited for. Beside a manifest behind a URL every read goes through blocks on a local disk, named
by the digest that the manifest gives for the shard.
"""

import errno
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

from data.indexed.block_cache import BlockCache, BlockCacheConfig
from data.indexed.dataset_manifest import Manifest
from data.indexed.location import Location, Url, with_ending
from data.indexed.patience import Patience
from data.indexed.remote import RemoteFile, open_plain
from data.indexed.storage import FileKind, LocalFile, Opener, StoredFile

_KINDS: tuple[FileKind, ...] = ("bin", "idx", "win")
"""In the order of the manifest's columns."""


class CachedFile:
    """A file behind a URL, read in blocks that stay on a local disk.

    Attributes:
        name: its URL.
    """

    def __init__(self, source: StoredFile, *, blocks: BlockCache, key: str, num_bytes: int) -> None:
        """Hold the source; nothing is asked of it before the first read.

        Args:
            source: the whole file.
            blocks: what was fetched before.
            key: names the content of the file: the digest of its shard, and its kind.
            num_bytes: of the file, as the manifest says.
        """
        self.name = source.name
        self._source, self._blocks, self._num_bytes = source, blocks, num_bytes
        self._block_bytes = blocks.config.block_bytes
        self._key = f"{key}.{self._block_bytes}"

    def size(self) -> int:
        """Return what the server says."""
        return self._source.size()

    def pread(self, num_bytes: int, offset: int) -> bytes:
        """Return bytes; fewer than asked for only where the file ends."""
        end = min(offset + num_bytes, self._num_bytes)
        parts: list[bytes] = []
        while offset < end:
            number, start = divmod(offset, self._block_bytes)
            stop = min(start + end - offset, self._block_bytes)
            parts.append(self._part(number, slice(start, stop)))
            offset += stop - start
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def drop(self, num_bytes: int, offset: int) -> bool:
        """Forget the blocks of a range, and return True."""
        last = (offset + max(1, num_bytes) - 1) // self._block_bytes
        for number in range(offset // self._block_bytes, last + 1):
            self._blocks.drop(f"{self._key}.{number}")
        return True

    def map(self) -> None:
        """Return None: blocks may go at any time."""

    def close(self) -> None:
        """Give up the source."""
        self._source.close()

    def _part(self, number: int, part: slice) -> bytes:
        """Return a part of a block."""
        start = number * self._block_bytes
        size = min(self._block_bytes, self._num_bytes - start)
        name = f"{self._key}.{number}"
        return self._blocks.read(
            name, part, num_bytes=size, fetch=partial(self._fetch, size, start)
        )

    def _fetch(self, num_bytes: int, offset: int) -> bytes:
        """Return a whole block of the source."""
        raw = self._source.pread(num_bytes, offset)
        if len(raw) != num_bytes:
            found = f"{len(raw)} of {num_bytes} bytes at byte {offset}: truncated, or the answer is"
            raise OSError(errno.EIO, found, self.name)
        return raw


def shard_opener(
    manifest: Manifest, *, patience: Patience, cache: BlockCacheConfig
) -> Callable[[int], Opener]:
    """Return what gives for each shard what opens its files.

    Args:
        manifest: of the dataset.
        patience: whether local files may be mapped.
        cache: for a manifest behind a URL; else no folder is made.

    Raises:
        ValueError: as `BlockCache`.
    """
    if isinstance(manifest.path, Url):
        blocks = BlockCache(cache, limit_s=patience.remote_limit_s)
        return lambda shard: partial(_open_cached, manifest, blocks, shard)
    local = open_mapped if math.isinf(patience.local_limit_s) else open_unmapped
    return lambda shard: partial(_open_placed, manifest, local, shard)


def _open_placed(
    manifest: Manifest, opener: Opener, shard: int, prefix: Location, kind: FileKind
) -> StoredFile:
    """Return a file of a shard; .bin and .idx of a plain pair stand elsewhere than .win."""
    return opener(prefix if kind == "win" else manifest.pair(shard), kind)


def open_mapped(prefix: Location, kind: FileKind) -> StoredFile:
    """Return a file of a shard where it is; on a file system it may be mapped.

    Raises:
        OSError: if it is missing or may not be read.
    """
    place = with_ending(prefix, kind)
    return LocalFile(place, may_map=True) if isinstance(place, Path) else RemoteFile(place)


def open_unmapped(prefix: Location, kind: FileKind) -> StoredFile:
    """Return a file of a shard where it is, never mapped.

    Raises:
        OSError: if it is missing or may not be read.
    """
    return open_plain(with_ending(prefix, kind))


def _open_cached(
    manifest: Manifest, blocks: BlockCache, shard: int, prefix: Location, kind: FileKind
) -> StoredFile:
    """Return a file of a shard behind a URL, read through the block cache."""
    prefix = prefix if kind == "win" else manifest.pair(shard)
    digest = manifest.sha256[shard, 3].tobytes().hex()
    return CachedFile(
        open_plain(with_ending(prefix, kind)),
        blocks=blocks,
        key=f"{digest}.{kind}",
        num_bytes=int(manifest.sizes[shard, _KINDS.index(kind)]),
    )
