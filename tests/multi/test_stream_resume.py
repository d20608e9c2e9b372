"""A run that is killed and goes on elsewhere reads what it would have read.

A curriculum of two stages, windows of 64 and of 128, in which the mixture moves; the oracle is the
run that was never stopped, on one rank.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest

from data.stream.consumed import MASK
from data.stream.curriculum import Curriculum, Mixture, Stage
from parallel.layout import Layout
from parallel.spawn import RankPool
from pretrain.training.change import Change
from pretrain.training.run import Run
from pretrain.training.verify import Curve, loss_curve, make_trainer
from tests.multi.curves import assert_same_curve

MakeRun = Callable[..., Run]
NUM_STEPS = 8
TWO_STAGES = Curriculum(
    stages={
        "short": Stage(
            tokens=5 * 4 * 64,
            window_tokens=64,
            global_sequences=4,
            pieces=2,
            begin=Mixture(domains={"code": 1.0, "sentences": 3.0}),
            end=Mixture(domains={"code": 3.0, "sentences": 1.0}),
        ),
        "long": Stage(tokens=3 * 4 * 128, window_tokens=128, global_sequences=4),
    },
    max_epochs=100.0,
)


@pytest.fixture(scope="module")
def whole(tiny_run: MakeRun, one_rank: object) -> Curve:
    return loss_curve(tiny_run(curriculum=TWO_STAGES), num_steps=NUM_STEPS)


@pytest.mark.parametrize(  # in a stage, at its end, in the next
    "killed_after",
    [pytest.param(2, marks=pytest.mark.slow), 5, pytest.param(6, marks=pytest.mark.slow)],
)
def test_one_rank_becomes_two_replicas_in_any_stage(
    killed_after: int, whole: Curve, tiny_run: MakeRun, one_rank: object, two_ranks: RankPool
) -> None:
    run = tiny_run(curriculum=TWO_STAGES)
    first = loss_curve(run, num_steps=killed_after, save_after=killed_after)
    two = replace(run, layout=Layout(num_ranks=2))
    left = NUM_STEPS - killed_after
    second, _ = two_ranks.run(loss_curve, two, num_steps=left, resume=True)
    assert second.first_step == killed_after
    assert (first.consumed + second.consumed) & MASK == whole.consumed
    assert first.losses == whole.losses[:killed_after]  # to the bit
    assert second.losses == pytest.approx(whole.losses[killed_after:], rel=2e-6)


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(Layout(num_ranks=2, pp=2), marks=pytest.mark.slow),
        Layout(num_ranks=2, cp=2),
        pytest.param(Layout(num_ranks=2, tp=2, ep=2), marks=pytest.mark.slow),
        Layout(num_ranks=2, pp=2, vp=2),
    ],
    ids=str,
)
def test_every_axis_goes_through_the_change_of_length(
    layout: Layout, whole: Curve, tiny_run: MakeRun, two_ranks: RankPool
) -> None:
    run = tiny_run(layout, curriculum=TWO_STAGES)
    curve, _ = two_ranks.run(loss_curve, run, num_steps=NUM_STEPS)
    assert_same_curve(curve, whole)
    assert curve.consumed == whole.consumed


def test_inside_documents_too(tiny_run: MakeRun, one_rank: object, two_ranks: RankPool) -> None:
    run = tiny_run(curriculum=TWO_STAGES)
    run = replace(run, data=replace(run.data, document_attention=True))
    expected = loss_curve(run, num_steps=NUM_STEPS)
    curve, _ = two_ranks.run(
        loss_curve, replace(run, layout=Layout(num_ranks=2)), num_steps=NUM_STEPS
    )
    assert_same_curve(curve, expected)


def test_skipped_batches_are_left_out_and_nothing_else_moves(
    whole: Curve, tiny_run: MakeRun, one_rank: object
) -> None:
    run = tiny_run(curriculum=TWO_STAGES, change=Change(skip=("1:3",), reason="loss spike"))
    trainer = make_trainer(run)
    assert trainer.total_steps == NUM_STEPS - 2
    plain = make_trainer(tiny_run(curriculum=TWO_STAGES))
    read = [trainer.data.reader.read(step).windows.tokens.copy() for step in range(NUM_STEPS - 2)]
    for tokens, step in zip(read, (0, 3, 4, 5, 6, 7), strict=True):
        assert (tokens == plain.data.reader.read(step).windows.tokens).all()
