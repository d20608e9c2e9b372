"""Which bucket does item n of a mixture come from, and how many has each given before it?

Integers only, nothing is stored: a tree over the buckets in which a node that holds n items gives
the left child floor(n * left / (left + right)) of them. That never falls as n rises, so item n goes
to the child whose share it raises, and its number there is the share before it. The items of a
bucket are numbered without a gap, and the shares of all buckets add up to n at every n.

The tree is Huffman's: a node outweighs what lies two levels below it at least as Fibonacci's
numbers do, so the rounding of all levels together stays below 1 + 1 + 1/2 + 1/3 + 1/5 + ... < 4
items at any n, for any number of buckets.

The obvious formulas fail: floors of cumulative weights give a bucket less at n + 1 than at n,
greedy largest deficit needs the whole history, floats differ between machines. C items, B buckets.

Source: our choice; the error bound is tests/data/stream/test_apportion.py's.
"""

import heapq
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

MAX_TOTAL_WEIGHT = 2**30
"""Of all weights together: times MAX_ITEMS it stays below 2**63."""
MAX_ITEMS = 2**33
"""8.6e9 sequences: 35T tokens in windows of 4,096."""


class Apportionment:
    """Integer weights over B buckets; see the module."""

    def __init__(self, weights: Sequence[int]) -> None:
        """Build the tree.

        Args:
            weights: one for each bucket, >= 0, not all 0; only their ratios matter.

        Raises:
            ValueError: if a weight is negative, all are 0, or their sum exceeds MAX_TOTAL_WEIGHT.
        """
        total = sum(weights)
        if min(weights, default=0) < 0 or not 0 < total <= MAX_TOTAL_WEIGHT:
            raise ValueError(
                f"weights {list(weights)[:8]} ... of sum {total}; allowed: none below 0, a sum of 1"
                f" .. {MAX_TOTAL_WEIGHT}"
            )
        self.num_buckets = len(weights)
        self._build(weights)

    def _build(self, weights: Sequence[int]) -> None:
        """Set the nodes, root last; a child is a node >= 0 or ~bucket."""
        heap = [(int(w), idx, ~idx) for idx, w in enumerate(weights) if w]
        heapq.heapify(heap)
        nodes: list[tuple[int, int, int, int]] = []
        while len(heap) > 1:
            left_weight, _, left = heapq.heappop(heap)
            right_weight, _, right = heapq.heappop(heap)
            total = left_weight + right_weight
            # Among equal weights buckets come first, then nodes in the order they were made.
            heapq.heappush(heap, (total, self.num_buckets + len(nodes), len(nodes)))
            nodes.append((left, right, left_weight, total))
        self._root = heap[0][2]
        self._nodes = np.array(nodes, dtype=np.int64).reshape(-1, 4)

    def locate(self, items: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the bucket of each item and its number among the bucket's items.

        Args:
            items: `[C]` integers, 0 <= item < MAX_ITEMS.

        Returns:
            Bucket and number, each `[C]` int64, numbers from 0.

        Raises:
            ValueError: if an item is out of range.
        """
        number = np.array(items, dtype=np.int64, ndmin=1)
        if number.size and not 0 <= number.min() <= number.max() < MAX_ITEMS:
            raise ValueError(
                f"items {number.min()} .. {number.max()}; allowed: 0 .. {MAX_ITEMS - 1}"
            )
        place = np.full(number.shape, self._root, dtype=np.int64)
        active = np.flatnonzero(place >= 0)
        while active.size:
            left, right, left_weight, total = self._nodes[place[active]].T
            before = number[active]
            given = before * left_weight // total
            goes_left = (before + 1) * left_weight // total > given
            place[active] = np.where(goes_left, left, right)
            number[active] = np.where(goes_left, given, before - given)
            active = active[place[active] >= 0]
        return ~place, number

    def counts(self, num_items: int) -> NDArray[np.int64]:
        """Return how many of the first `num_items` items each bucket gives, `[B]` int64.

        Raises:
            ValueError: if `num_items` is not in 0 .. MAX_ITEMS.
        """
        if not 0 <= num_items <= MAX_ITEMS:
            raise ValueError(f"num_items={num_items}; allowed: 0 .. {MAX_ITEMS}")
        given = np.zeros(self.num_buckets, dtype=np.int64)
        if self._root < 0:
            given[~self._root] = num_items
            return given
        held = {self._root: num_items}
        for node in range(len(self._nodes) - 1, -1, -1):  # a node is made after its children
            left, right, left_weight, total = (int(value) for value in self._nodes[node])
            share = held[node] * left_weight // total
            for child, num in ((left, share), (right, held[node] - share)):
                if child < 0:
                    given[~child] = num
                else:
                    held[child] = num
        return given
