# pyright: basic
# (torch.distributed is loosely typed; strict mode would check it, not us)
"""What has this rank entered, is it waiting, and how long has it waited so far?

Torch's flight recorder keeps the last collectives of every group, on gloo as on NCCL; it is read
only when something is wrong (measured: 20 ms to write 1,000 of them as text, and 50 ms to parse
them). Sends and receives are not in it on gloo. Progress is asked of the groups themselves, which
count what they start: some microseconds a beat.

Waiting is measured in one place, `Work.wait`, through which every collective of Python goes,
megatron's included. On gloo the host stands there until the collective is done. On NCCL it does
not: there the time would have to come from events around the collectives, which is not built.
"""

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._C import _distributed_c10d as c10d
from torch.distributed import distributed_c10d

from parallel.entered import Entered

_BUFFER = "TORCH_FR_BUFFER_SIZE"
_C10D: Any = c10d
_NUM_KEPT = 1000
"""Collectives that torch keeps on each rank; some steps of a large model."""
WAIT_KINDS = ("all_to_all", "pipeline", "collective")
"""What is waited for: an exchange of tokens, another stage (send or receive), all else."""
_KIND_OF_OP = {10: "all_to_all", 11: "all_to_all", 12: "pipeline", 13: "pipeline", 14: "pipeline"}
"""By c10d::OpType (Work.hpp): ALLTOALL_BASE, ALLTOALL, SEND, RECV, RECVANYSOURCE."""


def record_collectives() -> None:
    """Let torch keep the last collectives; before the first group is made, or it has no effect."""
    os.environ.setdefault(_BUFFER, str(_NUM_KEPT))


def entered_collectives() -> tuple[Entered, ...]:
    """Return the last collectives that this rank has entered, oldest first."""
    # of groups on an accelerator torch keeps a book of its own
    is_gloo = torch.distributed.get_backend() == "gloo"
    dump = _C10D._dump_fr_trace_json if is_gloo else _C10D._dump_nccl_trace_json
    entries = [entry for entry in json.loads(dump()).get("entries", []) if not entry["is_p2p"]]
    return tuple(
        Entered(
            group=str(entry["process_group"][0]),
            seq=entry["collective_seq_id"],
            op=entry["profiling_name"].partition(":")[2],
            sizes=tuple(tuple(size) for size in entry["input_sizes"]),
            dtypes=tuple(entry["input_dtypes"]),
            finished=bool(entry["retired"]) or entry["state"] == "completed",
        )
        for entry in sorted(entries, key=lambda entry: entry["record_id"])
    )


def host_waits() -> bool:
    """Return whether the host stands in `Work.wait` until a collective is done: on gloo only."""
    return torch.distributed.get_backend() == "gloo"


def group_ranks() -> dict[str, tuple[int, ...]]:
    """Return the ranks of each group of several ranks that this rank is in, by torch's name."""
    world: Any = distributed_c10d._world
    ranks = {name: tuple(world.pg_group_ranks[pg]) for pg, name in list(world.pg_names.items())}
    return {name: members for name, members in ranks.items() if len(members) > 1}


def num_entered() -> int:
    """Return how many collectives, sends and receives this rank has started so far."""
    world: Any = distributed_c10d._world
    return sum(pg._get_sequence_number_for_group() for pg in list(world.pg_names))


def timeouts_s() -> dict[str, float]:
    """Return how long each group of this rank waits, in seconds, by torch's name."""
    world: Any = distributed_c10d._world
    return {
        name: pg._get_backend(device).options._timeout.total_seconds()
        for pg, name in list(world.pg_names.items())
        for device in pg._device_types
    }


class Waits:
    """Time that this process has stood in `Work.wait`."""

    def __init__(self) -> None:
        """Begin at 0."""
        self.by_kind_s: dict[str, float] = dict.fromkeys(WAIT_KINDS, 0.0)
        """Seconds, over all threads."""
        self._since_s: dict[int, float] = {}

    @property
    def total_s(self) -> float:
        """Seconds of all kinds, over all threads."""
        return sum(self.by_kind_s.values())

    def waiting(self) -> frozenset[int]:
        """Return the threads that stand in a wait now, by their identifiers."""
        return frozenset(self._since_s.copy())

    def _enter(self) -> None:
        self._since_s[threading.get_ident()] = time.perf_counter()

    def _leave(self, work: Any) -> None:
        waited_s = time.perf_counter() - self._since_s.pop(threading.get_ident())
        self.by_kind_s[_KIND_OF_OP.get(work._get_op_type(), "collective")] += waited_s


@contextmanager
def measured_waits() -> Iterator[Waits]:
    """Yield what counts the time in `Work.wait` until it is left; one at a time."""
    waits, work_class = Waits(), _C10D.Work
    wait = work_class.wait

    def timed_wait(work: Any, *args: Any, **kwargs: Any) -> Any:
        waits._enter()
        try:
            return wait(work, *args, **kwargs)
        finally:
            waits._leave(work)

    work_class.wait = timed_wait
    try:
        yield waits
    finally:
        work_class.wait = wait


def own_store() -> Any:
    """Return a connection of its own to the store that the ranks met in."""
    store: Any = distributed_c10d._get_default_store()
    return store.clone()
