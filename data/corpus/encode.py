"""How do the documents of one split become .bin/.idx pairs, with what the manifest says of them?

Texts are encoded in batches of some two million characters, on all cores. Of validation text the
sizes under two general compressors are noted: bits per byte that a model has to beat.
"""

import dataclasses
import gzip
import lzma
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from data.corpus.manifest import PARTIAL_NAME, Compressed, DomainFiles, Manifest, Split
from data.corpus.record import Document
from data.indexed.writer import IndexedWriter
from data.tokenizer.codec import Codec

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total); units are the stage's own (documents, bytes, steps)."""

_BATCH_CHARS = 2_000_000


def write_side(
    manifest: Manifest,
    side: Split,
    documents: Mapping[str, Sequence[Document]],
    codec: Codec,
    folder: Path,
    *,
    progress: Progress,
) -> Manifest:
    """Write the pairs of one split that the manifest lacks, and return it with them.

    After each pair the manifest so far is saved under its partial name.

    Args:
        manifest: what is finished.
        side: the split.
        documents: domain -> documents of that split, in the order in which they are written.
        codec: the tokenizer.
        folder: the corpus folder.
        progress: told what is going on.

    Raises:
        OSError: if the folder cannot be written to.
    """
    for domain in sorted(documents):
        if domain in manifest.splits[side]:
            continue
        texts = [document.text for document in documents[domain]]
        prefix = f"{side}/{domain}"
        written = _write_pair(folder / prefix, texts, codec=codec, progress=progress, name=prefix)
        entry = dataclasses.replace(
            written,
            prefix=prefix,
            compressed=compressed_sizes("\n".join(texts)) if side == "validation" else None,
        )
        pairs = {**manifest.splits[side], domain: entry}
        manifest = dataclasses.replace(manifest, splits={**manifest.splits, side: pairs})
        manifest.save(folder, name=PARTIAL_NAME)
    return manifest


def _write_pair(
    path: Path, texts: Sequence[str], *, codec: Codec, progress: Progress, name: str
) -> DomainFiles:
    """Write one pair and return what the manifest says of it."""
    end = np.array([codec.eod_id], dtype=np.int32)
    done = 0
    with IndexedWriter(path, vocab_size=codec.vocab_size) as writer:
        for batch in _batches(texts):
            progress(f"encode {name}", done, len(texts))
            for ids in codec.encode_batch(batch):
                writer.add(np.concatenate((ids, end)))
            done += len(batch)
        written = writer.finish()
    progress(f"encode {name}", done, len(texts))
    return DomainFiles(
        prefix=name,
        documents=written.num_documents,
        tokens=written.num_tokens,
        bytes=sum(len(text.encode("utf-8")) for text in texts),
        bin_bytes=written.bin_bytes,
        idx_bytes=written.idx_bytes,
        bin_sha256=written.bin_sha256,
        idx_sha256=written.idx_sha256,
        compressed=None,
    )


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
