"""A small dataset of three buckets and six shards with known windows."""

import hashlib
from dataclasses import replace
from pathlib import Path

from data.indexed.dataset_manifest import (
    Bucket,
    DatasetHeader,
    ShardEntry,
    Source,
    write_manifest,
)
from data.indexed.window_writer import WindowWriter, WrittenShard

TOKENIZER = hashlib.sha256(b"tokenizer").hexdigest()
CODE = Bucket(domain="code", language="", quality_tier=1, difficulty_tier=0, window_tokens=4)
KOREAN = replace(CODE, domain="web", language="ko")
LONG = replace(KOREAN, window_tokens=8)
HEADER = DatasetHeader(
    tokenizer_sha256=TOKENIZER,
    vocab_size=1000,
    padding_id=0,
    pipeline_version="1",
    packing_policy="best_fit",
    buckets=(CODE, KOREAN, LONG),
    sources=(
        Source(name="crawl", first_document_id=0, num_documents=100),
        Source(name="books", first_document_id=200, num_documents=10),
    ),
)
# shard -> bucket and ids of its windows; given in no order of buckets
SHARDS = {
    "web/0": (1, [[7], [8, 9]]),
    "code/0": (0, [[1, 2], [3]]),
    "web/1": (1, []),
    "web/2": (1, [[10]]),
    "long/0": (2, [[11] * 9]),
    "code/1": (0, [[4, 5, 6]]),
}
EXPECTED = [[[1, 2], [3], [4, 5, 6]], [[7], [8, 9], [10]], [[11] * 9]]


def write_shard(prefix: Path, windows: list[list[int]], *, window_tokens: int) -> WrittenShard:
    prefix.parent.mkdir(exist_ok=True)
    with WindowWriter(prefix, window_tokens=window_tokens, vocab_size=1000, padding_id=0) as writer:
        for number, ids in enumerate(windows):
            writer.add(ids, piece_lengths=[len(ids)], document_ids=[number], piece_offsets=[0])
        return writer.finish()


def write_dataset(folder: Path) -> Path:
    entries = [
        ShardEntry(
            path=name,
            bucket=bucket,
            written=write_shard(
                folder / name, windows, window_tokens=HEADER.buckets[bucket].window_tokens
            ),
        )
        for name, (bucket, windows) in SHARDS.items()
    ]
    write_manifest(folder / "dataset.set", header=HEADER, shards=entries)
    return folder / "dataset.set"
