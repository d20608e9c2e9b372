"""How long does the store of windows take to pack, to write, to open and to read?

    python tests/bench/bench_store.py [--json FILE]

(a) packing: documents of lognormal lengths of mean 1,000, a shard at a time, both policies;
(b) opening: a manifest of 20,000 shards in 240 buckets, 10T tokens, and the shards of a first
    global batch of 3,072 windows, in a process of its own so that its peak memory is its own;
(c) writing and reading windows of 4,096 and 8,192 in random order from the page cache, beside the
    least that any reader does: a pread and a conversion to int64;
(d) reading windows of 4,096 through a dataset: mapped, with a limit on how long a read may take, 64
    windows or one window a call, and from blocks that the cache already has.

Seconds of the processor, not of the clock; of reading, the least of several rounds in turn.
"""

# ruff: noqa: E402  the line that puts the root on sys.path comes before our imports

import hashlib
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np

from data.indexed.block_cache import BlockCacheConfig
from data.indexed.dataset import open_dataset
from data.indexed.dataset_manifest import Bucket, DatasetHeader, ShardEntry, write_manifest
from data.indexed.packing import POLICIES, pack
from data.indexed.patience import Patience
from data.indexed.window_reader import WindowReader
from data.indexed.window_writer import WindowWriter
from tests.bench.corpora import (
    NUM_BUCKETS,
    VOCAB_SIZE,
    document_lengths,
    many_buckets,
    write_described_manifest,
)
from tests.bench.memory import peak_mib
from tests.bench.provenance import parser, write_result

GLOBAL_SEQUENCES = 3072
ROUNDS = 5


def bench_packing() -> list[dict[str, Any]]:
    """Return a row for each policy, window length and number of documents."""
    rows: list[dict[str, Any]] = []
    for window_tokens in (4096, 8192):
        for number in (10_000, 100_000, 1_000_000):
            lengths = document_lengths(number)
            for policy in POLICIES:
                start = time.process_time()
                packing = pack(lengths, capacity=window_tokens + 1, policy=policy, seed=0)
                seconds = time.process_time() - start
                pieces = np.bincount(packing.document_idx, minlength=number)
                cut = int(((pieces > 1) & (lengths <= window_tokens + 1)).sum())
                rows.append(
                    {
                        "policy": policy,
                        "window_tokens": window_tokens,
                        "documents": number,
                        "us_per_document": seconds / number * 1e6,
                        "padding_percent": 100 * packing.padding_fraction,
                        "needlessly_cut_percent": 100 * cut / number,
                    }
                )
    return rows


def open_large_manifest(path: Path) -> dict[str, Any]:
    """Return what opening and locating a first global batch take in this process."""
    before = peak_mib()
    start = time.perf_counter()
    dataset = open_dataset(path)
    opened = time.perf_counter()
    rng = np.random.default_rng(1)
    buckets = rng.integers(0, NUM_BUCKETS, GLOBAL_SEQUENCES)
    shards, _ = dataset.locate(buckets, rng.integers(0, dataset.num_windows[buckets]))
    for shard in shards.tolist():
        dataset.manifest.prefix(shard)
    located = time.perf_counter()
    return {
        "shards": dataset.manifest.num_shards,
        "buckets": len(dataset.header.buckets),
        "tokens": int(dataset.manifest.tokens.sum()),
        "manifest_bytes": path.stat().st_size,
        "open_s": opened - start,
        "locate_s": located - opened,
        "peak_mib": peak_mib(),
        "peak_mib_before": before,
    }


def bench_opening(folder: Path) -> dict[str, Any]:
    """Return the figures of a fresh process."""
    path = folder / "large.set"
    write_described_manifest(path, buckets=many_buckets())
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(open_large_manifest, (path,))


def bench_windows(folder: Path, window_tokens: int) -> dict[str, Any]:
    """Return tokens per second of writing and of each way to read."""
    prefix = folder / f"windows{window_tokens}"
    lengths = document_lengths(20_000)
    packing = pack(lengths, capacity=window_tokens + 1, policy="best_fit", seed=0)
    ids = np.random.default_rng(0).integers(0, VOCAB_SIZE, window_tokens + 1, dtype=np.int32)
    first = packing.first_piece.tolist()
    start = time.process_time()
    with WindowWriter(
        prefix, window_tokens=window_tokens, vocab_size=VOCAB_SIZE, padding_id=0
    ) as writer:
        for window in range(packing.num_windows):
            rows = slice(first[window], first[window + 1])
            sizes = packing.piece_lengths[rows]
            writer.add(
                ids[: sizes.sum()],
                piece_lengths=sizes,
                document_ids=packing.document_idx[rows],
                piece_offsets=packing.piece_offsets[rows],
            )
        writer.finish()
    written = time.process_time() - start
    order = np.random.default_rng(1).permutation(packing.num_windows).tolist()
    places = packing.num_windows * (window_tokens + 1)
    with (
        WindowReader(prefix) as checked,
        WindowReader(prefix, check_digests=False) as plain,
        (folder / f"{prefix.name}.bin").open("rb") as stream,
    ):
        rows = np.empty((1, window_tokens + 1), dtype=np.int32)
        size = checked.header.window_bytes
        ways: dict[str, Callable[[int], object]] = {
            "read": lambda window: checked.read_into([window], rows),
            "read_without_digests": lambda window: plain.read_into([window], rows),
            "bare_pread_int64": lambda window: np.frombuffer(
                os.pread(stream.fileno(), size, window * size), np.int32
            ).astype(np.int64),
        }
        least = dict.fromkeys(ways, float("inf"))
        for _ in range(ROUNDS):
            for name, way in ways.items():
                start = time.process_time()
                for window in order:
                    way(window)
                least[name] = min(least[name], time.process_time() - start)
    return {
        "window_tokens": window_tokens,
        "windows": packing.num_windows,
        "write_tokens_per_s": places / written,
        **{f"{name}_tokens_per_s": places / seconds for name, seconds in least.items()},
    }


def write_one_shard(path: Path) -> None:
    """Write a dataset of one shard of 2,048 windows of 4,096 tokens, four pieces each."""
    rng = np.random.default_rng(0)
    bucket = Bucket(
        domain="web", language="", quality_tier=0, difficulty_tier=0, window_tokens=4096
    )
    with WindowWriter(
        path.parent / "one", window_tokens=4096, vocab_size=VOCAB_SIZE, padding_id=0
    ) as writer:
        for window in range(2048):
            writer.add(
                rng.integers(0, VOCAB_SIZE, 4097, dtype=np.int32),
                piece_lengths=[1000, 1000, 1000, 1097],
                document_ids=[4 * window + piece for piece in range(4)],
                piece_offsets=[0] * 4,
            )
        written = writer.finish()
    header = DatasetHeader(
        tokenizer_sha256=hashlib.sha256().hexdigest(),
        vocab_size=VOCAB_SIZE,
        padding_id=0,
        pipeline_version="bench",
        packing_policy="best_fit",
        buckets=(bucket,),
        sources=(),
    )
    write_manifest(path, header=header, shards=[ShardEntry(path="one", bucket=0, written=written)])


def bench_sources(folder: Path) -> dict[str, float]:
    """Return processor microseconds a window of each way to open a dataset."""
    path = folder / "one.set"
    write_one_shard(path)
    limited = Patience(local_limit_s=60)
    cache = BlockCacheConfig(folder=folder / "blocks")
    ways = {
        "mapped": (open_dataset(path), 64),
        "limit_64_a_call": (open_dataset(path, patience=limited), 64),
        "limit_1_a_call": (open_dataset(path, patience=limited), 1),
        "cached_64_a_call": (open_dataset(f"file://{path}", cache=cache), 64),
    }
    order = np.random.default_rng(1).permutation(2048)
    least = dict.fromkeys(ways, float("inf"))
    for _ in range(ROUNDS):
        for name, (dataset, size) in ways.items():
            rows = np.empty((size, 4097), dtype=np.int32)
            start = time.process_time()
            for batch in order.reshape(-1, size):
                dataset.read_into([0] * size, batch, rows)
            least[name] = min(least[name], time.process_time() - start)
    return {f"{name}_us_per_window": 1e6 * seconds / 2048 for name, seconds in least.items()}


def main() -> None:
    """Run the parts and print a table of each."""
    arguments = parser(__doc__).parse_args()
    packing = bench_packing()
    for row in packing:
        print(
            f"pack {row['policy']:8} S={row['window_tokens']} documents={row['documents']:7}: "
            f"{row['us_per_document']:.2f} us/document, padding {row['padding_percent']:.4f} %, "
            f"cut though they fit {row['needlessly_cut_percent']:.1f} %"
        )
    with tempfile.TemporaryDirectory() as name:
        opening = bench_opening(Path(name))
        print(
            f"open {opening['shards']} shards, {opening['buckets']} buckets, "
            f"{opening['tokens']:.3g} tokens, {opening['manifest_bytes'] / 1e6:.1f} MB: "
            f"{opening['open_s'] * 1e3:.1f} ms, {GLOBAL_SEQUENCES} addresses "
            f"{opening['locate_s'] * 1e3:.1f} ms, peak {opening['peak_mib']:.0f} MiB "
            f"({opening['peak_mib_before']:.0f} before)"
        )
        windows = [bench_windows(Path(name), tokens) for tokens in (4096, 8192)]
        sources = bench_sources(Path(name))
    for row in windows:
        rates = {key: value / 1e6 for key, value in row.items() if key.endswith("_per_s")}
        shown = ", ".join(
            f"{key.removesuffix('_tokens_per_s')} {rate:.0f}" for key, rate in rates.items()
        )
        print(f"windows of {row['window_tokens']}, M tokens per processor second: {shown}")
    shown = ", ".join(
        f"{key.removesuffix('_us_per_window')} {us:.1f}" for key, us in sources.items()
    )
    print(f"dataset of windows of 4096, processor us a window: {shown}")
    write_result(arguments.json, packing=packing, opening=opening, windows=windows, sources=sources)


if __name__ == "__main__":
    main()
