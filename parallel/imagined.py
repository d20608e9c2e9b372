# pyright: basic
# (torch.distributed and its fake process groups are loosely typed)
"""How does one process stand in for any rank of a large world, without the others?

torch's fake process groups have ranks and sizes and exchange nothing, so megatron-core makes the
groups of rank 777 of 1,536, and builds that rank's modules, in a process of its own on a laptop.
Nothing may be computed in such a world: every collective would leave its output as it was.
"""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch.testing._internal.distributed.fake_pg import FakeStore

from parallel import groups
from parallel.coordinates import EMBEDDING_GROUP, GROUP_AXES, coordinates, group
from parallel.device import Device, prepare
from parallel.layout import Layout


@contextmanager
def imagined_rank(rank: int, *, layout: Layout) -> Iterator[Device]:
    """Let this process be `rank` of `layout` for the time of the block, its groups started.

    Raises:
        RuntimeError: if this process is a rank of a real world.
    """
    if torch.distributed.is_initialized():
        raise RuntimeError("this process is a rank already: imagine ranks in one that is none")
    coordinates(rank, layout=layout)
    device = prepare()
    excepthook = sys.excepthook  # torch puts the rank before each line, once more for each world
    torch.distributed.init_process_group(
        "fake", store=FakeStore(), rank=rank, world_size=layout.num_ranks
    )
    try:
        groups.start_groups(layout)
        yield device
    finally:
        groups.leave_world()
        sys.excepthook = excepthook


def find_group_differences(ranks: Iterable[int], *, layout: Layout) -> list[str]:
    """Return where the groups that megatron makes for `ranks` are not those of the arithmetic.

    One line each, which names rank and group. Each rank is imagined in turn.

    Raises:
        RuntimeError: if this process is a rank of a real world.
    """
    found: list[str] = []
    for rank in ranks:
        with imagined_rank(rank, layout=layout):
            made = groups.group_members()
        for name in (*GROUP_AXES, EMBEDDING_GROUP):
            expected = group(rank, name=name, layout=layout)
            if made[name] != expected:
                found.append(
                    f"rank {rank}: megatron's {name} group is {made[name]}, by the layout it is"
                    f" {expected}"
                )
    return found
