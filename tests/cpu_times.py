"""Times of a CPU of round numbers, as its probe would write them."""

import json
from pathlib import Path

from parallel.spawn import threads_per_rank
from pretrain.planner.cpu import ATTENTION, EXCHANGED_BYTES, PRODUCTS, CpuTimes
from pretrain.training.cpu_cache import cache_file


def round_times(*, ranks: int, threads: int = 1) -> CpuTimes:
    """Return the times of 10 GFLOP/s, 0.5 ms and 1 GB/s between ranks, and steps of 0.1 to 1 s."""
    return CpuTimes(
        cpu="round",
        torch="2.13.0",
        threads=threads,
        ranks=ranks,
        is_compiled=True,
        products_s=tuple(2 * m * n * k / 1e10 for m, n, k in PRODUCTS),
        attention_s=tuple(0.004 * tokens / 256 for _, tokens in ATTENTION),
        exchanges_s=tuple(5e-4 + size / 1e9 for size in EXCHANGED_BYTES) if ranks > 1 else (),
        steps_s=(0.1, 1.0, 0.3, 0.2, 0.5),
    )


def fill_cache(folder: Path) -> None:
    """Write them for this machine with 1 to 8 ranks, so that no test measures it."""
    for ranks in (1, 2, 4, 8):
        path = cache_file(ranks, environment={"XDG_CACHE_HOME": str(folder)})
        path.parent.mkdir(parents=True, exist_ok=True)
        times = round_times(ranks=ranks, threads=threads_per_rank(ranks))
        path.write_text(json.dumps(times.as_json()), encoding="utf-8")
