"""Which documents are nearly the same text?

Each text is the set of its runs of five words. Two texts are near duplicates if the sets overlap
(Jaccard: common runs / all runs) by at least a threshold. The overlap is estimated, not computed:
for each of 128 hash functions the smallest hash over a set is kept, and two sets agree on such a
minimum with a probability equal to their Jaccard overlap (MinHash). Only texts that agree on all
four minima of one of 32 bands are compared (LSH): at an overlap of 0.7 a pair is missed once in
6,000, at 0.3 most are never looked at. What is nearly the same is joined: clusters are closed under
"near".

Everything is exact integer arithmetic with fixed constants: the same texts give the same clusters
on every machine, and in every order.

Source: Broder, "On the resemblance and containment of documents", 1997; Leskovec, Rajaraman,
Ullman, "Mining of Massive Datasets", chapter 3.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

SHINGLE_WORDS = 5
NUM_HASHES = 128
NUM_BANDS = 32
_CONSTANTS_SEED = 20240611
_BASE = np.uint64(0x9E3779B97F4A7C15)
_BLOCK = 1 << 15  # shingles hashed at once: 128 * 32,768 * 8 bytes = 32 MiB


class UnionFind:
    """Disjoint sets of 0 .. n - 1; the smallest member stands for its set."""

    def __init__(self, num_items: int) -> None:
        """Make n sets of one."""
        self._parent = list(range(num_items))

    def find(self, item: int) -> int:
        """Return the smallest member of the item's set."""
        root = item
        while self._parent[root] != root:
            root = self._parent[root]
        while self._parent[item] != root:
            self._parent[item], item = root, self._parent[item]
        return root

    def join(self, one: int, other: int) -> None:
        """Make the sets of two items one."""
        low, high = sorted((self.find(one), self.find(other)))
        self._parent[high] = low


class _WordHashes(dict[str, int]):
    """Word -> 64-bit hash, computed when first asked for."""

    def __missing__(self, word: str) -> int:
        digest = hashlib.blake2b(word.encode("utf-8"), digest_size=8).digest()
        value = self[word] = int.from_bytes(digest, "little")
        return value


def signatures(texts: Sequence[str]) -> NDArray[np.uint32]:
    """Return the MinHash signature of each text, `[N, 128]` uint32.

    Args:
        texts: N texts; one without words has a signature like any other of that kind.
    """
    generator = np.random.PCG64(
        _CONSTANTS_SEED
    )  # raw output: frozen by numpy's compatibility rules
    factors = generator.random_raw(NUM_HASHES).astype(np.uint64) | np.uint64(1)
    shifts = generator.random_raw(NUM_HASHES).astype(np.uint64)
    words = _WordHashes()
    result = np.empty((len(texts), NUM_HASHES), dtype=np.uint32)
    for row, text in enumerate(texts):
        shingles = _shingles(text, words=words)
        least = np.full(NUM_HASHES, np.iinfo(np.uint64).max, dtype=np.uint64)
        for start in range(0, len(shingles), _BLOCK):
            block = shingles[start : start + _BLOCK]
            hashed = block[None, :] * factors[:, None] + shifts[:, None]
            np.minimum(least, hashed.min(axis=1), out=least)
        result[row] = (least >> np.uint64(32)).astype(np.uint32)
    return result


def join_near_duplicates(
    signatures_NH: NDArray[np.uint32], *, threshold: float, clusters: UnionFind
) -> None:
    """Join, in `clusters`, the sets of texts whose estimated overlap reaches the threshold.

    Args:
        signatures_NH: `[N, 128]` uint32 from `signatures`.
        threshold: least estimated Jaccard overlap, 0 < threshold <= 1.
        clusters: sets over 0 .. N - 1; earlier joins are kept.

    Raises:
        ValueError: if the threshold is out of range.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold={threshold}; allowed: 0 < threshold <= 1")
    num_rows = NUM_HASHES // NUM_BANDS
    for band in range(NUM_BANDS):
        rows = signatures_NH[:, band * num_rows : (band + 1) * num_rows].astype(np.uint64)
        keys = rows[:, 0]
        for column in range(1, num_rows):
            keys = keys * _BASE + rows[:, column]
        order = np.argsort(keys, kind="stable")
        edges = np.flatnonzero(np.diff(keys[order])) + 1
        starts = np.concatenate(([0], edges))
        ends = np.concatenate((edges, [len(order)]))
        crowded = np.flatnonzero(ends - starts > 1)
        for run in crowded:
            bucket = order[starts[run] : ends[run]]
            _join_bucket(bucket, signatures_NH, threshold=threshold, clusters=clusters)


def _join_bucket(
    bucket: NDArray[np.intp],
    signatures_NH: NDArray[np.uint32],
    *,
    threshold: float,
    clusters: UnionFind,
) -> None:
    """Compare the first of the bucket with all, join, and go on with those it did not reach."""
    while len(bucket) > 1:
        first, rest = int(bucket[0]), bucket[1:]
        overlap = (signatures_NH[rest] == signatures_NH[first]).mean(axis=1)
        for other in rest[overlap >= threshold]:
            clusters.join(first, int(other))
        bucket = rest[overlap < threshold]


def _shingles(text: str, *, words: _WordHashes) -> NDArray[np.uint64]:
    """Return the distinct hashes of all runs of five words, `[K]` uint64, K >= 1."""
    split = text.split()
    hashes = np.fromiter(map(words.__getitem__, split), dtype=np.uint64, count=len(split))
    num_runs = max(1, len(hashes) - SHINGLE_WORDS + 1)
    runs = np.zeros(num_runs, dtype=np.uint64)
    for offset in range(min(SHINGLE_WORDS, len(hashes))):
        runs = runs * _BASE + hashes[offset : offset + num_runs]
    return np.unique(runs)
