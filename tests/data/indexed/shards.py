"""A small shard of windows with known documents, and a way to damage it."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.indexed.packing import PackingPolicy, pack
from data.indexed.window_writer import WindowWriter, WrittenShard, write_packed
from data.indexed.writer import IndexedWriter

SEQUENCE = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Packed:
    prefix: Path
    documents: dict[int, np.ndarray]
    written: WrittenShard


def write_shard(
    folder: Path, *, policy: PackingPolicy = "best_fit", vocab_size: int = 1000, seed: int = 0
) -> Packed:
    """Write 60 random documents as a plain pair, and packed."""
    rng = np.random.default_rng(seed)
    documents = [rng.integers(0, vocab_size, size=rng.integers(1, 200)) for _ in range(60)]
    ids = rng.integers(2**40, 2**63, size=len(documents)).tolist()
    with IndexedWriter(folder / "plain", vocab_size=vocab_size) as writer:
        for tokens in documents:
            writer.add(tokens)
        writer.finish()
    lengths = [len(tokens) for tokens in documents]
    packing = pack(lengths, capacity=SEQUENCE + 1, policy=policy, seed=seed)
    with WindowWriter(
        folder / "a.b", window_tokens=SEQUENCE, vocab_size=vocab_size, padding_id=3
    ) as windows:
        write_packed(windows, documents, packing=packing, document_ids=ids)
        written = windows.finish()
    return Packed(
        prefix=folder / "a.b",
        documents=dict(zip(ids, documents, strict=True)),
        written=written,
    )


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
