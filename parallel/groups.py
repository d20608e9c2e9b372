# pyright: basic
# (megatron-core and torch.distributed are loosely typed; strict mode would check them, not us)
"""Which process groups does a layout need, and who starts and stops them?

The only file that touches megatron's parallel_state. Groups are cached by their ranks: megatron's
`destroy_model_parallel` only forgets its groups, and making them anew costs file descriptors and
threads each time (measured: +120 and +55 for each layout and rank), so a process that tries many
layouts keeps and reuses them.
"""

import datetime
import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core import parallel_state

from parallel.beats import LONGEST_WAIT_S
from parallel.device import Device, prepare
from parallel.layout import Layout, LayoutError
from parallel.recorder import record_collectives

TIMEOUT = datetime.timedelta(seconds=LONGEST_WAIT_S)
"""One time-out for every group; torch's new_group would give 30 minutes whatever the first group
has."""

_groups: dict[tuple[int, ...], Any] = {}
_cpu_groups: dict[str, Any] = {}
_DESTROYED_BY_MEGATRON = (
    "_DATA_PARALLEL_GROUP_GLOO",
    "_DATA_PARALLEL_GROUP_WITH_CP_GLOO",
    "_EXPERT_DATA_PARALLEL_GROUP_GLOO",
    "_INTRA_PARTIAL_EXPERT_DATA_PARALLEL_GROUP_GLOO",
)
"""The groups that destroy_model_parallel really destroys (parallel_state.py:2150-2223); on gloo
they are cached."""


def join_world(
    *, store: Any = None, rank: int | None = None, num_ranks: int | None = None
) -> Device:
    """Start torch.distributed for this process if it has not been started.

    Reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, as torchrun and
    parallel/spawn.py set them, unless a store is given.

    Returns:
        The device this rank computes on.

    Collective: all ranks of the run call it.
    """
    device = prepare()
    if not torch.distributed.is_initialized():
        record_collectives()
        device.claim(int(os.environ.get("LOCAL_RANK", "0")))
        torch.distributed.init_process_group(
            device.backend,
            store=store,
            rank=-1 if rank is None else rank,
            world_size=-1 if num_ranks is None else num_ranks,
            timeout=TIMEOUT,
        )
    return device


def leave_world() -> None:
    """Stop torch.distributed and forget every group; the last thing a rank does."""
    stop_groups()
    _groups.clear()
    _cpu_groups.clear()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def start_groups(layout: Layout) -> None:
    """Make `layout`'s groups the current ones, in place of any others.

    Collective: all ranks of the run call it with the same layout.

    Raises:
        LayoutError: if the layout is for another number of ranks than are running.
    """
    running = torch.distributed.get_world_size()
    if layout.num_ranks != running:
        raise LayoutError(
            f"{layout} given, but {running} ranks are running: set layout.num_ranks={running}"
        )
    stop_groups()
    with _cached_groups():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tp,
            pipeline_model_parallel_size=layout.pp,
            virtual_pipeline_model_parallel_size=layout.vp if layout.vp > 1 else None,
            context_parallel_size=layout.cp,
            expert_model_parallel_size=layout.ep,
            expert_tensor_parallel_size=layout.etp,
            distributed_timeout_minutes=int(TIMEOUT.total_seconds() // 60),
            create_gloo_process_groups=torch.distributed.get_backend() != "fake",
        )


def stop_groups() -> None:
    """Leave the current layout; its groups stay cached."""
    if not parallel_state.model_parallel_is_initialized():
        return
    if torch.distributed.get_backend() == "gloo":
        for name in _DESTROYED_BY_MEGATRON:
            setattr(parallel_state, name, None)
    parallel_state.destroy_model_parallel()


def cpu_group(purpose: str) -> Any:
    """Return the gloo group of all ranks that is kept for one purpose, on any device.

    Two threads must not share a group: their messages would meet. Made at the first call, which is
    collective: every rank makes its groups in the same order, from its main thread.

    Args:
        purpose: any word.
    """
    if purpose not in _cpu_groups:
        _cpu_groups[purpose] = torch.distributed.new_group(backend="gloo", timeout=TIMEOUT)
    return _cpu_groups[purpose]


@contextmanager
def _cached_groups() -> Iterator[None]:
    """Let parallel_state take groups from the cache on gloo, where all groups are alike.

    In an imagined world (parallel/imagined.py) let it make this rank's own groups only, as torch
    does, and number each world once: it takes most of the time of 1,536 ranks to do so 17 times.
    """
    takers = {"gloo": {"create_group": _from_cache}, "fake": _OF_IMAGINED_RANKS}
    exchanged = takers.get(torch.distributed.get_backend(), {})
    kept = {name: getattr(parallel_state, name) for name in exchanged}
    for name, taker in exchanged.items():
        setattr(parallel_state, name, functools.partial(taker, kept[name]))
    try:
        yield
    finally:
        for name, function in kept.items():
            setattr(parallel_state, name, function)


def _from_cache(create: Any, ranks: list[int] | None = None, *args: Any, **kwargs: Any) -> Any:
    key = tuple(ranks if ranks is not None else range(torch.distributed.get_world_size()))
    if key not in _groups:
        _groups[key] = create(ranks, *args, **kwargs)
    return _groups[key]


def _if_own(create: Any, ranks: list[int] | None = None, *args: Any, **kwargs: Any) -> Any:
    if ranks is not None and torch.distributed.get_rank() not in ranks:
        return torch.distributed.GroupMember.NON_GROUP_MEMBER
    return _from_cache(create, ranks, *args, **kwargs)


def _numbered_once(
    number: Any, num_ranks: int, sizes: list[int], mask: list[bool]
) -> list[list[int]]:
    found = _numbering(number, num_ranks, tuple(sizes), tuple(mask))
    return [list(ranks) for ranks in found]


@functools.cache
def _numbering(
    number: Any, num_ranks: int, sizes: tuple[int, ...], mask: tuple[bool, ...]
) -> list[list[int]]:
    return number(num_ranks, list(sizes), list(mask))


_OF_IMAGINED_RANKS = {
    "create_group": _if_own,
    "generate_masked_orthogonal_rank_groups": _numbered_once,
}


def is_first_stage() -> bool:
    """Return whether this rank holds the embedding."""
    return parallel_state.is_pipeline_first_stage(ignore_virtual=True)


def is_last_stage() -> bool:
    """Return whether this rank computes the loss."""
    return parallel_state.is_pipeline_last_stage(ignore_virtual=True)


def data_rank() -> int:
    """Return which data-parallel replica this rank belongs to, 0 <= rank < dp."""
    return int(parallel_state.get_data_parallel_rank())


def context_rank() -> int:
    """Return which part of each sequence this rank computes, 0 <= rank < cp."""
    return int(parallel_state.get_context_parallel_rank())


def stage_rank() -> int:
    """Return which stage of the pipeline this rank computes, 0 <= rank < pp."""
    return int(parallel_state.get_pipeline_model_parallel_rank())


def tensor_rank() -> int:
    """Return this rank's place on the tensor axis."""
    return int(parallel_state.get_tensor_model_parallel_rank())


def context_group() -> Any:
    """Return the group of the ranks that share this rank's sequences."""
    return parallel_state.get_context_parallel_group()


def data_group() -> Any:
    """Return the group of the replicas' ranks of this rank's place on all other axes."""
    return parallel_state.get_data_parallel_group()


def data_context_group() -> Any:
    """Return the group over which gradients and losses are summed (data x context)."""
    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def scale_group() -> Any:
    """Return the group over which FP8's largest values are taken (tensor x data x context)."""
    return parallel_state.get_amax_reduction_group(with_context_parallel=True)


def pipeline_group() -> Any:
    """Return this rank's pipeline group."""
    return parallel_state.get_pipeline_model_parallel_group()


def last_stage_rank() -> int:
    """Return the global rank of the last stage of this rank's pipeline."""
    return int(parallel_state.get_pipeline_model_parallel_last_rank())


def group_members() -> dict[str, tuple[int, ...]]:
    """Return the ranks of each of this rank's groups, by the names of parallel/coordinates.py.

    The embedding group is empty where this rank has none.
    """
    state: Any = parallel_state
    made = {
        "tp": state.get_tensor_model_parallel_group(),
        "cp": state.get_context_parallel_group(),
        "dp": state.get_data_parallel_group(),
        "pp": state.get_pipeline_model_parallel_group(),
        "tp_cp": state.get_tensor_and_context_parallel_group(),
        "tp_dp": state.get_tensor_and_data_parallel_group(),
        "dp_cp": state.get_data_parallel_group(with_context_parallel=True),
        "tp_dp_cp": state.get_tensor_and_data_parallel_group(with_context_parallel=True),
        "tp_pp": state.get_model_parallel_group(),
        "etp": state.get_expert_tensor_parallel_group(),
        "ep": state.get_expert_model_parallel_group(),
        "expert_dp": state.get_expert_data_parallel_group(),
        "etp_ep": state.get_expert_tensor_and_model_parallel_group(),
        "etp_ep_pp": state.get_expert_tensor_model_pipeline_parallel_group(),
        "embedding": state.get_embedding_group(check_initialized=False),
    }
    members = torch.distributed.get_process_group_ranks
    return {name: tuple(members(group)) if group else () for name, group in made.items()}
