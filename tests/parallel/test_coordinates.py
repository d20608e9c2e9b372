"""Ranks, coordinates and groups: against megatron's RankGenerator and its parallel_state.

parallel_state needs a world of its own, so it runs in a child process with fake process groups.
"""

import itertools
import random
from concurrent.futures import ProcessPoolExecutor

import pytest
from megatron.core.parallel_state import RankGenerator

from parallel.coordinates import (
    GROUP_AXES,
    Coordinates,
    coordinates,
    distinct_ranks,
    find_group_faults,
    group,
    groups,
    is_inside_nodes,
    rank_on_attention_grid,
    rank_on_expert_grid,
)
from parallel.imagined import find_group_differences
from parallel.layout import Layout, LayoutError

ORDER = "tp-cp-ep-dp-pp"  # the default of initialize_model_parallel
AXES = ("tp", "cp", "pp", "ep", "etp")
CLUSTERS = [
    Layout(num_ranks=num_ranks, pp=16, ep=8, cp=cp)
    for num_ranks in (1536, 1024)
    for cp in (1, 4, 8)
]


def legal_layouts(num_ranks: int) -> list[Layout]:
    """Return every layout of `num_ranks` ranks, one chunk a stage."""
    divisors = [size for size in range(1, num_ranks + 1) if num_ranks % size == 0]
    found: list[Layout] = []
    for sizes in itertools.product(divisors, repeat=len(AXES)):
        try:
            found.append(Layout(num_ranks=num_ranks, **dict(zip(AXES, sizes, strict=True))))
        except LayoutError:
            continue
    return found


def rank_generators(layout: Layout) -> tuple[RankGenerator, RankGenerator]:
    """Return megatron's numbering of both grids, as initialize_model_parallel makes it."""
    attention = RankGenerator(
        tp=layout.tp, ep=1, dp=layout.dp, pp=layout.pp, cp=layout.cp, order=ORDER
    )
    experts = RankGenerator(
        tp=layout.etp, ep=layout.ep, dp=layout.expert_dp, pp=layout.pp, cp=1, order=ORDER
    )
    return attention, experts


def megatron_groups(name: str, layout: Layout) -> list[tuple[int, ...]]:
    """Return all groups `name` of megatron's numbering, by their first rank."""
    attention, experts = rank_generators(layout)
    axes = GROUP_AXES[name]
    generator = attention if set(axes) <= {"tp", "cp", "dp", "pp"} else experts
    token = "-".join({"etp": "tp", "expert_dp": "dp"}.get(axis, axis) for axis in axes)
    return sorted(tuple(ranks) for ranks in generator.get_ranks(token))


def ids(layout: Layout) -> str:
    return str(layout).split(" (")[0].replace(" ", "-") + f"-{layout.num_ranks}"


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 6, 8, 12, 16])
def test_every_group_of_every_layout_is_megatrons(num_ranks: int) -> None:
    layouts = legal_layouts(num_ranks)
    for layout, name in itertools.product(layouts, GROUP_AXES):
        assert groups(name, layout=layout) == megatron_groups(name, layout), (name, layout)
    if num_ranks == 8:
        assert len(layouts) == 146


@pytest.mark.parametrize("layout", CLUSTERS, ids=ids)
def test_every_group_of_every_rank_of_a_cluster_is_megatrons(layout: Layout) -> None:
    for name in GROUP_AXES:
        assert groups(name, layout=layout) == megatron_groups(name, layout), name


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_every_rank_of_small_worlds_gets_its_groups_from_parallel_state(
    num_ranks: int, no_rank: ProcessPoolExecutor
) -> None:
    for layout in legal_layouts(num_ranks):
        found = no_rank.submit(find_group_differences, range(num_ranks), layout=layout)
        assert found.result() == []


def test_every_rank_of_larger_worlds_gets_its_groups_from_parallel_state(
    no_rank: ProcessPoolExecutor,
) -> None:
    layouts = [*legal_layouts(8), *legal_layouts(12)[::8], *legal_layouts(24)[::32]]
    for layout in layouts:
        found = no_rank.submit(find_group_differences, range(layout.num_ranks), layout=layout)
        assert found.result() == []
    assert len(layouts) > 150


@pytest.mark.parametrize("layout", CLUSTERS, ids=ids)
def test_ranks_of_a_cluster_get_their_groups_from_parallel_state(
    layout: Layout, no_rank: ProcessPoolExecutor
) -> None:
    sample = random.Random(layout.cp).sample(range(layout.num_ranks), 64)
    assert no_rank.submit(find_group_differences, sample, layout=layout).result() == []


@pytest.mark.slow
def test_every_rank_of_1536_gets_its_groups_from_parallel_state(
    no_rank: ProcessPoolExecutor,
) -> None:
    layout = Layout(num_ranks=1536, tp=2, cp=4, pp=16, ep=8, etp=2)  # every axis at least twice
    found = no_rank.submit(find_group_differences, range(layout.num_ranks), layout=layout)
    assert found.result() == []


def test_coordinates_lead_back_to_the_rank_and_groups_hold_each_rank_once() -> None:
    for layout in [*legal_layouts(12), *CLUSTERS]:
        assert find_group_faults(layout) == []


def test_a_rank_of_the_reports_run_stands_where_counting_by_hand_puts_it() -> None:
    layout = Layout(num_ranks=1536, pp=16, ep=8, cp=4)
    # 96 ranks a stage: 777 = 8 * 96 + 9; 9 = 2 * 4 + 1 (cp 1, dp 2) = 1 * 8 + 1 (ep 1, replica 1)
    place = Coordinates(tp=0, cp=1, dp=2, etp=0, ep=1, expert_dp=1, pp=8)
    assert coordinates(777, layout=layout) == place
    assert str(place) == "tp0 cp1 dp2 | etp0 ep1 expert_dp1 | pp8"
    assert rank_on_attention_grid(tp=0, cp=1, dp=2, pp=8, layout=layout) == 777
    assert rank_on_expert_grid(etp=0, ep=1, expert_dp=1, pp=8, layout=layout) == 777
    assert group(777, name="ep", layout=layout) == tuple(range(776, 784))
    assert group(777, name="pp", layout=layout) == tuple(range(9, 1536, 96))
    assert group(9, name="embedding", layout=layout) == (9, 9 + 15 * 96)
    assert group(777, name="embedding", layout=layout) == ()


def test_experts_of_the_report_exchange_tokens_inside_a_node() -> None:
    for layout in CLUSTERS:
        assert is_inside_nodes("ep", gpus_per_node=8, layout=layout)
        assert not is_inside_nodes("dp", gpus_per_node=8, layout=layout)
    wide = Layout(num_ranks=1024, pp=8, ep=32)  # the report's first layout
    assert not is_inside_nodes("ep", gpus_per_node=8, layout=wide)


def test_distinct_ranks_have_every_coordinate_that_cuts_a_weight() -> None:
    for layout in [*legal_layouts(8), *legal_layouts(12), *CLUSTERS]:
        places = [coordinates(rank, layout=layout) for rank in distinct_ranks(layout)]
        dense = {(p.tp, p.pp) for p in places if p.dp == p.cp == 0}
        experts = {(p.etp, p.ep, p.pp) for p in places if p.expert_dp == 0}
        assert len(dense) == layout.tp * layout.pp
        assert len(experts) == layout.etp * layout.ep * layout.pp
        assert len(places) == layout.pp * max(layout.tp, layout.etp * layout.ep)


@pytest.mark.parametrize("rank", [-1, 8])
def test_a_rank_that_the_layout_lacks_is_refused(rank: int) -> None:
    with pytest.raises(LayoutError, match=rf"rank {rank} given, 0 to 7 are allowed"):
        coordinates(rank, layout=Layout(num_ranks=8))


def test_another_numbering_of_ranks_is_found_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("parallel.coordinates.ATTENTION_GRID", ("tp", "dp", "cp", "pp"))
    layout = Layout(num_ranks=8, cp=2, pp=2)
    assert groups("cp", layout=layout) != megatron_groups("cp", layout)


def test_a_numbering_that_two_ranks_share_is_found_and_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("parallel.coordinates.EXPERT_GRID", ("etp", "ep", "pp", "expert_dp"))
    faults = find_group_faults(Layout(num_ranks=8, ep=2, pp=2))
    assert any("but its stage is 1" in fault for fault in faults), faults
