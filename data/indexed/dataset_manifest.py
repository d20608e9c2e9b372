r"""What are the bytes of the one file that names every shard of a dataset?

Little endian throughout, N shards, ordered by bucket:

    8 bytes  magic `AXK1SET\0`      4 bytes  format version, 1 or 2
    4 bytes  J, bytes of the JSON, a multiple of 8
    J bytes  JSON, filled with spaces: tokenizer, vocabulary, pipeline, packing, buckets, sources
    8 bytes  N                      8 bytes  bytes of all paths
    N x 4 x u64    bucket, windows, tokens without padding, documents
    N x 3 x u64    bytes of .bin, .idx and .win
    N x 4 x 32     SHA-256 of .bin, .idx and .win, and the digest of the shard (`window_format.py`)
    (N+1) x u64    where each path begins among the bytes of all paths; the last entry is their end
    ...            paths, UTF-8, relative to the manifest's folder, without a suffix
    32 bytes       SHA-256 of everything before: the digest of the dataset

Version 2 has 2N + 1 entries of where paths begin and 2N paths: behind those of the shards stand, in
the same order, the paths of the .bin/.idx pairs that do not stand beside their .win, relative to
the manifest's folder or absolute, also without a suffix; empty for those that do.

Columns, because a JSON of 20,000 shards takes longer to parse than a run may take to start; JSON
for what a person wants to see, `head -c 2000` shows it.

Source: docs/decisions/0017-window-store.md; version 2: docs/decisions/0020-plain-pairs.md.
"""

import hashlib
import json
import struct
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from data.indexed.atomic import write_bytes
from data.indexed.format import DataError
from data.indexed.location import Location, as_location
from data.indexed.remote import read_all
from data.indexed.window_format import COUNT_DTYPE
from data.indexed.window_writer import WrittenShard

MAGIC = b"AXK1SET\x00"
VERSION = 1
PAIRS_VERSION = 2
DIGEST_BYTES = 32
_HEAD = struct.Struct("<8sII")
_COUNTS = struct.Struct("<QQ")
_T = TypeVar("_T", bound=Hashable)
_SHARD_BYTES = 8 * 4 + 8 * 3 + DIGEST_BYTES * 4


@dataclass(frozen=True, kw_only=True, slots=True, order=True)
class Bucket:
    """What all windows of a bucket have in common; another window length is another bucket.

    Attributes:
        domain: e.g. `code`.
        language: e.g. `ko`; empty where it has none.
        quality_tier: from 0; a higher tier is better text.
        difficulty_tier: from 0; a higher tier is harder text.
        window_tokens: S, inputs of a window.
    """

    domain: str
    language: str
    quality_tier: int
    difficulty_tier: int
    window_tokens: int

    @property
    def name(self) -> str:
        """All of it in short, as `web/ko/q2/d0/4096`."""
        tiers = f"q{self.quality_tier}/d{self.difficulty_tier}"
        return f"{self.domain}/{self.language or '-'}/{tiers}/{self.window_tokens}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Where documents come from: ids from `first_document_id` on are numbers in this source.

    Attributes:
        name: of the source, e.g. of a crawl.
        first_document_id: id of its first document.
        num_documents: documents of the source, also those that no shard holds.
    """

    name: str
    first_document_id: int
    num_documents: int


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetHeader:
    """What a manifest says of the dataset as a whole.

    Attributes:
        tokenizer_sha256: SHA-256 of tokenizer.json, hexadecimal.
        vocab_size: ids of the tokenizer, special tokens included.
        padding_id: id that fills the remainder of windows.
        pipeline_version: of the programs that made the shards, e.g. a commit.
        packing_policy: policy of `packing.py` that packed them.
        buckets: a shard names its bucket by the number here.
        sources: in order of their document ids, which do not overlap.
    """

    tokenizer_sha256: str
    vocab_size: int
    padding_id: int
    pipeline_version: str
    packing_policy: str
    buckets: tuple[Bucket, ...]
    sources: tuple[Source, ...]

    def __post_init__(self) -> None:
        if twice := _first_twice(self.buckets):
            raise ValueError(f"{twice[0]} is named twice; give its shards one number")
        for source, following in pairwise(self.sources):
            end = source.first_document_id + source.num_documents
            if following.first_document_id < end:
                raise ValueError(
                    f"source {following.name!r} begins with document {following.first_document_id},"
                    f" source {source.name!r} ends before {end}; they must not overlap"
                )


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardEntry:
    """One shard for `write_manifest`.

    Attributes:
        path: relative to the manifest's folder, without a suffix, `/` between its parts.
        bucket: number of its bucket in the header.
        written: what `WindowWriter.finish` or `plain.index_pair` returned.
        pair: path of .bin and .idx without a suffix, absolute or relative to the manifest's folder;
            empty: they stand beside .win.
    """

    path: str
    bucket: int
    written: WrittenShard
    pair: str = ""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Manifest:
    """The contents of a manifest.

    Attributes:
        path: the file, or its URL.
        header: of the dataset as a whole.
        bucket: `[N]` u64, rising.
        windows: `[N]` u64.
        tokens: `[N]` u64, without padding.
        documents: `[N]` u64, those that begin in the shard.
        sizes: `[N, 3]` u64, bytes of .bin, .idx and .win.
        sha256: `[N, 4, 32]` u8, of .bin, .idx and .win, and the digest of the shard.
        path_starts: `[N+1]` u64 into `paths`; `[2N+1]` where pairs stand elsewhere.
        paths: of the shards, then of the pairs that stand elsewhere; UTF-8, back to back.
        digest: of the dataset, 32 bytes.
    """

    path: Location
    header: DatasetHeader
    bucket: NDArray[np.uint64]
    windows: NDArray[np.uint64]
    tokens: NDArray[np.uint64]
    documents: NDArray[np.uint64]
    sizes: NDArray[np.uint64]
    sha256: NDArray[np.uint8]
    path_starts: NDArray[np.uint64]
    paths: bytes
    digest: bytes

    @property
    def num_shards(self) -> int:
        """N."""
        return len(self.bucket)

    def name(self, shard: int) -> str:
        """Return the path of a shard relative to the manifest's folder, without a suffix."""
        return self._path(shard)

    def prefix(self, shard: int) -> Location:
        """Return where a shard is, without a suffix."""
        return self.path.parent / self.name(shard)

    def pair(self, shard: int) -> Location:
        """Return where .bin and .idx of a shard are, without a suffix."""
        elsewhere = len(self.path_starts) > self.num_shards + 1
        place = self._path(self.num_shards + shard) if elsewhere else ""
        if "://" in place or place.startswith("/"):
            return as_location(place)
        return self.path.parent / (place or self.name(shard))

    def _path(self, number: int) -> str:
        """Return one of `paths`."""
        start, end = int(self.path_starts[number]), int(self.path_starts[number + 1])
        return self.paths[start:end].decode()


def write_manifest(
    path: Path | str, *, header: DatasetHeader, shards: Sequence[ShardEntry]
) -> bytes:
    """Write a manifest, all at once, and return the digest of the dataset, 32 bytes.

    Args:
        path: the file; shards are found relative to its folder.
        header: of the dataset as a whole.
        shards: in any order; those of a bucket keep theirs, and with it the numbers of windows.

    Raises:
        ValueError: if a bucket has no such number, or a shard has another window length, vocabulary
            or padding id than the header, or a path twice.
        OSError: if the folder cannot be written to.
    """
    ordered = sorted(shards, key=lambda shard: shard.bucket)
    for shard in ordered:
        _check_entry(shard, header)
    paths = [shard.path.encode() for shard in ordered]
    if twice := _first_twice(paths):
        raise ValueError(f"shard {twice[0].decode()!r} is named twice")
    version = PAIRS_VERSION if any(shard.pair for shard in ordered) else VERSION
    if version == PAIRS_VERSION:
        paths += [shard.pair.encode() for shard in ordered]
    headers = [shard.written.header for shard in ordered]
    counts = [
        (shard.bucket, found.num_windows, found.num_tokens, found.num_documents)
        for shard, found in zip(ordered, headers, strict=True)
    ]
    sizes = [(found.bin_bytes, found.idx_bytes, found.win_bytes) for found in headers]
    digests = [
        found.bin_sha256 + found.idx_sha256 + shard.written.win_sha256 + shard.written.header_sha256
        for shard, found in zip(ordered, headers, strict=True)
    ]
    ends = np.cumsum([0, *map(len, paths)])
    text = json.dumps(asdict(header), sort_keys=True).encode()
    text += b" " * (-len(text) % 8)
    content = b"".join(
        (
            _HEAD.pack(MAGIC, version, len(text)),
            text,
            _COUNTS.pack(len(ordered), int(ends[-1])),
            np.array(counts, dtype=COUNT_DTYPE).tobytes(),
            np.array(sizes, dtype=COUNT_DTYPE).tobytes(),
            *digests,
            ends.astype(COUNT_DTYPE).tobytes(),
            *paths,
        )
    )
    digest = hashlib.sha256(content).digest()
    write_bytes(Path(path), content + digest)
    return digest


def _first_twice(values: Sequence[_T]) -> list[_T]:
    """Return the value that is the first to come again, or nothing."""
    seen: set[_T] = set()
    for value in values:
        if value in seen:
            return [value]
        seen.add(value)
    return []


def _check_entry(shard: ShardEntry, header: DatasetHeader) -> None:
    """Refuse a shard that does not belong to the dataset."""
    if not 0 <= shard.bucket < len(header.buckets):
        raise ValueError(
            f"shard {shard.path!r} is of bucket {shard.bucket}; the header has "
            f"{len(header.buckets)} buckets"
        )
    found = shard.written.header
    bucket = header.buckets[shard.bucket]
    padding_id = header.padding_id if found.plain else found.padding_id  # plain pairs have none
    given = (found.window_tokens, found.vocab_size, padding_id)
    wanted = (bucket.window_tokens, header.vocab_size, header.padding_id)
    if given != wanted:
        raise ValueError(
            f"shard {shard.path!r} has (window_tokens, vocab_size, padding_id) = {given}, its "
            f"bucket and the header say {wanted}"
        )


def read_manifest(path: Location | str) -> Manifest:
    """Return what a manifest says, after checking its SHA-256.

    Args:
        path: the file, or its URL.

    Raises:
        DataError: if it is missing, truncated, damaged, of another format or contradicts itself;
            the message names the file, what was expected and what was found. Its cause is an
            OSError if the file could not be read.
        ValueError: if nothing is installed that reads such a URL.
    """
    path = as_location(path)
    try:
        raw = read_all(path)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; no dataset without its manifest") from error
    if len(raw) < _HEAD.size + _COUNTS.size + DIGEST_BYTES:
        raise DataError(f"{path}: {len(raw)} bytes; the file is empty or truncated")
    magic, version, text_bytes = _HEAD.unpack_from(raw)
    if magic != MAGIC:
        raise DataError(f"{path}: starts with {magic!r}, a manifest with {MAGIC!r}")
    if version not in (VERSION, PAIRS_VERSION):
        raise DataError(
            f"{path}: format version {version}, only {VERSION} and {PAIRS_VERSION} are known"
        )
    found, expected = hashlib.sha256(memoryview(raw)[:-DIGEST_BYTES]).digest(), raw[-DIGEST_BYTES:]
    if found != expected:
        raise DataError(
            f"{path}: bytes 0 .. {len(raw) - DIGEST_BYTES} have the SHA-256 {found.hex()}, the "
            f"file ends with {expected.hex()}; it is truncated or damaged"
        )
    try:
        return _parse(raw, path=path, version=version, text_bytes=text_bytes)
    except (ValueError, KeyError, TypeError, struct.error) as error:
        raise DataError(f"{path}: whole, but no manifest of version {version}: {error}") from error


def _parse(raw: bytes, *, path: Location, version: int, text_bytes: int) -> Manifest:
    """Return the manifest of bytes whose SHA-256 is right."""
    offset = _HEAD.size + text_bytes
    header = _dataset_header(json.loads(raw[_HEAD.size : offset]))
    num_shards, paths_bytes = _COUNTS.unpack_from(raw, offset)
    offset += _COUNTS.size
    num_paths = num_shards * (2 if version == PAIRS_VERSION else 1)
    size = offset + num_shards * _SHARD_BYTES + 8 * (num_paths + 1) + paths_bytes + DIGEST_BYTES
    if len(raw) != size:
        raise ValueError(f"{len(raw)} bytes, {num_shards} shards take {size}")
    counts = np.frombuffer(raw, COUNT_DTYPE, count=4 * num_shards, offset=offset).reshape(-1, 4)
    offset += counts.nbytes
    sizes = np.frombuffer(raw, COUNT_DTYPE, count=3 * num_shards, offset=offset).reshape(-1, 3)
    offset += sizes.nbytes
    sha256 = np.frombuffer(raw, np.uint8, count=DIGEST_BYTES * 4 * num_shards, offset=offset)
    offset += sha256.nbytes
    starts = np.frombuffer(raw, COUNT_DTYPE, count=num_paths + 1, offset=offset)
    offset += starts.nbytes
    bucket = counts[:, 0]
    if num_shards and ((bucket[1:] < bucket[:-1]).any() or bucket[-1] >= len(header.buckets)):
        raise ValueError(f"shards do not rise by bucket up to {len(header.buckets) - 1}")
    return Manifest(
        path=path,
        header=header,
        bucket=bucket,
        windows=counts[:, 1],
        tokens=counts[:, 2],
        documents=counts[:, 3],
        sizes=sizes,
        sha256=sha256.reshape(-1, 4, DIGEST_BYTES),
        path_starts=starts,
        paths=raw[offset : offset + paths_bytes],
        digest=raw[-DIGEST_BYTES:],
    )


def _dataset_header(record: dict[str, Any]) -> DatasetHeader:
    """Return the header that a parsed JSON object describes; strict about names."""
    fields = dict(record)
    fields["buckets"] = tuple(Bucket(**entry) for entry in fields["buckets"])
    fields["sources"] = tuple(Source(**entry) for entry in fields["sources"])
    return DatasetHeader(**fields)
