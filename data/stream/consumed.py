"""Which windows has a run consumed, in one number?

Each slot of a batch has a hash of its place and of the window in it; the sum of the hashes modulo
2**64 is the same whatever ranks read the slots, in whatever order, and another one if a window was
read twice, left out, or read in another batch. A run writes the sum of its steps into its records,
and the order says what it must be.

C slots.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from data.stream.ledger import Ledger
from data.stream.order import Addresses, Order
from data.stream.shuffle import splitmix64

MASK = 2**64 - 1


def windows_digest(batch: int, slots: ArrayLike, addresses: Addresses) -> int:
    """Return the digest of some slots of a batch, below 2**64.

    Args:
        batch: its number.
        slots: `[C]` integers.
        addresses: `[C]`, what stands there.
    """
    mixed = np.full(len(addresses.bucket), batch, dtype=np.uint64)
    for part in (slots, addresses.bucket, addresses.window, addresses.epoch):
        mixed = splitmix64(mixed) + np.asarray(part).astype(np.uint64)
    return int(splitmix64(mixed).sum(dtype=np.uint64))


def steps_digest(order: Order, ledger: Ledger, *, first_step: int, last_step: int) -> int:
    """Return the digest of all slots of steps first_step .. last_step - 1, below 2**64.

    Args:
        order: of the ledger.
        ledger: of the run.
        first_step: >= 0.
        last_step: not included.
    """
    total = 0
    for step in range(first_step, last_step):
        batch = ledger.batch_of(step)
        slots: NDArray[np.int64] = np.arange(order.global_sequences(batch))
        total += windows_digest(batch, slots, order.addresses(batch, slots))
    return total & MASK
