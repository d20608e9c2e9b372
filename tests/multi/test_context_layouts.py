"""Context ranks against one rank: the same model, weights and text, whatever else is cut.

The oracle is the single rank. Everything that looks at more than one token is on: attention with
YaRN's rotary positions, MTP, a sequence-level loss whose coefficient is large enough to show in
the gradient, the router bias.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest

from parallel.layout import Layout
from parallel.spawn import RankPool
from pretrain.model.load_balance import LoadBalance
from pretrain.model.spec import Rope
from pretrain.training.run import Run
from pretrain.training.verify import Curve, loss_curve
from tests.multi.curves import assert_same_curve

NUM_STEPS = 6
YARN = Rope(scaling_factor=4.0, original_context_tokens=64, mscale_all_dim=1.0)
BALANCE = LoadBalance(kind="bias", bias_update_rate=1e-3, aux_loss_coefficient=0.1)

MakeRun = Callable[..., Run]


@pytest.fixture(scope="module")
def context_run(tiny_run: MakeRun) -> Run:
    return replace(tiny_run(spec={"rope": YARN}, micro=2), load_balance=BALANCE)


@pytest.fixture(scope="module")
def reference(context_run: Run, one_rank: object) -> Curve:
    return loss_curve(context_run, num_steps=NUM_STEPS)


def test_two_context_ranks_draw_the_loss_curve_of_one(
    context_run: Run, reference: Curve, two_ranks: RankPool
) -> None:
    run = replace(context_run, layout=Layout(num_ranks=2, cp=2))
    curve, same = two_ranks.run(loss_curve, run, num_steps=NUM_STEPS)
    assert curve.losses == same.losses
    assert_same_curve(curve, reference)


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(Layout(num_ranks=4, cp=4), marks=pytest.mark.slow),
        pytest.param(Layout(num_ranks=4, cp=2, ep=4), marks=pytest.mark.slow),
        pytest.param(Layout(num_ranks=4, cp=2, pp=2, ep=2), marks=pytest.mark.slow),
        pytest.param(Layout(num_ranks=4, cp=2, tp=2, ep=2), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_context_ranks_beside_other_axes_draw_the_beginning_of_the_curve(
    layout: Layout, context_run: Run, reference: Curve, four_ranks: RankPool
) -> None:
    run = replace(context_run, layout=layout)
    curve, *_ = four_ranks.run(loss_curve, run, num_steps=3)
    assert_same_curve(curve, reference)
