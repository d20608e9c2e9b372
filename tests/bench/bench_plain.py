"""How long does it take to index a plain pair, in how much memory, and how large is the index?

    python tests/bench/bench_plain.py [--json FILE]

Pairs of documents of lognormal lengths: of mean 1,000, as those of web text; of mean 1,000 and four
times as many, to see whether memory grows; of mean 10, where .idx is larger than .bin. Each in a
process of its own, so that its peak memory is its own; processor seconds. Then a manifest of
20,000 pairs that stand elsewhere. Needs 2 GB of disk.
"""

# ruff: noqa: E402  the line that puts the root on sys.path comes before our imports

import multiprocessing
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np

from data.indexed.dataset_manifest import (
    Bucket,
    DatasetHeader,
    ShardEntry,
    Source,
    read_manifest,
    write_manifest,
)
from data.indexed.format import IndexHeader
from data.indexed.plain import index_pair
from data.indexed.window_writer import WrittenShard
from tests.bench.provenance import parser, write_result

VOCAB_SIZE = 163_840
NUM_PAIRS = 20_000
CASES = ((100_000, 1000), (400_000, 1000), (5_000_000, 10))  # documents, mean length


def write_pair(prefix: Path, *, documents: int, mean: int) -> int:
    """Write random ids and return their number."""
    rng = np.random.default_rng(0)
    lengths = np.maximum(1, rng.lognormal(np.log(mean) - 0.5, 1.0, documents)).astype("<i4")
    ends = np.cumsum(lengths, dtype="<i8")
    header = IndexHeader(
        dtype=np.dtype("<i4"), num_sequences=documents, num_bounds=documents + 1
    ).pack()
    bounds = np.arange(documents + 1, dtype="<i8")
    Path(f"{prefix}.idx").write_bytes(
        b"".join((header, lengths.tobytes(), ((ends - lengths) * 4).tobytes(), bounds.tobytes()))
    )
    block = rng.integers(0, VOCAB_SIZE, 2**20, dtype=np.int32)
    left = int(ends[-1])
    with Path(f"{prefix}.bin").open("wb") as stream:
        while left:
            stream.write(block[:left].tobytes())
            left -= min(left, len(block))
    return int(ends[-1])


def peak_mib() -> float:
    """Return the peak memory of this process in MiB."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024


def index_one(prefix: Path) -> tuple[float, float, float, WrittenShard]:
    """Return processor seconds, peak memory before and after in MiB, and what was written."""
    before, start = peak_mib(), time.process_time()
    indexed = index_pair(prefix, prefix, window_tokens=4096, vocab_size=VOCAB_SIZE)
    return time.process_time() - start, before, peak_mib(), indexed.written


def bench_pair(folder: Path, documents: int, mean: int) -> tuple[dict[str, Any], WrittenShard]:
    """Return the figures of a fresh process, and what it wrote."""
    prefix = folder / "pair"
    tokens = write_pair(prefix, documents=documents, mean=mean)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        seconds, before, after, written = pool.apply(index_one, (prefix,))
    header = written.header
    row = {
        "documents": documents,
        "mean_tokens": mean,
        "bin_bytes": header.bin_bytes,
        "idx_bytes": header.idx_bytes,
        "win_bytes": header.win_bytes,
        "tokens_per_s": tokens / seconds,
        "peak_mib_before": before,
        "peak_mib": after,
    }
    return row, written


def bench_manifest(folder: Path, written: WrittenShard) -> dict[str, Any]:
    """Return size and time to open of a manifest of 20,000 pairs, each a source."""
    places = [
        f"/data/web/crawl-{number % 90:02d}/{number:05d}_tokens" for number in range(NUM_PAIRS)
    ]
    bucket = Bucket(
        domain="web", language="en", quality_tier=0, difficulty_tier=0, window_tokens=4096
    )
    header = DatasetHeader(
        tokenizer_sha256="0" * 64,
        vocab_size=VOCAB_SIZE,
        padding_id=0,
        pipeline_version="1",
        packing_policy="concat",
        buckets=(bucket,),
        sources=tuple(
            Source(name=place, first_document_id=500_000 * number, num_documents=500_000)
            for number, place in enumerate(places)
        ),
    )
    entry = ShardEntry(path="", bucket=0, written=written)
    shards = [
        replace(entry, path=f"4096/web/{number:05d}_tokens-0123456789ab", pair=place)
        for number, place in enumerate(places)
    ]
    path = folder / "dataset.set"
    write_manifest(path, header=header, shards=shards)
    start = time.process_time()
    read_manifest(path)
    return {"manifest_bytes": path.stat().st_size, "open_s": time.process_time() - start}


def main() -> None:
    """Run the parts and print a line of each."""
    arguments = parser(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as name:
        pairs = [bench_pair(Path(name), *case) for case in CASES]
        for row, _ in pairs:
            print(
                f"{row['documents']:,} documents of mean {row['mean_tokens']:,}: .bin "
                f"{row['bin_bytes'] / 1e6:.0f} MB, .idx {row['idx_bytes'] / 1e6:.1f} MB, .win "
                f"{row['win_bytes'] / 1e6:.1f} MB; {row['tokens_per_s'] / 1e6:.0f} M tokens per "
                f"processor second, peak {row['peak_mib']:.0f} MiB "
                f"({row['peak_mib_before']:.0f} before)"
            )
        manifest = bench_manifest(Path(name), pairs[0][1])
    print(
        f"manifest of {NUM_PAIRS:,} pairs: {manifest['manifest_bytes'] / 1e6:.1f} MB, opened in "
        f"{manifest['open_s'] * 1e3:.0f} ms"
    )
    write_result(arguments.json, pairs=[row for row, _ in pairs], manifest=manifest)


if __name__ == "__main__":
    main()
