"""A run that starts again from its checkpoint goes on as if it had never stopped, to the bit.

The oracle is the run itself: it saves after step 4 and goes on to step 7; a second start reads that
checkpoint and takes the last three steps again. Text, weights, moments, router bias and random
state must all be back for that.
"""

from collections.abc import Callable, Iterator

import pytest

from parallel.layout import Layout
from parallel.spawn import RankPool
from pretrain.training.run import Run
from pretrain.training.verify import Curve, loss_curve
from tests.conftest import tiny_curriculum

SAVED, LAST = 4, 7
TWO = tiny_curriculum(sequences=2)

MakeRun = Callable[..., Run]


def assert_goes_on(resumed: Curve, whole: Curve, *, saved: int = SAVED) -> None:
    assert resumed.first_step == saved
    assert resumed.losses == whole.losses[saved:]
    assert resumed.gradient_norms == whole.gradient_norms[saved:]
    assert resumed.validation == whole.validation


@pytest.mark.parametrize(
    "variant",
    [{"bias": True}, pytest.param({"bf16": True}, marks=pytest.mark.slow)],
    ids=["fp32-bias", "bf16"],
)
@pytest.mark.parametrize(
    ("layout", "overlap"),
    [
        (Layout(num_ranks=2, ep=2), False),
        (Layout(num_ranks=2, pp=2), False),
        pytest.param(Layout(num_ranks=2, cp=2), False, marks=pytest.mark.slow),
        (Layout(num_ranks=2), True),
    ],
    ids=["ep2", "pp2 with MTP", "cp2", "dp2 in many buckets"],
)
def test_two_ranks_go_on_to_the_bit(
    layout: Layout, overlap: bool, variant: dict[str, bool], tiny_run: MakeRun, two_ranks: RankPool
) -> None:
    run = tiny_run(layout, overlap=overlap, curriculum=TWO, micro=1, **variant)
    whole, _ = two_ranks.run(loss_curve, run, num_steps=LAST, save_after=SAVED)
    resumed, _ = two_ranks.run(loss_curve, run, num_steps=LAST - SAVED, resume=True)
    assert not overlap or whole.num_buckets >= 3
    assert_goes_on(resumed, whole)


@pytest.mark.parametrize(
    "layout",
    [pytest.param(Layout(num_ranks=2, tp=2), marks=pytest.mark.slow), Layout(num_ranks=2, etp=2)],
    ids=["tp2", "etp2"],
)
def test_experts_spread_unlike_dense_layers_go_on_to_the_bit(
    layout: Layout, tiny_run: MakeRun, two_ranks: RankPool
) -> None:
    run = tiny_run(layout, curriculum=TWO, micro=1, bias=True)
    whole, _ = two_ranks.run(loss_curve, run, num_steps=4, save_after=2)
    resumed, _ = two_ranks.run(loss_curve, run, num_steps=2, resume=True)
    assert_goes_on(resumed, whole, saved=2)


@pytest.mark.parametrize(
    "variant",
    [{}, {"bf16": True, "bias": True, "overlap": True}],
    ids=["fp32", "bf16-bias-overlap"],
)
def test_one_rank_goes_on_to_the_bit(
    variant: dict[str, bool], tiny_run: MakeRun, one_rank: object
) -> None:
    run = tiny_run(curriculum=TWO, micro=1, **variant)
    whole = loss_curve(run, num_steps=LAST, save_after=SAVED)
    resumed = loss_curve(run, num_steps=LAST - SAVED, resume=True)
    assert_goes_on(resumed, whole)


def test_saving_does_not_disturb_the_run(tiny_run: MakeRun, one_rank: object) -> None:
    run = tiny_run(curriculum=TWO, micro=1, bias=True)
    saving = loss_curve(run, num_steps=4, save_after=2)
    assert saving == loss_curve(run, num_steps=4)


@pytest.fixture
def doomed_ranks() -> Iterator[RankPool]:
    pool = RankPool(2)
    yield pool
    pool.close()


@pytest.mark.slow
def test_ranks_killed_after_the_save_are_replaced_without_a_trace(
    tiny_run: MakeRun, doomed_ranks: RankPool, two_ranks: RankPool
) -> None:
    run = tiny_run(Layout(num_ranks=2, ep=2), curriculum=TWO, micro=1, bias=True)
    whole, _ = two_ranks.run(loss_curve, run, num_steps=6)
    doomed_ranks.run(loss_curve, run, num_steps=3, save_after=3)
    doomed_ranks.close()  # SIGKILL
    resumed, _ = two_ranks.run(loss_curve, run, num_steps=3, resume=True)
    assert_goes_on(resumed, whole, saved=3)
