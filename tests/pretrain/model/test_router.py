"""The auxiliary loss weighs the same however a batch is cut; with megatron's own router not.

A coefficient of 10 makes its gradient a visible part of the norm; the usual one is 1e-4.
"""

from collections.abc import Callable

import pytest
from megatron.core.transformer.moe.router import TopKRouter

from parallel.layout import Layout
from parallel.spawn import RankPool
from pretrain.model import assemble
from pretrain.model.load_balance import LoadBalance
from pretrain.training.run import Run
from pretrain.training.verify import loss_curve

MakeRun = Callable[..., Run]
STRONG = LoadBalance(aux_loss_coefficient=10.0)
TOLERANCE = 2e-5  # fp32 sums in another order; measured 1e-6


def first_norm(run: Run) -> float:
    return loss_curve(run, num_steps=1).gradient_norms[0]


@pytest.fixture(scope="module")
def norm_of_single_sequences(tiny_run: MakeRun, one_rank: object) -> float:
    return first_norm(tiny_run(load_balance=STRONG))


def test_the_loss_is_visible_in_the_norm(
    norm_of_single_sequences: float, tiny_run: MakeRun, one_rank: object
) -> None:
    without = first_norm(tiny_run(load_balance=LoadBalance(aux_loss_coefficient=0.0)))
    assert abs(norm_of_single_sequences / without - 1) > 50 * TOLERANCE


@pytest.mark.parametrize("micro", [2, 8])
def test_micro_batches_of_any_size_give_the_same_gradient(
    micro: int, norm_of_single_sequences: float, tiny_run: MakeRun, one_rank: object
) -> None:
    norm = first_norm(tiny_run(load_balance=STRONG, micro=micro))
    assert norm == pytest.approx(norm_of_single_sequences, rel=TOLERANCE)


def test_megatrons_own_router_gives_another(
    norm_of_single_sequences: float,
    tiny_run: MakeRun,
    one_rank: object,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(assemble, "ScaledAuxLossRouter", TopKRouter)
    norm = first_norm(tiny_run(load_balance=STRONG, micro=8))
    # If this fails, megatron has mended it (#5798): the router of ours may go.
    assert norm != pytest.approx(norm_of_single_sequences, rel=10 * TOLERANCE)


@pytest.mark.parametrize(
    ("layout", "micro"),
    [
        (Layout(num_ranks=2, tp=2, ep=2), 1),
        (Layout(num_ranks=2, tp=2, etp=2), 4),
        (Layout(num_ranks=2, ep=2), 4),
    ],
    ids=str,
)
def test_layouts_give_the_same_gradient(
    layout: Layout,
    micro: int,
    norm_of_single_sequences: float,
    tiny_run: MakeRun,
    two_ranks: RankPool,
) -> None:
    run = tiny_run(layout, load_balance=STRONG, micro=micro)
    curve, _ = two_ranks.run(loss_curve, run, num_steps=1)
    assert curve.gradient_norms[0] == pytest.approx(norm_of_single_sequences, rel=TOLERANCE)
