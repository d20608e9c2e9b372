"""Which corpora are the benches of the store and of the stream about?

Documents of lognormal lengths; manifests whose shards are nowhere; megatron-core's pairs of which
only the lengths are real; pairs and shards of random ids.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.indexed.dataset_manifest import (
    Bucket,
    DatasetHeader,
    ShardEntry,
    Source,
    write_manifest,
)
from data.indexed.format import (
    LENGTH_DTYPE,
    OFFSET_DTYPE,
    IndexHeader,
    bin_path,
    idx_path,
)
from data.indexed.packing import pack
from data.indexed.reader import IndexedReader
from data.indexed.window_format import WindowHeader
from data.indexed.window_writer import WindowWriter, WrittenShard, write_packed
from data.indexed.writer import IndexedWriter

VOCAB_SIZE = 163_840
END_ID, PADDING_ID = 1, 0
MEAN_TOKENS = 1000
WINDOW_TOKENS = 4096
NUM_SHARDS, NUM_BUCKETS, TOTAL_TOKENS = 20_000, 240, 10**13
_CHUNK_DOCUMENTS = 10**7


def document_lengths(number: int, *, seed: int = 0) -> NDArray[np.int64]:
    """Return lognormal lengths of mean 1,000, as those of web documents."""
    rng = np.random.default_rng(seed)
    return np.maximum(1, rng.lognormal(np.log(MEAN_TOKENS) - 0.5, 1.0, number)).astype(np.int64)


def many_buckets() -> list[Bucket]:
    """Return 240 buckets: ten domains, three languages, four and two tiers."""
    return [
        Bucket(
            domain=f"domain{number // 24}",
            language=("ko", "en", "ja")[number % 3],
            quality_tier=number // 3 % 4,
            difficulty_tier=number // 12 % 2,
            window_tokens=WINDOW_TOKENS,
        )
        for number in range(NUM_BUCKETS)
    ]


def plain_buckets(number: int) -> list[Bucket]:
    """Return buckets that differ in their domain only."""
    return [
        Bucket(
            domain=f"domain{idx}",
            language="en",
            quality_tier=0,
            difficulty_tier=0,
            window_tokens=WINDOW_TOKENS,
        )
        for idx in range(number)
    ]


def write_described_manifest(
    path: Path,
    *,
    buckets: Sequence[Bucket],
    num_shards: int = NUM_SHARDS,
    num_tokens: int = TOTAL_TOKENS,
) -> None:
    """Write a manifest of so many tokens, as many in each shard; its shards are nowhere."""
    rng = np.random.default_rng(0)
    header = DatasetHeader(
        tokenizer_sha256=hashlib.sha256().hexdigest(),
        vocab_size=VOCAB_SIZE,
        padding_id=PADDING_ID,
        pipeline_version="bench",
        packing_policy="best_fit",
        buckets=tuple(buckets),
        sources=tuple(
            Source(name=f"source{n}", first_document_id=n * 2**40, num_documents=2**40)
            for n in range(100)
        ),
    )
    num_windows = num_tokens // (WINDOW_TOKENS + 1) // num_shards
    entries = [
        ShardEntry(
            path=f"bucket{number % len(buckets):03d}/shard{number:05d}",
            bucket=number % len(buckets),
            written=WrittenShard(
                header=WindowHeader(
                    dtype=np.dtype("<i4"),
                    window_tokens=WINDOW_TOKENS,
                    vocab_size=VOCAB_SIZE,
                    padding_id=PADDING_ID,
                    num_windows=num_windows,
                    num_pieces=4 * num_windows,
                    num_tokens=(WINDOW_TOKENS + 1) * num_windows,
                    num_documents=4 * num_windows,
                    bin_sha256=rng.bytes(32),
                    idx_sha256=rng.bytes(32),
                    columns_sha256=rng.bytes(32),
                ),
                header_sha256=rng.bytes(32),
                win_sha256=rng.bytes(32),
            ),
        )
        for number in range(num_shards)
    ]
    write_manifest(path, header=header, shards=entries)


def write_hollow_pair(prefix: Path, *, num_documents: int, seed: int) -> int:
    """Write an .idx of lognormal lengths beside a .bin that is a hole; return its tokens.

    The hole has the size that the .idx says and takes no disk. `.idx` takes 20 bytes a document.
    """
    header = IndexHeader(
        dtype=np.dtype("<i4"), num_sequences=num_documents, num_bounds=num_documents + 1
    )
    sizes = [
        min(_CHUNK_DOCUMENTS, num_documents - start)
        for start in range(0, num_documents, _CHUNK_DOCUMENTS)
    ]
    num_tokens = 0
    with idx_path(prefix).open("wb") as stream:
        stream.write(header.pack())
        for part, size in enumerate(sizes):
            lengths = document_lengths(size, seed=seed * len(sizes) + part)
            num_tokens += int(lengths.sum())
            stream.write(lengths.astype(LENGTH_DTYPE).tobytes())
        before = 0
        for part, size in enumerate(sizes):
            ends = np.cumsum(document_lengths(size, seed=seed * len(sizes) + part))
            starts = before + np.concatenate(([0], ends[:-1]))
            stream.write((starts * 4).astype(OFFSET_DTYPE).tobytes())
            before += int(ends[-1])
        for start in range(0, num_documents + 1, _CHUNK_DOCUMENTS):
            stop = min(start + _CHUNK_DOCUMENTS, num_documents + 1)
            stream.write(np.arange(start, stop, dtype=OFFSET_DTYPE).tobytes())
    with bin_path(prefix).open("wb") as stream:
        stream.truncate(4 * num_tokens)
    return num_tokens


def write_random_pair(prefix: Path, *, num_documents: int) -> None:
    """Write documents of random ids, each closed by the end-of-document id."""
    rng = np.random.default_rng(1)
    with IndexedWriter(prefix, vocab_size=VOCAB_SIZE) as writer:
        for length in document_lengths(num_documents).tolist():
            ids = rng.integers(END_ID + 1, VOCAB_SIZE, length, dtype=np.int32)
            ids[-1] = END_ID
            writer.add(ids)
        writer.finish()


def write_windows_of(pair: Path, prefix: Path, *, window_tokens: int) -> None:
    """Write the documents of a pair as a shard of windows, packed by best fit."""
    with (
        IndexedReader(pair) as reader,
        WindowWriter(
            prefix, window_tokens=window_tokens, vocab_size=VOCAB_SIZE, padding_id=PADDING_ID
        ) as writer,
    ):
        lengths = np.diff(reader.document_starts)
        packing = pack(lengths, capacity=window_tokens + 1, policy="best_fit", seed=0)
        documents = [reader.document(number) for number in range(reader.num_documents)]
        write_packed(writer, documents, packing=packing, document_ids=np.arange(len(documents)))
        writer.finish()
