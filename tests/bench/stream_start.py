"""How soon does a fresh process know which windows a batch reads?

    python tests/bench/stream_start.py MANIFEST PLACE SPAWNED

A program of its own, so that its memory and its imports (Python, numpy, `data`) are all that is
counted. PLACE is where in the run the batch is, 0 the first and 1 the last, or `warm`: several
rounds in one process; SPAWNED is the monotonic clock when the process was asked for. Prints JSON.
"""

# ruff: noqa: E402  the line that puts the root on sys.path comes before our imports

import sys
import time
from pathlib import Path

BEGUN = time.monotonic()
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from data.indexed.dataset import Dataset, open_dataset
from data.indexed.dataset_manifest import Bucket
from data.stream.curriculum import Curriculum, Mixture, Plan, Stage, plan
from tests.bench.memory import peak_mib

IMPORTED = time.monotonic()
GLOBAL_SEQUENCES = 15_360
ROUNDS = 5


def three_stages(buckets: Sequence[Bucket], tokens: int) -> Curriculum:
    """Return a curriculum that goes from all domains alike to good and hard text of a few."""
    domains = sorted({bucket.domain for bucket in buckets})
    alike = Mixture(domains=dict.fromkeys(domains, 1.0))
    rising = Mixture(
        domains={domain: 1.0 + number for number, domain in enumerate(domains)},
        quality=(0.5, 1.0, 1.5, 2.0),
        difficulty=(1.0, 1.5),
    )
    last = Mixture(
        domains={domain: float(number) for number, domain in enumerate(domains)},
        quality=(0.0, 0.5, 1.0, 2.0),
        difficulty=(1.0, 2.0),
    )
    sizes: dict[str, Any] = {
        "window_tokens": buckets[0].window_tokens,
        "global_sequences": GLOBAL_SEQUENCES,
    }
    return Curriculum(
        stages=(
            Stage(name="general", tokens=tokens * 6 // 10, begin=alike, **sizes),
            Stage(
                name="middle", tokens=tokens * 3 // 10, begin=alike, end=rising, pieces=16, **sizes
            ),
            Stage(name="last", tokens=tokens // 10, begin=rising, end=last, pieces=8, **sizes),
        )
    )


def one_epoch(buckets: Sequence[Bucket], tokens: int) -> Curriculum:
    """Return a curriculum of one stage that takes nearly all of every bucket once."""
    domains = sorted({bucket.domain for bucket in buckets})
    stage = Stage(
        name="all",
        tokens=tokens * 99 // 100,
        window_tokens=buckets[0].window_tokens,
        global_sequences=GLOBAL_SEQUENCES,
        begin=Mixture(domains=dict.fromkeys(domains, 1.0)),
    )
    return Curriculum(stages=(stage,))


def opened_plan(
    manifest: Path, stages: Callable[[Sequence[Bucket], int], Curriculum]
) -> tuple[Dataset, Plan]:
    """Return the dataset of a manifest and the plan of a curriculum over it."""
    dataset = open_dataset(manifest)
    buckets, tokens = dataset.header.buckets, int(dataset.manifest.tokens.sum())
    windows = dict(zip(buckets, dataset.num_windows.tolist(), strict=True))
    return dataset, plan(stages(buckets, tokens), windows, seed=0)


def locate(dataset: Dataset, planned: Plan, batch: int, num_slots: int) -> int:
    """Find shard and window of the first slots of a batch; return how many shards they are in."""
    found = planned.order.addresses(batch, np.arange(num_slots))
    number = {bucket: idx for idx, bucket in enumerate(dataset.header.buckets)}
    numbers = np.array([number[bucket] for bucket in planned.buckets])
    shards, _ = dataset.locate(numbers[found.bucket], found.window)
    return len(np.unique(shards))


def timed_start(manifest: Path, clock: Callable[[], float]) -> dict[str, float]:
    """Return seconds until the plan, until a first slot and a first batch are located."""
    start = clock()
    dataset, planned = opened_plan(manifest, one_epoch)
    ready = clock()
    locate(dataset, planned, 0, 1)
    first_sample = clock()
    locate(dataset, planned, 0, planned.order.global_sequences(0))
    return {
        "plan_s": ready - start,
        "first_sample_s": first_sample - start,
        "first_batch_s": clock() - start,
    }


def fresh_start(manifest: Path, *, place: float, spawned: float) -> dict[str, Any]:
    """Return what it took from asking for the process to the addresses of one batch.

    Args:
        manifest: of the dataset.
        place: of the batch in the run, 0 the first, 1 the last.
        spawned: the monotonic clock when the process was asked for.
    """
    peak_of_imports = peak_mib()
    dataset, planned = opened_plan(manifest, three_stages)
    ready = time.monotonic()
    batch = round(place * (planned.order.num_batches - 1))
    num_slots = planned.order.global_sequences(batch)
    num_shards = locate(dataset, planned, batch, num_slots)
    end = time.monotonic()
    return {
        "batch": batch,
        "num_batches": planned.order.num_batches,
        "slots": num_slots,
        "shards": num_shards,
        "segments": len(planned.segments),
        "python_s": BEGUN - spawned,
        "imports_s": IMPORTED - BEGUN,
        "plan_s": ready - IMPORTED,
        "addresses_s": end - ready,
        "total_s": end - spawned,
        "total_cpu_s": time.process_time(),
        "peak_mib": peak_mib(),
        "peak_mib_before": peak_of_imports,
    }


def warm_start(manifest: Path) -> dict[str, Any]:
    """Return what opening, planning and locating take in this process, at first and at best.

    In seconds of the processor, and at best in seconds of the clock as well.
    """
    peak_of_imports = peak_mib()
    cpu = [timed_start(manifest, time.process_time) for _ in range(ROUNDS)]
    wall = [timed_start(manifest, time.perf_counter) for _ in range(ROUNDS)]
    return {
        "first_cpu": cpu[0],
        "best_cpu": {name: min(found[name] for found in cpu) for name in cpu[0]},
        "best_wall": {name: min(found[name] for found in wall) for name in wall[0]},
        "peak_mib": peak_mib(),
        "peak_mib_before": peak_of_imports,
    }


def main() -> None:
    """Measure what the arguments say: a place in a run, or `warm`."""
    manifest, what, spawned = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
    if what == "warm":
        print(json.dumps(warm_start(manifest)))
    else:
        print(json.dumps(fresh_start(manifest, place=float(what), spawned=spawned)))


if __name__ == "__main__":
    main()
