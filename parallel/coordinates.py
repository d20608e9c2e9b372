"""Where does a rank stand on the two grids of a layout, and who shares each of its groups?

megatron-core numbers ranks by the order 'tp-cp-ep-dp-pp', the first axis fastest, on two grids:
attention and dense layers on tp x cp x dp x pp, routed experts on etp x ep x expert_dp x pp. Both
end in pp, so a rank has one stage. Integers only, no torch: the same arithmetic for 2 ranks and for
1,536. Source: megatron-core 0.16.1, parallel_state.py:447 (RankGenerator) and :562 (the order).
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from parallel.layout import Layout, LayoutError

ATTENTION_GRID = ("tp", "cp", "dp", "pp")
EXPERT_GRID = ("etp", "ep", "expert_dp", "pp")

GROUP_AXES: Mapping[str, tuple[str, ...]] = {
    "tp": ("tp",),
    "cp": ("cp",),
    "dp": ("dp",),
    "pp": ("pp",),
    "tp_cp": ("tp", "cp"),
    "tp_dp": ("tp", "dp"),
    "dp_cp": ("cp", "dp"),
    "tp_dp_cp": ("tp", "cp", "dp"),
    "tp_pp": ("tp", "pp"),
    "etp": ("etp",),
    "ep": ("ep",),
    "expert_dp": ("expert_dp",),
    "etp_ep": ("etp", "ep"),
    "etp_ep_pp": ("etp", "ep", "pp"),
}
"""Every group that megatron makes -> the axes along which its ranks differ. `dp_cp` sums gradients
and `expert_dp` those of experts; `etp_ep` exchanges tokens; `etp_ep_pp` and `tp_pp` hold one copy
of the model."""

EMBEDDING_GROUP = "embedding"
"""The one group that is no axis: first and last stage of a pipeline, which share the embedding."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Coordinates:
    """The place of a rank on both grids; each counts from 0 below the size of its axis."""

    tp: int
    cp: int
    dp: int
    etp: int
    ep: int
    expert_dp: int
    pp: int

    def __str__(self) -> str:
        """Return both places, as `tp0 cp0 dp17 | etp0 ep1 expert_dp2 | pp3`."""
        attention, experts = ATTENTION_GRID[:-1], EXPERT_GRID[:-1]
        words = [
            " ".join(f"{axis}{getattr(self, axis)}" for axis in axes)
            for axes in (attention, experts, ("pp",))
        ]
        return " | ".join(words)


def coordinates(rank: int, *, layout: Layout) -> Coordinates:
    """Return where `rank`, 0 <= rank < layout.num_ranks, stands.

    Raises:
        LayoutError: if the layout has no such rank.
    """
    if not 0 <= rank < layout.num_ranks:
        raise LayoutError(
            f"rank {rank} given, 0 to {layout.num_ranks - 1} are allowed on {layout}: change the"
            " rank or layout.num_ranks"
        )
    return Coordinates(**_place(rank, ATTENTION_GRID, layout) | _place(rank, EXPERT_GRID, layout))


def rank_on_attention_grid(*, tp: int, cp: int, dp: int, pp: int, layout: Layout) -> int:
    """Return the rank that stands at these coordinates of attention and dense layers."""
    return _rank({"tp": tp, "cp": cp, "dp": dp, "pp": pp}, layout)


def rank_on_expert_grid(*, etp: int, ep: int, expert_dp: int, pp: int, layout: Layout) -> int:
    """Return the rank that stands at these coordinates of the routed experts."""
    return _rank({"etp": etp, "ep": ep, "expert_dp": expert_dp, "pp": pp}, layout)


def group(rank: int, *, name: str, layout: Layout) -> tuple[int, ...]:
    """Return the ranks, rising, of `rank`'s group `name`; `rank` is among them.

    The embedding group has members on the first and the last stage only; on the stages between
    them it is empty.

    Args:
        rank: 0 <= rank < layout.num_ranks.
        name: a key of GROUP_AXES, or EMBEDDING_GROUP.
        layout: whose ranks.
    """
    if name == EMBEDDING_GROUP:
        pipeline = group(rank, name="pp", layout=layout)
        ends = tuple(dict.fromkeys((pipeline[0], pipeline[-1])))
        return ends if rank in ends else ()
    axes = GROUP_AXES[name]
    strides = _strides(_grid_of(axes), layout)
    place = coordinates(rank, layout=layout)
    origin = rank - sum(getattr(place, axis) * strides[axis] for axis in axes)
    steps = [range(0, _size(axis, layout) * strides[axis], strides[axis]) for axis in axes]
    return tuple(sorted(origin + sum(offsets) for offsets in itertools.product(*steps)))


def groups(name: str, *, layout: Layout) -> list[tuple[int, ...]]:
    """Return all groups `name` of a layout, by their first rank."""
    found: dict[tuple[int, ...], None] = {}
    seen: set[int] = set()
    for rank in range(layout.num_ranks):
        if rank not in seen:
            ranks = group(rank, name=name, layout=layout)
            seen.update(ranks)
            if ranks:
                found[ranks] = None
    return list(found)


def distinct_ranks(layout: Layout) -> list[int]:
    """Return the fewest ranks that together hold every part of the model.

    On each stage the first max(tp, etp * ep): they have every tensor coordinate and every
    coordinate of the experts, on the first replica of each.
    """
    stage = layout.num_ranks // layout.pp
    parts = max(layout.tp, layout.etp * layout.ep)
    return [first + part for first in range(0, layout.num_ranks, stage) for part in range(parts)]


def is_inside_nodes(name: str, *, gpus_per_node: int, layout: Layout) -> bool:
    """Return whether no group `name` reaches over the edge of a node of `gpus_per_node` ranks."""
    return all(
        ranks[0] // gpus_per_node == ranks[-1] // gpus_per_node
        for ranks in groups(name, layout=layout)
    )


def find_group_faults(layout: Layout) -> list[str]:
    """Return what is wrong with the groups of all ranks, one line each; empty if all is well.

    Both numberings must lead back to the rank, the two grids must agree on the stage, and the
    groups of a kind must have the size of their axes and hold every rank exactly once.
    """
    faults: list[str] = []
    stage_ranks = layout.num_ranks // layout.pp
    for rank in range(layout.num_ranks):
        place = coordinates(rank, layout=layout)
        back = {
            "attention": _rank({axis: getattr(place, axis) for axis in ATTENTION_GRID}, layout),
            "experts": _rank({axis: getattr(place, axis) for axis in EXPERT_GRID}, layout),
        }
        wrong = [f"{grid} lead to {found}" for grid, found in back.items() if found != rank]
        if place.pp != rank // stage_ranks:
            wrong.append(f"its stage is {rank // stage_ranks}")
        faults += [f"rank {rank} stands at {place}, but {words}" for words in wrong]
    for name, axes in GROUP_AXES.items():
        faults += _partition_faults(name, _sizes_product(axes, layout), layout)
    return faults


def _partition_faults(name: str, size: int, layout: Layout) -> list[str]:
    found = groups(name, layout=layout)
    members = sorted(rank for ranks in found for rank in ranks)
    faults = [
        f"{name} group {ranks} has {len(ranks)} ranks instead of {size}"
        for ranks in found
        if len(ranks) != size
    ]
    if members != list(range(layout.num_ranks)):
        faults.append(f"the {name} groups do not hold each of the {layout.num_ranks} ranks once")
    return faults


def _grid_of(axes: Sequence[str]) -> tuple[str, ...]:
    return ATTENTION_GRID if set(axes) <= set(ATTENTION_GRID) else EXPERT_GRID


def _size(axis: str, layout: Layout) -> int:
    return int(getattr(layout, axis))


def _sizes_product(axes: Sequence[str], layout: Layout) -> int:
    return math.prod(_size(axis, layout) for axis in axes)


def _strides(grid: Sequence[str], layout: Layout) -> dict[str, int]:
    """Return by how much the rank grows when a coordinate of `grid` grows by one."""
    return {axis: _sizes_product(grid[:idx], layout) for idx, axis in enumerate(grid)}


def _place(rank: int, grid: Sequence[str], layout: Layout) -> dict[str, int]:
    strides = _strides(grid, layout)
    return {axis: rank // strides[axis] % _size(axis, layout) for axis in grid}


def _rank(place: Mapping[str, int], layout: Layout) -> int:
    strides = _strides(_grid_of(list(place)), layout)
    return sum(place[axis] * strides[axis] for axis in place)
