"""Does the cover of options really have every pair that can be?"""

import itertools

import pytest

from pretrain.training.cover import LAYOUTS, OPTIONS, Combination, pairwise_cover

LAYOUT_OPTION = {"layout": ["1 1 1", "1 1 2"]}


def is_legal(combination: Combination) -> bool:
    return combination["layout"].endswith("2") or combination["schedule"] == "1f1b"


def test_every_legal_pair_of_values_meets_in_a_case() -> None:
    options = {**LAYOUT_OPTION, **OPTIONS}
    cover = pairwise_cover(options, is_legal=is_legal)
    assert all(is_legal(case) for case in cover)
    for first, second in itertools.combinations(options, 2):
        pairs = set(itertools.product(options[first], options[second]))
        if (first, second) == ("layout", "schedule"):
            pairs -= {("1 1 1", "interleaved")}
        assert {(case[first], case[second]) for case in cover} == pairs
    assert cover == pairwise_cover(options, is_legal=is_legal)
    assert len(cover) <= 15


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_the_layouts_cut_every_axis_and_have_replicas_and_stages(num_ranks: int) -> None:
    layouts = LAYOUTS[num_ranks]
    assert all(max(sizes) > 1 for sizes in zip(*layouts, strict=True))
    assert any(num_ranks > tp * cp * pp for tp, cp, pp, _, _ in layouts)
