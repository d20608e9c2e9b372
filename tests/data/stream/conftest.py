"""A small dataset of two domains in windows of two lengths, and the ledger of a run over it."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data.indexed.dataset import open_dataset
from data.indexed.dataset_manifest import (
    Bucket,
    DatasetHeader,
    ShardEntry,
    Source,
    write_manifest,
)
from data.indexed.packing import pack
from data.indexed.window_writer import WindowWriter, write_packed
from data.stream.curriculum import Curriculum, Mixture, Stage
from data.stream.ledger import Ledger, begin_ledger
from data.stream.plan import plan

VOCAB = 500
END = 499
DOCUMENTS = 90


@pytest.fixture
def small_dataset(tmp_path: Path) -> Path:
    """Return the manifest of 3 buckets: code and web in windows of 16, web in windows of 32."""
    return write_small_dataset(tmp_path)


def write_small_dataset(folder: Path) -> Path:
    rng = np.random.default_rng(3)
    buckets = [bucket("code", 16), bucket("web", 16), bucket("web", 32)]
    shards: list[ShardEntry] = []
    for number, one in enumerate(buckets):
        documents = [rng.integers(0, END, size=rng.integers(3, 60)) for _ in range(DOCUMENTS)]
        for ids in documents:
            ids[-1] = END
        lengths = [len(ids) for ids in documents]
        packing = pack(lengths, capacity=one.window_tokens + 1, policy="best_fit", seed=0)
        name = f"{one.domain}.{one.window_tokens}"
        with WindowWriter(
            folder / name, window_tokens=one.window_tokens, vocab_size=VOCAB, padding_id=END
        ) as writer:
            ids_of = np.arange(DOCUMENTS) + number * DOCUMENTS
            write_packed(writer, documents, packing=packing, document_ids=ids_of)
            written = writer.finish()
        shards.append(ShardEntry(path=name, bucket=number, written=written))
    header = DatasetHeader(
        tokenizer_sha256="ab" * 32,
        vocab_size=VOCAB,
        padding_id=END,
        pipeline_version="test",
        packing_policy="best_fit",
        buckets=tuple(buckets),
        sources=(Source(name="all", first_document_id=0, num_documents=3 * DOCUMENTS),),
    )
    write_manifest(folder / "set.manifest", header=header, shards=shards)
    return folder / "set.manifest"


def bucket(domain: str, window_tokens: int) -> Bucket:
    return Bucket(
        domain=domain,
        language="en",
        quality_tier=0,
        difficulty_tier=0,
        window_tokens=window_tokens,
    )


@pytest.fixture
def small_ledger(small_dataset: Path) -> Ledger:
    """Return the ledger of ten batches of 12 windows of 16, and five of 6 windows of 32."""
    stages = {
        "short": Stage(
            tokens=10 * 12 * 16,
            window_tokens=16,
            global_sequences=12,
            begin=Mixture(domains={"code": 1.0, "web": 2.0}),
        ),
        "long": Stage(tokens=5 * 6 * 32, window_tokens=32, global_sequences=6),
    }
    return ledger_of(small_dataset, Curriculum(stages=stages))


def ledger_of(manifest: Path, curriculum: Curriculum, *, seed: int = 7) -> Ledger:
    with open_dataset(manifest) as dataset:
        counts = dataset.num_windows.tolist()
        windows = dict(zip(dataset.header.buckets, counts, strict=True))
        planned = plan(curriculum, windows, seed=seed)
        return begin_ledger(
            {one: windows[one] for one in planned.buckets},
            planned.segments,
            dataset=dataset.digest.hex(),
            curriculum=curriculum.digest,
        )


Rewrite = Callable[[Path], None]
