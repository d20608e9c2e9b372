"""How do the documents of one split become shards of windows, with what the manifest says of them?

Texts are encoded in batches of some two million characters, on all cores. A hash of its place
decides at which window length a document is packed, so that each is in one bucket. Of validation
text the sizes under two general compressors are noted: bits per byte that a model has to beat.
"""

import dataclasses
import gzip
import lzma
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.corpus.manifest import (
    PARTIAL_NAME,
    Compressed,
    CorpusManifest,
    DomainText,
    ShardRecord,
    Split,
)
from data.corpus.record import Document
from data.indexed.packing import PackingPolicy, pack
from data.indexed.window_writer import WindowWriter, write_packed
from data.stream.shuffle import permutation_key
from data.tokenizer.codec import Codec

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total); units are the stage's own (documents, bytes, steps)."""

_BATCH_CHARS = 2_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class PackConfig:
    """How documents are packed into windows.

    Raises:
        ValueError: if there is no window length, or a length or share is out of range.
    """

    window_tokens: Mapping[int, float]
    """Window length S -> share of the documents that is packed at it."""
    policy: PackingPolicy = "best_fit"
    shard_tokens: int = 2**28
    """A shard is closed with the first document that reaches so many tokens."""
    seed: int = 0
    """Of the order of windows in a shard."""

    def __post_init__(self) -> None:
        shares = self.window_tokens
        if not shares or min(shares) < 2 or min(shares.values()) < 0 or not sum(shares.values()):
            raise ValueError(
                f"window_tokens={dict(shares)} given; lengths of at least 2 with shares of 0 or"
                " more, not all of them 0, are allowed"
            )
        if self.shard_tokens < 1:
            raise ValueError(f"shard_tokens={self.shard_tokens} given; at least 1 is allowed")


def write_side(
    manifest: CorpusManifest,
    side: Split,
    documents: Mapping[str, Sequence[Document]],
    codec: Codec,
    folder: Path,
    *,
    config: PackConfig,
    progress: Progress,
) -> CorpusManifest:
    """Write the shards of one split that the manifest lacks, and return it with them.

    After each domain the manifest so far is saved under its partial name.

    Args:
        manifest: what is finished.
        side: the split.
        documents: domain -> documents of that split, in the order in which they are numbered.
        codec: the tokenizer.
        folder: the corpus folder.
        config: how to pack.
        progress: told what is going on.

    Raises:
        OSError: if the folder cannot be written to.
    """
    first = 0
    for domain in sorted(documents):
        if domain not in manifest.splits[side]:
            texts = [document.text for document in documents[domain]]
            name = f"{side}/{domain}"
            ids = _encode(texts, codec=codec, progress=progress, name=name)
            shards = _write_shards(
                folder / side, domain, ids, codec=codec, config=config, first_document_id=first
            )
            entry = DomainText(
                documents=len(texts),
                first_document_id=first,
                tokens=sum(map(len, ids)),
                bytes=sum(len(text.encode("utf-8")) for text in texts),
                shards=tuple(shards),
                compressed=compressed_sizes("\n".join(texts)) if side == "validation" else None,
            )
            found = {**manifest.splits[side], domain: entry}
            manifest = dataclasses.replace(manifest, splits={**manifest.splits, side: found})
            manifest.save(folder, name=PARTIAL_NAME)
        first += len(documents[domain])
    return manifest


def _encode(
    texts: Sequence[str], *, codec: Codec, progress: Progress, name: str
) -> list[NDArray[np.int32]]:
    """Return the ids of each text, its closing id included."""
    end = np.array([codec.eod_id], dtype=np.int32)
    found: list[NDArray[np.int32]] = []
    for batch in _batches(texts):
        progress(f"encode {name}", len(found), len(texts))
        found += [np.concatenate((ids, end)) for ids in codec.encode_batch(batch)]
    progress(f"encode {name}", len(found), len(texts))
    return found


def _write_shards(
    folder: Path,
    domain: str,
    ids: Sequence[NDArray[np.int32]],
    *,
    codec: Codec,
    config: PackConfig,
    first_document_id: int,
) -> Iterator[ShardRecord]:
    """Write the shards of a domain and yield what the manifest says of each."""
    by_length = _by_window_length(domain, len(ids), config)
    for window_tokens, documents in by_length.items():
        for number, chosen in enumerate(_shards(documents, ids, config.shard_tokens)):
            name = f"{domain}.{window_tokens}.{number}"
            packing = pack(
                [len(ids[document]) for document in chosen],
                capacity=window_tokens + 1,
                policy=config.policy,
                seed=permutation_key(name, config.seed),
            )
            with WindowWriter(
                folder / name,
                window_tokens=window_tokens,
                vocab_size=codec.vocab_size,
                padding_id=codec.eod_id,
            ) as writer:
                write_packed(
                    writer,
                    [ids[document] for document in chosen],
                    packing=packing,
                    document_ids=first_document_id + np.array(chosen, dtype=np.int64),
                )
                written = writer.finish()
            yield ShardRecord(
                name=name, window_tokens=window_tokens, sha256=written.header_sha256.hex()
            )


def _by_window_length(domain: str, count: int, config: PackConfig) -> dict[int, list[int]]:
    """Return the documents of each window length, each document once."""
    lengths = sorted(config.window_tokens)
    ends = list(accumulate(config.window_tokens[length] for length in lengths))
    found: dict[int, list[int]] = {length: [] for length in lengths}
    for document in range(count):
        draw = permutation_key("window length", domain, document, config.seed) / 2**64 * ends[-1]
        found[lengths[min(bisect_right(ends, draw), len(lengths) - 1)]].append(document)
    return {length: documents for length, documents in found.items() if documents}


def _shards(
    documents: Sequence[int], ids: Sequence[NDArray[np.int32]], shard_tokens: int
) -> Iterator[list[int]]:
    """Yield the documents of one shard after the other."""
    chosen: list[int] = []
    num_tokens = 0
    for document in documents:
        chosen.append(document)
        num_tokens += len(ids[document])
        if num_tokens >= shard_tokens:
            yield chosen
            chosen, num_tokens = [], 0
    if chosen:
        yield chosen


def _batches(texts: Sequence[str]) -> Iterator[list[str]]:
    """Yield the texts in lists of some two million characters."""
    batch: list[str] = []
    num_chars = 0
    for text in texts:
        batch.append(text)
        num_chars += len(text)
        if num_chars >= _BATCH_CHARS:
            yield batch
            batch, num_chars = [], 0
    if batch:
        yield batch


def compressed_sizes(text: str) -> Compressed:
    """Return the sizes of a text under `gzip -9` and `xz -9e`."""
    raw = text.encode("utf-8")
    return Compressed(
        gzip_bytes=len(gzip.compress(raw, compresslevel=9, mtime=0)),
        xz_bytes=len(lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME)),
    )
