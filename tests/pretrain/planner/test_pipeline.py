"""Times of a pipeline: closed forms of equal stages, two stages by hand, the full simulation."""

import random
import time
from itertools import pairwise

import pytest

from pretrain.planner.pipeline import (
    PassTimes,
    closed_form_seconds,
    pipeline_seconds,
    simulate_pipeline,
)
from pretrain.planner.schedule_order import PipelineShape


def equal(pp: int, vp: int, *, hop_s: float = 0.0) -> PassTimes:
    return PassTimes(forward_s=((1.0,) * vp,) * pp, backward_s=((2.0,) * vp,) * pp, hop_s=hop_s)


def uneven(pp: int, vp: int, *, seed: int, hop_s: float = 0.05) -> PassTimes:
    draw = random.Random(seed)
    rows = [tuple(draw.uniform(0.5, 1.5) for _ in range(vp)) for _ in range(2 * pp)]
    return PassTimes(forward_s=tuple(rows[:pp]), backward_s=tuple(rows[pp:]), hop_s=hop_s)


@pytest.mark.parametrize("overlaps", [False, True])
@pytest.mark.parametrize(
    ("pp", "vp", "m"), [(1, 1, 7), (2, 1, 4), (4, 1, 16), (16, 1, 160), (4, 2, 16), (8, 4, 32)]
)
def test_equal_stages_without_hops_take_the_closed_form(
    pp: int, vp: int, m: int, overlaps: bool
) -> None:
    shape = PipelineShape(num_stages=pp, num_chunks=vp, num_micro_batches=m, overlaps_hops=overlaps)
    timeline = simulate_pipeline(shape, times=equal(pp, vp))
    assert timeline.seconds == (vp * m + pp - 1) * 3
    assert timeline.seconds == closed_form_seconds(shape, forward_s=1, backward_s=2)
    assert timeline.bubble_shares == pytest.approx([(pp - 1) / (vp * m + pp - 1)] * pp)


def test_two_uneven_stages_by_hand() -> None:
    shape = PipelineShape(num_stages=2, num_micro_batches=2)
    times = PassTimes(forward_s=((1.0,), (3.0,)), backward_s=((2.0,), (4.0,)), hop_s=0.5)
    timeline = simulate_pipeline(shape, times=times)
    # stage 0: F0 0-1, sent until 1.5; F1 1.5-2.5, sent in one exchange with the gradient of 0
    # stage 1: F0 1.5-4.5, B0 4.5-8.5, exchange until 9; F1 9-12, B1 12-16, sent until 16.5
    assert timeline.starts_s == ((0.0, 1.5, 9.0, 16.5), (1.5, 4.5, 9.0, 12.0))
    assert timeline.ends_s == ((1.0, 2.5, 11.0, 18.5), (4.5, 8.5, 12.0, 16.0))
    assert timeline.seconds == 18.5
    assert timeline.bubble_shares == pytest.approx((1 - 6 / 18.5, 1 - 14 / 18.5))
    assert timeline.peak_micro_batches == (2, 1)


def test_a_slow_stage_sets_the_pace() -> None:
    shape = PipelineShape(num_stages=4, num_micro_batches=64)
    times = PassTimes(
        forward_s=((1.0,), (1.0,), (1.5,), (1.0,)), backward_s=((2.0,), (2.0,), (3.0,), (2.0,))
    )
    # 2 s before and 4 s after it; its second forward pass ends at 5.0 s, and the last stage, which
    # gets the first at 3.5 s, has a gradient for it at 6.5 s: it waits for 1.5 s and never again
    around_s = 2 * 1.0 + 2 * 2.0 + 1.5
    assert simulate_pipeline(shape, times=times).seconds == pytest.approx(64 * 4.5 + around_s)


def test_overlapped_hops_cost_less_and_never_nothing() -> None:
    waited = PipelineShape(num_stages=8, num_chunks=2, num_micro_batches=64)
    hidden = PipelineShape(num_stages=8, num_chunks=2, num_micro_batches=64, overlaps_hops=True)
    free_s = simulate_pipeline(waited, times=equal(8, 2)).seconds
    waited_s = simulate_pipeline(waited, times=equal(8, 2, hop_s=0.1)).seconds
    hidden_s = simulate_pipeline(hidden, times=equal(8, 2, hop_s=0.1)).seconds
    # every 1F1B round of a stage waits for an exchange: 128 rounds
    assert waited_s - free_s > 128 * 0.1
    assert 0 < hidden_s - free_s < 0.4 * (waited_s - free_s)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("pp", "vp", "overlaps"), [(1, 1, False), (6, 1, False), (6, 3, False), (6, 3, True)]
)
def test_passes_come_after_what_they_need_and_never_two_at_once(
    pp: int, vp: int, overlaps: bool, seed: int
) -> None:
    shape = PipelineShape(
        num_stages=pp, num_chunks=vp, num_micro_batches=18, overlaps_hops=overlaps
    )
    timeline = simulate_pipeline(shape, times=uneven(pp, vp, seed=seed))
    when = {(stage, *one): (start, end) for stage, one, start, end in timeline.rows()}
    assert len(when) == 2 * pp * vp * 18
    places = [(stage, chunk) for chunk in range(vp) for stage in range(pp)]
    hop_s = 0.05 * (1 - 1e-9)
    for mb in range(18):
        forward = [when[stage, True, chunk, mb] for stage, chunk in places]
        backward = [when[stage, False, chunk, mb] for stage, chunk in reversed(places)]
        for (_, end), (start, _) in pairwise(forward):
            assert start >= end + hop_s
        for (_, end), (start, _) in pairwise(backward):
            assert start >= end + hop_s
        assert backward[0][0] >= forward[-1][1]
    for starts, ends in zip(timeline.starts_s, timeline.ends_s, strict=True):
        assert all(end <= start for end, start in zip(ends, starts[1:], strict=False))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("pp", "vp", "m", "overlaps"),
    [
        (8, 1, 240, False),
        (16, 1, 160, False),
        (4, 2, 80, False),
        (4, 4, 96, True),
        (8, 2, 130, True),
    ],
)
def test_fewer_micro_batches_foretell_more(
    pp: int, vp: int, m: int, overlaps: bool, seed: int
) -> None:
    group = 8 if m == 130 else None
    shape = PipelineShape(
        num_stages=pp,
        num_chunks=vp,
        num_micro_batches=m - m % (group or 1),
        group_size=group,
        overlaps_hops=overlaps,
    )
    times = uneven(pp, vp, seed=seed)
    whole_s = simulate_pipeline(shape, times=times).seconds
    # chunks that differ threefold may need some more rounds to settle than were simulated
    assert pipeline_seconds(shape, times=times) == pytest.approx(whole_s, rel=2e-3)


def test_the_reports_pipeline_with_chunks_takes_less_than_a_second() -> None:
    shape = PipelineShape(num_stages=16, num_chunks=4, num_micro_batches=240, overlaps_hops=True)
    begin = time.process_time()
    timeline = simulate_pipeline(shape, times=uneven(16, 4, seed=0))
    assert time.process_time() - begin < 2.0  # 0.5 s alone; twice and more on a busy machine
    assert sum(len(order) for order in timeline.passes) == 2 * 16 * 4 * 240


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"forward_s": ((1.0,),), "backward_s": ((1.0,), (1.0,))}, "as many each"),
        ({"forward_s": ((1.0, 1.0),), "backward_s": ((1.0,),)}, "as many each"),
        ({"forward_s": ((-1.0,),), "backward_s": ((1.0,),)}, "0 or more"),
        ({"forward_s": ((float("nan"),),), "backward_s": ((1.0,),)}, "0 or more"),
        ({"forward_s": ((1.0,),), "backward_s": ((1.0,),), "hop_s": -1.0}, "0 or more"),
    ],
)
def test_impossible_times_are_refused(words: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        PassTimes(**words)  # type: ignore[arg-type]  each is wrong in its own way


def test_times_of_another_pipeline_are_refused() -> None:
    with pytest.raises(ValueError, match="times of 2 stages and 1 chunks"):
        simulate_pipeline(PipelineShape(num_stages=4, num_micro_batches=8), times=equal(2, 1))
