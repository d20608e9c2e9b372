"""Groups of a layout: a process that tries many keeps what it has; a wrong one is refused."""

import os
from collections.abc import Iterator

import pytest
import torch

from parallel import groups
from parallel.coordinates import EMBEDDING_GROUP, GROUP_AXES, group
from parallel.layout import Layout, LayoutError
from parallel.spawn import RankPool

LAYOUTS = (
    Layout(num_ranks=2),
    Layout(num_ranks=2, ep=2),
    Layout(num_ranks=2, pp=2),
    Layout(num_ranks=2, tp=2, ep=2),
)


@pytest.fixture
def groups_of_one_rank(one_rank: object) -> Iterator[None]:
    groups.start_groups(Layout())
    yield
    groups.stop_groups()


def test_trying_layouts_again_costs_neither_descriptors_nor_threads(two_ranks: RankPool) -> None:
    def resources() -> list[tuple[int, int]]:
        descriptors = two_ranks.run(os.listdir, "/proc/self/fd")
        threads = two_ranks.run(os.listdir, "/proc/self/task")
        return [(len(a), len(b)) for a, b in zip(descriptors, threads, strict=True)]

    for layout in LAYOUTS:
        two_ranks.run(groups.start_groups, layout)
    before = resources()
    for _ in range(5):
        for layout in LAYOUTS:
            two_ranks.run(groups.start_groups, layout)
    assert resources() == before


def test_ranks_know_their_places(two_ranks: RankPool) -> None:
    def places(layout: Layout, axis: str) -> list[int]:
        two_ranks.run(groups.start_groups, layout)
        return two_ranks.run(getattr(groups, axis))

    assert places(Layout(num_ranks=2), "data_rank") == [0, 1]
    assert places(Layout(num_ranks=2, pp=2), "data_rank") == [0, 0]
    assert two_ranks.run(groups.is_first_stage) == [True, False]
    assert two_ranks.run(groups.is_last_stage) == [False, True]
    assert two_ranks.run(groups.last_stage_rank) == [1, 1]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_real_groups_are_those_of_the_arithmetic(layout: Layout, two_ranks: RankPool) -> None:
    two_ranks.run(groups.start_groups, layout)
    made = two_ranks.run(groups.group_members)
    for rank, members in enumerate(made):
        assert set(members) == {*GROUP_AXES, EMBEDDING_GROUP}
        for name, ranks in members.items():
            assert ranks == group(rank, name=name, layout=layout), (rank, name)


@pytest.mark.usefixtures("groups_of_one_rank")
def test_one_rank_is_every_first_and_last() -> None:
    assert groups.is_first_stage()
    assert groups.is_last_stage()
    assert groups.data_rank() == 0
    assert torch.distributed.get_world_size(groups.data_context_group()) == 1


def test_a_layout_for_other_ranks_is_refused(one_rank: object) -> None:
    with pytest.raises(LayoutError, match=r"1 ranks are running: set layout\.num_ranks=1"):
        groups.start_groups(Layout(num_ranks=2, ep=2))
