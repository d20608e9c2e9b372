"""How long until a run knows what it reads, and how fast does it read it?

    python tests/bench/bench_stream.py [--json FILE] [--documents N ...]

(a) start-up: a manifest of 20,000 shards in 240 buckets, 10T tokens, under a curriculum of three
    stages; from asking for a process to shard and window of every slot of a batch of 15,360, for
    the first batch, one in the middle and the last. Python's start and all imports are counted.
(b) the same question to megatron-core: a BlendedDataset of two GPTDatasets, all indices built, for
    1e7 and 1e8 documents of lognormal lengths; beside it ours for as many tokens. Imports are left
    out of both. Each build in a process of its own. 1e8 needs 2.7 GB of disk and 3 GB of memory.
(c) reading windows of 4,096 and 8,192 from the page cache, with positions and the bounds of
    documents, beside a GPTDataset and a bare pread (stream_reading.py).

Seconds of the clock and of the processor; ratios are of the processor's, which other programs
disturb less: nothing here waits for a disk but megatron-core, which writes its indices. Memory: the
peak of the process, pages of mapped files included.
"""

# ruff: noqa: E402  the line that puts the root on sys.path comes before our imports

import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.bench.corpora import (
    NUM_BUCKETS,
    NUM_SHARDS,
    TOTAL_TOKENS,
    many_buckets,
    plain_buckets,
    write_described_manifest,
    write_hollow_pair,
)
from tests.bench.provenance import parser, write_result

PLACES = {"first": 0.0, "middle": 0.5, "last": 1.0}
ROUNDS = 3
NUM_PAIRS = 2
SHARD_TOKENS = 5 * 10**8


def program(name: str, *arguments: object) -> dict[str, Any]:
    """Return what a program of this folder prints, run in a fresh process."""
    command = [sys.executable, str(ROOT / "tests" / "bench" / name), *map(str, arguments)]
    ran = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(ran.stdout)


def bench_start(folder: Path) -> dict[str, dict[str, Any]]:
    """Return for each place in the run its fastest fresh process, with the largest peak."""
    manifest = folder / "large.set"
    write_described_manifest(manifest, buckets=many_buckets())
    rows: dict[str, dict[str, Any]] = {}
    for _ in range(ROUNDS):
        for name, place in PLACES.items():
            found = program("stream_start.py", manifest, place, time.monotonic())
            peak = max(found["peak_mib"], rows.get(name, found)["peak_mib"])
            best = min(found, rows.get(name, found), key=lambda row: row["total_s"])
            rows[name] = best | {"peak_mib": peak}
    return rows


def bench_build(num_documents: int) -> dict[str, Any]:
    """Return both ways to the first sample of a corpus of two domains."""
    with tempfile.TemporaryDirectory() as name:
        prefixes = [Path(name) / f"pair{number}" for number in range(NUM_PAIRS)]
        # in a process that ends: 1e8 lengths leave much memory behind
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            parts = [
                pool.apply(
                    write_hollow_pair,
                    (prefix,),
                    {"num_documents": num_documents // NUM_PAIRS, "seed": number},
                )
                for number, prefix in enumerate(prefixes)
            ]
        megatron = program("megatron_data.py", *prefixes)
        manifest = Path(name) / "windows.set"
        write_described_manifest(
            manifest,
            buckets=plain_buckets(NUM_PAIRS),
            num_shards=max(NUM_PAIRS, sum(parts) // SHARD_TOKENS),
            num_tokens=sum(parts),
        )
        ours = program("stream_start.py", manifest, "warm", time.monotonic())
    return {
        "documents": num_documents,
        "tokens": sum(parts),
        "megatron": megatron,
        "ours": ours,
        "ratio_first_sample": megatron["cpu_s"] / ours["best_cpu"]["first_sample_s"],
        "ratio_first_batch": megatron["cpu_s"] / ours["best_cpu"]["first_batch_s"],
        "ratio_first_call": megatron["cpu_s"] / ours["first_cpu"]["first_sample_s"],
    }


def print_start(rows: dict[str, dict[str, Any]]) -> None:
    """Print (a)."""
    print(
        f"(a) {NUM_SHARDS} shards, {NUM_BUCKETS} buckets, {TOTAL_TOKENS:.0e} tokens, three stages"
    )
    for name, row in rows.items():
        print(
            f"  {name:6} batch {row['batch']:>6}: {row['total_s']:.3f} s"
            f" ({row['total_cpu_s']:.3f} of the processor) = python"
            f" {row['python_s']:.3f} + imports {row['imports_s']:.3f} + manifest and plan"
            f" {row['plan_s']:.3f} + {row['slots']} addresses in {row['shards']} shards"
            f" {row['addresses_s']:.3f}; peak {row['peak_mib']:.0f} MiB"
            f" ({row['peak_mib_before']:.0f} after imports)"
        )


def print_build(row: dict[str, Any]) -> None:
    """Print one line of (b)."""
    ours, megatron = row["ours"], row["megatron"]
    best, first = ours["best_cpu"], ours["first_cpu"]
    print(
        f"(b) {row['documents']:.0e} documents, {row['tokens']:.3g} tokens, processor seconds:\n"
        f"  megatron-core {megatron['cpu_s']:.2f} ({megatron['wall_s']:.2f} of the clock), peak"
        f" {megatron['peak_mib']:.0f} MiB ({megatron['peak_mib_before']:.0f} after imports)\n"
        f"  ours to the first sample {best['first_sample_s']:.5f}, ratio"
        f" {row['ratio_first_sample']:,.0f}; to the first batch {best['first_batch_s']:.5f}, ratio"
        f" {row['ratio_first_batch']:,.0f}; to the first sample in the first round"
        f" {first['first_sample_s']:.5f}, ratio {row['ratio_first_call']:,.0f}; peak"
        f" {ours['peak_mib']:.0f} MiB ({ours['peak_mib_before']:.0f} after imports)"
    )


def print_reading(rows: Sequence[dict[str, Any]]) -> None:
    """Print (c)."""
    print("(c) reading with positions and cu_seqlens, M tokens per processor second")
    for row in rows:
        rates = {name: rate / 1e6 for name, rate in row["tokens_per_s"].items()}
        print(
            f"  S={row['window_tokens']}, {row['pieces_per_window']:.1f} pieces a window: ours"
            f" {rates['ours']:.0f}, unchecked {rates['ours_unchecked']:.0f}, GPTDataset"
            f" {rates['gpt_dataset']:.1f}, bare {rates['bare_pread_int64']:.0f}; ratios"
            f" {row['ratio_checked']:.1f} and {row['ratio_unchecked']:.1f}; us a window: "
            + ", ".join(f"{name} {value:.1f}" for name, value in row["spent_us"].items())
        )


def main() -> None:
    """Run the parts and print a table of each."""
    arguments = parser(__doc__)
    arguments.add_argument(
        "--documents",
        type=int,
        nargs="*",
        default=[10**7, 10**8],
        help="of (b); none: leave it out",
    )
    given = arguments.parse_args()
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name:
        start = bench_start(Path(name))
    print_start(start)
    builds: list[dict[str, Any]] = []
    for number in given.documents:
        builds.append(bench_build(number))
        print_build(builds[-1])
    reading = program("stream_reading.py")["rows"]
    print_reading(reading)
    load = [load_before, os.getloadavg()[0]]
    print(f"load of the machine before and after: {load[0]:.1f}, {load[1]:.1f}")
    write_result(
        given.json,
        load=load,
        start=start,
        builds=builds,
        reading=reading,
    )


if __name__ == "__main__":
    main()
