"""Layouts of four gloo ranks, where several axes meet, against one rank.

The oracle is the single rank. MTP, a strong auxiliary loss and the router bias are on.
"""

from collections.abc import Callable

import pytest

from parallel.layout import Layout
from parallel.spawn import RankPool
from pretrain.model.load_balance import LoadBalance
from pretrain.training.run import Run
from pretrain.training.verify import Curve, loss_curve
from tests.multi.curves import assert_same_curve

MakeRun = Callable[..., Run]

NUM_STEPS = 3
BALANCE = LoadBalance(kind="bias", bias_update_rate=1e-3, aux_loss_coefficient=0.01)


@pytest.fixture(scope="module")
def reference(tiny_run: MakeRun, one_rank: object) -> Curve:
    return loss_curve(tiny_run(load_balance=BALANCE), num_steps=NUM_STEPS)


SLOW = [
    Layout(num_ranks=4, tp=2, ep=2, etp=2),  # unlike parts between expert tensor ranks
    Layout(num_ranks=4, ep=2, etp=2),  # the same over two replicas
    Layout(num_ranks=4, tp=2),  # whole experts on every tensor rank and replica
    Layout(num_ranks=4, pp=2, vp=2, ep=2),
]


@pytest.mark.parametrize(
    "layout",
    [
        Layout(num_ranks=4, tp=2, ep=2, pp=2),  # most axes at once
        *(pytest.param(layout, marks=pytest.mark.slow) for layout in SLOW),
    ],
    ids=str,
)
def test_four_ranks_draw_the_loss_curve_of_one(
    layout: Layout, reference: Curve, tiny_run: MakeRun, four_ranks: RankPool
) -> None:
    run = tiny_run(layout, load_balance=BALANCE)
    curve, *_ = four_ranks.run(loss_curve, run, num_steps=NUM_STEPS)
    assert_same_curve(curve, reference)
