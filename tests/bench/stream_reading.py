"""How many tokens a second does one core read, with positions and the bounds of documents?

    python tests/bench/stream_reading.py

A program of its own, so that only it imports megatron-core. Prints JSON.

The same documents in four ways, random windows from the page cache: windows of our store with and
without digests, a GPTDataset that starts positions again behind every document, and the least that
any reader does, a pread and a conversion to int64. Ours and GPTDataset end with ids in int64,
positions and a loss mask that is 0 at the last token of a document; ours gives cu_seqlens and the
document of each token as well. Rounds in turn, processor time, of each way the least.
"""

# ruff: noqa: E402  the line that puts the root on sys.path comes before our imports

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np

from data.indexed.window_format import StoredWindow
from data.indexed.window_reader import WindowReader
from data.stream.documents import window_documents
from tests.bench.corpora import END_ID, write_random_pair, write_windows_of
from tests.bench.megatron_data import GPTDataset, expected_positions, sample_reader

NUM_DOCUMENTS = 20_000
ROUNDS = 5
LENGTHS = (4096, 8192)


def bench_reading() -> list[dict[str, Any]]:
    """Return a row for each window length."""
    with tempfile.TemporaryDirectory() as name:
        pair = Path(name) / "documents"
        write_random_pair(pair, num_documents=NUM_DOCUMENTS)
        return [_row(pair, Path(name) / f"windows{size}", size) for size in LENGTHS]


def _row(pair: Path, prefix: Path, window_tokens: int) -> dict[str, Any]:
    """Return tokens per second of each way, and what our microseconds are spent on."""
    write_windows_of(pair, prefix, window_tokens=window_tokens)
    gpt, num_samples = sample_reader(pair, window_tokens=window_tokens)
    with (
        WindowReader(prefix) as checked,
        WindowReader(prefix, check_digests=False) as unchecked,
        Path(f"{prefix}.bin").open("rb") as stream,
    ):
        num_windows, size = checked.header.num_windows, checked.header.window_bytes
        kept = [checked.read(window).piece_lengths for window in range(num_windows)]

        def fields(lengths: np.ndarray) -> object:
            return window_documents(lengths, window_tokens=window_tokens, across_documents=False)

        def whole(stored: StoredWindow) -> object:
            return stored.tokens.astype(np.int64), fields(stored.piece_lengths)

        def bare(window: int) -> object:
            raw = os.pread(stream.fileno(), size, window * size)
            return np.frombuffer(raw, np.int32).astype(np.int64)

        ways: Mapping[str, Callable[[int], object]] = {
            "ours": lambda window: whole(checked.read(window)),
            "ours_unchecked": lambda window: whole(unchecked.read(window)),
            "gpt_dataset": lambda window: gpt[window % num_samples],
            "bare_pread_int64": bare,
            "read": checked.read,
            "read_unchecked": unchecked.read,
            "fields": lambda window: fields(kept[window]),
        }
        _check(gpt, checked)
        order = np.random.default_rng(1).permutation(num_windows).tolist()
        seconds = _least(ways, order)
    us = {name: least / num_windows * 1e6 for name, least in seconds.items()}
    return {
        "window_tokens": window_tokens,
        "windows": num_windows,
        "pieces_per_window": sum(map(len, kept)) / num_windows,
        "us_per_window": us,
        "tokens_per_s": {name: window_tokens / value * 1e6 for name, value in us.items()},
        "ratio_checked": us["gpt_dataset"] / us["ours"],
        "ratio_unchecked": us["gpt_dataset"] / us["ours_unchecked"],
        "spent_us": {
            "pread and int64": us["bare_pread_int64"],
            "reader: sidecar row, bounds, vocabulary, copy": us["ours_unchecked"]
            - us["fields"]
            - us["bare_pread_int64"],
            "digests of ids and row": us["read"] - us["read_unchecked"],
            "positions, documents, cu_seqlens, loss mask": us["fields"],
        },
    }


def _least(ways: Mapping[str, Callable[[int], object]], order: list[int]) -> dict[str, float]:
    """Return processor seconds of each way to read all windows, the least of its rounds."""
    least = dict.fromkeys(ways, float("inf"))
    for _ in range(ROUNDS):
        for name, way in ways.items():
            start = time.process_time()
            for window in order:
                way(window)
            least[name] = min(least[name], time.process_time() - start)
    return least


def _check(gpt: GPTDataset, reader: WindowReader) -> None:
    """Compare both with what the ids alone say: a bench of another thing is worth nothing."""
    sample = gpt[0]
    expected = expected_positions(sample["tokens"].numpy())
    assert (sample["position_ids"].numpy() == expected).all()
    compared = 0
    for window in range(100):
        stored = reader.read(window)
        if (stored.tokens == END_ID).sum() < len(stored.piece_lengths):
            continue  # a document was cut, which the ids do not show
        num_inputs = min(stored.num_tokens, reader.header.window_tokens)
        found = window_documents(
            stored.piece_lengths, window_tokens=reader.header.window_tokens, across_documents=False
        )
        expected = expected_positions(stored.tokens[:num_inputs])
        assert (found.positions[:num_inputs] == expected).all()
        assert (found.loss_mask[:num_inputs] == (stored.tokens[:num_inputs] != END_ID)).all()
        compared += 1
    assert compared


if __name__ == "__main__":
    print(json.dumps({"rows": bench_reading()}))
