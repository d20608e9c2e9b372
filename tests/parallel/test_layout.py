"""Sizes of the axes: arithmetic against a count of all ranks, and refusals that name keys."""

import itertools

import pytest

from parallel.layout import Layout, LayoutError

SIZES = (1, 2, 3, 4, 8)


def test_axes_and_replicas_count_every_rank_on_both_grids() -> None:
    num_legal = 0
    for num_ranks, tp, cp, pp, ep, etp in itertools.product((1, 2, 4, 6, 8, 24, 96), *[SIZES] * 5):
        try:
            layout = Layout(num_ranks=num_ranks, tp=tp, cp=cp, pp=pp, ep=ep, etp=etp)
        except LayoutError:
            fits = num_ranks % (tp * cp * pp) == 0 and num_ranks % (ep * etp * pp) == 0
            assert not fits
            continue
        num_legal += 1
        assert tp * cp * pp * layout.dp == num_ranks
        assert ep * etp * pp * layout.expert_dp == num_ranks
    assert num_legal > 1000


def test_the_reports_layout_has_the_replicas_of_the_report() -> None:
    layout = Layout(num_ranks=1536, pp=16, ep=8)
    assert (layout.dp, layout.expert_dp) == (96, 12)
    layout = Layout(num_ranks=1024, pp=16, ep=8, cp=4)
    assert (layout.dp, layout.expert_dp) == (16, 8)


def test_tensor_ranks_bring_sequence_parallelism() -> None:
    assert Layout(num_ranks=2, tp=2, ep=2).sequence_parallel
    assert not Layout(num_ranks=2, ep=2).sequence_parallel


def test_a_layout_shows_every_factor() -> None:
    layout = Layout(num_ranks=32, tp=2, pp=4, vp=2, ep=4)
    assert str(layout) == "tp2 cp1 pp4 vp2 ep4 etp1 dp4 (32 ranks)"


@pytest.mark.parametrize("axis", ["num_ranks", "tp", "cp", "pp", "vp", "ep", "etp"])
@pytest.mark.parametrize("size", [0, -1])
def test_a_size_below_one_is_refused_by_key(axis: str, size: int) -> None:
    with pytest.raises(LayoutError, match=rf"layout\.{axis}={size} given, at least 1"):
        Layout(**{axis: size})


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        (
            {"num_ranks": 8, "tp": 3, "etp": 2},
            ["8 ranks", "layout.tp=3 * layout.cp=1 * layout.pp=1 = 3", "WORLD_SIZE"],
        ),
        ({"num_ranks": 8, "pp": 16}, ["8 ranks", "layout.pp=16 = 16 must divide them"]),
        ({"num_ranks": 8, "cp": 5}, ["8 ranks", "layout.cp=5 * layout.pp=1 = 5"]),
        (
            {"num_ranks": 8, "ep": 8, "pp": 2},
            ["8 ranks", "layout.ep=8 * layout.etp=1 * layout.pp=2 = 16"],
        ),
        ({"num_ranks": 8, "etp": 3}, ["8 ranks", "layout.etp=3 * layout.pp=1 = 3"]),
        ({"num_ranks": 2, "vp": 2}, ["layout.vp=2 needs layout.pp of at least 2", "tp1 cp1 pp1"]),
    ],
)
def test_a_refusal_names_keys_and_factors(sizes: dict[str, int], said: list[str]) -> None:
    with pytest.raises(LayoutError) as refusal:
        Layout(**sizes)
    for words in said:
        assert words in str(refusal.value)
