"""Plain .bin/.idx pairs, written byte by byte from the documented layout, and what they hold."""

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

CODES = {"<u2": 8, "<i4": 4, "<i8": 5}


def write_pair(
    prefix: Path,
    documents: Sequence[Sequence[int] | np.ndarray],
    *,
    dtype: str = "<u2",
    sequences: Sequence[Sequence[int]] | None = None,
) -> list[np.ndarray]:
    """Write documents, each of one sequence or of sequences of the lengths given; return them."""
    arrays = [np.asarray(ids, dtype=dtype) for ids in documents]
    cut = [[len(ids)] for ids in arrays] if sequences is None else sequences
    lengths = np.array([length for each in cut for length in each], dtype="<i4")
    bounds = np.cumsum([0, *map(len, cut)]).astype("<i8")
    offsets = (np.cumsum(lengths, dtype="<i8") - lengths) * np.dtype(dtype).itemsize
    header = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, CODES[dtype], len(lengths), len(bounds))
    prefix.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{prefix}.bin").write_bytes(b"".join(ids.tobytes() for ids in arrays))
    Path(f"{prefix}.idx").write_bytes(
        header + lengths.tobytes() + offsets.astype("<i8").tobytes() + bounds.tobytes()
    )
    return arrays


def random_documents(
    number: int, *, vocab_size: int = 1000, longest: int = 40, seed: int = 0
) -> list[np.ndarray]:
    """Return documents of 0 to `longest` tokens."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab_size, rng.integers(0, longest + 1)) for _ in range(number)]


def pieces_by_hand(
    documents: Sequence[np.ndarray], *, capacity: int, first_document_id: int = 0
) -> list[list[tuple[int, int, int]]]:
    """Return (document, offset, length) of each piece of each window, token by token."""
    places = [
        (first_document_id + number, offset)
        for number, ids in enumerate(documents)
        for offset in range(len(ids))
    ]
    windows: list[list[tuple[int, int, int]]] = []
    for begin in range(0, len(places) - capacity + 1, capacity):
        pieces: list[tuple[int, int, int]] = []
        for document, offset in places[begin : begin + capacity]:
            if pieces and pieces[-1][0] == document:
                pieces[-1] = (document, pieces[-1][1], pieces[-1][2] + 1)
            else:
                pieces.append((document, offset, 1))
        windows.append(pieces)
    return windows
