"""What does this replica read in step number n?

A pure function of the step, the ledger and the seed: `batch_of` names the batch, the order its
windows, the replica its slots. Nothing is remembered between steps, so resuming is knowing one
integer, and any number of replicas cut the batches among themselves without talking.

One thread reads ahead, at most `depth` batches, into memory that is used again; it is a daemon, and
whoever waits for it waits for `timeout_s` at most: a read from a file system that has gone cannot
be interrupted.

Every window that was read goes into a digest; added up over replicas and steps it says which
windows a run has consumed, whatever its layout was (`consumed.py`).

C slots of this replica, S inputs of a window.
"""

import queue
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data.indexed.closing import Closing
from data.indexed.dataset import Dataset
from data.indexed.format import DataError
from data.stream.consumed import windows_digest
from data.stream.damage import DamageRule, OnDamage
from data.stream.ledger import Entry, Ledger
from data.stream.order import Addresses
from data.stream.slots import local_slots, micro_sequences
from data.stream.windows import Windows

Allocate = Callable[[tuple[int, int]], NDArray[np.int32]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """Which slots of a batch a replica reads."""

    replicas: int
    """Data-parallel size."""
    replica: int
    """Which of them, from 0."""
    micro_batch_tokens: int
    """Tokens of one forward pass, see `micro_sequences` in slots.py."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """How a run reads.

    Raises:
        ValueError: if a number is out of range.
    """

    depth: int = 2
    """Batches read ahead."""
    timeout_s: float = 300.0
    """How long a step waits for its windows before the run stops; less than the ten minutes after
    which the other ranks give up waiting for this one."""
    on_damage: OnDamage = "stop"
    """What becomes of a window that is not what was written: the run stops, or the next window of
    its bucket takes its place, then and ever after, by an entry of the ledger."""
    max_replaced: int = 100
    """Replaced windows at which the run stops all the same: a shard is bad, not a window."""

    def __post_init__(self) -> None:
        if self.depth < 0 or not self.timeout_s > 0 or self.max_replaced < 0:
            raise ValueError(
                f"data.reading: depth={self.depth}, timeout_s={self.timeout_s}, max_replaced="
                f"{self.max_replaced} given; 0 or more, above 0, and 0 or more are allowed"
            )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ReplicaBatch:
    """This replica's part of a batch, micro-batch by micro-batch.

    Attributes:
        batch: its number.
        addresses: `[C]`, where its windows are.
        windows: the same windows.
        digest: of the windows read, below 2**64.
    """

    batch: int
    addresses: Addresses
    windows: Windows
    digest: int


class BatchReader(Closing):
    """Reads a replica's part of one step after the other, ahead of whoever asks."""

    def __init__(
        self,
        dataset: Dataset,
        ledger: Ledger,
        *,
        seed: int,
        share: Share,
        reading: Reading,
        allocate: Allocate | None = None,
    ) -> None:
        """Start the thread that reads.

        Args:
            dataset: its buckets are those of the ledger; closed by the caller, after this.
            ledger: of the run.
            seed: of the run.
            share: which slots are read.
            reading: how far ahead, and for how long.
            allocate: makes an int32 array of a shape, for instance of pinned memory; None: numpy.

        Raises:
            DataError: if the dataset is not the ledger's.
        """
        require_dataset(dataset, ledger)
        self._dataset = dataset
        self._ledger = ledger
        self._order = ledger.order(seed=seed)
        self._timetable = ledger.timetable()
        self._num_steps = ledger.num_steps
        self._damage = DamageRule(
            dataset,
            ledger,
            on_damage=reading.on_damage,
            max_replaced=reading.max_replaced,
        )
        self._share = share
        self._reading = reading
        self._allocate = allocate or _new_memory
        self._free: dict[tuple[int, int], list[NDArray[np.int32]]] = {}
        self._lent: NDArray[np.int32] | None = None
        self._wanted: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._found: queue.SimpleQueue[tuple[int, ReplicaBatch | Exception]] = queue.SimpleQueue()
        self._next = 0  # the next step that was not yet asked of the thread
        self._asked: list[int] = []
        # the thread does not keep the reader alive: one that nobody closed ends with its owner
        places = (weakref.ref(self), self._wanted, self._found)
        threading.Thread(target=_read_ahead, args=places, daemon=True, name="read-ahead").start()

    def __del__(self) -> None:
        """Let the thread end if nobody did."""
        if hasattr(self, "_wanted"):
            self.close()

    def close(self) -> None:
        """Let the thread end; closing twice is allowed."""
        self._wanted.put(None)

    @property
    def new_damage(self) -> tuple[Entry, ...]:
        """Entries for the ledger: windows that were found damaged since it was made."""
        return tuple(self._damage.found)

    def read(self, step: int) -> ReplicaBatch:
        """Return what this replica reads in a step; its memory is used again by the next call.

        Args:
            step: optimizer steps before it, 0 <= step < the ledger's num_steps.

        Raises:
            ValueError: if there is no such step, or the replicas do not divide its batch.
            DataError: if a window is damaged, or could not be read in time.
        """
        if not 0 <= step < self._num_steps:
            raise ValueError(f"step {step}; allowed: 0 .. {self._num_steps - 1}")
        self._take_back()
        if step not in self._asked:
            self._drop()
            self._next = step
        while self._next < min(step + 1 + self._reading.depth, self._num_steps):
            self._asked.append(self._next)
            self._wanted.put(self._next)
            self._next += 1
        while True:
            found, batch = self._wait(step)
            self._asked.remove(found)
            if isinstance(batch, Exception):
                if found == step:
                    raise batch
                continue
            if found == step:
                self._lent = batch.windows.tokens
                return batch
            self._give_back(batch.windows.tokens)

    def _wait(self, step: int) -> tuple[int, ReplicaBatch | Exception]:
        try:
            return self._found.get(timeout=self._reading.timeout_s)
        except queue.Empty as error:
            raise DataError(
                f"{self._dataset.manifest.path}: the windows of step {step} were not there after"
                f" {self._reading.timeout_s:g} s (data.reading.timeout_s); the file system of the"
                " dataset is slow or gone"
            ) from error

    def _drop(self) -> None:
        """Take what was asked for and is no longer wanted."""
        while self._asked:
            found, batch = self._wait(self._asked[0])
            self._asked.remove(found)
            if not isinstance(batch, Exception):
                self._give_back(batch.windows.tokens)

    def read_now(self, step: int) -> ReplicaBatch:
        """Return what this replica reads in a step, in the caller's thread; as `read`."""
        batch = self._ledger.batch_of(step)
        segment = self._timetable.segment_at(batch)
        ranges = local_slots(
            segment.global_sequences,
            micro_sequences=micro_sequences(
                self._share.micro_batch_tokens, window_tokens=segment.window_tokens
            ),
            dp=self._share.replicas,
            data_rank=self._share.replica,
        )
        slots = np.concatenate([np.arange(part.start, part.stop) for part in ranges])
        addresses = self._order.addresses(batch, slots)
        windows = self._damage.read(
            batch,
            addresses,
            tokens=self._memory((len(slots), segment.window_tokens + 1)),
        )
        return ReplicaBatch(
            batch=batch,
            addresses=addresses,
            windows=windows,
            digest=windows_digest(batch, slots, addresses),
        )

    def _memory(self, shape: tuple[int, int]) -> NDArray[np.int32]:
        free = self._free.get(shape)
        return free.pop() if free else self._allocate(shape)

    def _give_back(self, memory: NDArray[np.int32]) -> None:
        shape = (memory.shape[0], memory.shape[1])
        if shape not in self._free:
            self._free.clear()  # another stage: what is of another shape is not wanted again
        self._free.setdefault(shape, []).append(memory)

    def _take_back(self) -> None:
        if self._lent is not None:
            self._give_back(self._lent)
            self._lent = None


def _read_ahead(
    owner: weakref.ref[BatchReader],
    wanted: queue.SimpleQueue[int | None],
    found: queue.SimpleQueue[tuple[int, ReplicaBatch | Exception]],
) -> None:
    while (step := wanted.get()) is not None:
        if (reader := owner()) is None:
            return
        try:
            found.put((step, reader.read_now(step)))
        except Exception as error:  # raised again by whoever waits for the step
            found.put((step, error))
        del reader


def require_dataset(dataset: Dataset, ledger: Ledger) -> None:
    """Refuse a dataset that is not the one of a ledger's last plan.

    Raises:
        DataError: names both digests.
    """
    expected = ledger.last_plan.dataset
    if dataset.digest.hex() != expected:
        raise DataError(
            f"{dataset.manifest.path}: the dataset has the digest {dataset.digest.hex()[:16]}, the"
            f" run reads {expected[:16]}: point data.corpus at the corpus the run began with, or"
            " go on with this one, to which text was added, by change.reason"
        )


def _new_memory(shape: tuple[int, int]) -> NDArray[np.int32]:
    return np.empty(shape, dtype=np.int32)
