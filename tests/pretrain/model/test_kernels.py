"""A model trains the same whichever of its operators run in kernels of ours.

The oracle is megatron-core's way through the same model: plain torch, whose numbers other tests
hold against transformers. Each kernel has tests of its own in tests/kernels; here is the model.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from parallel.layout import Layout
from parallel.spawn import RankPool
from pretrain.model.exchange import Exchange
from pretrain.model.kernels import Kernels
from pretrain.model.load_balance import LoadBalance
from pretrain.model.precision import Precision
from pretrain.model.recompute import Recompute
from pretrain.training.run import Run
from pretrain.training.verify import Curve, loss_curve
from tests.conftest import tiny_curriculum
from tests.pretrain.model.test_dual_norm_layer import assert_same
from tests.pretrain.training.metric_steps import metrics_of_steps

MakeRun = Callable[..., Run]
ALL = Kernels(dual_norm="fused", router="fused", swiglu="fused", permute="fused")
EACH = {name: Kernels(**{name: "fused"}) for name in ("router", "swiglu", "permute")}
BALANCES = {
    "sequence_aux": LoadBalance(aux_loss_coefficient=1.0),
    "global_aux": LoadBalance(kind="global_aux", aux_loss_coefficient=1.0),
    "bias": LoadBalance(kind="bias", aux_loss_coefficient=1.0, bias_update_rate=1e-3),
}
"""With a coefficient that makes the loss's gradient a visible part of the norm."""


@pytest.fixture(scope="module")
def megatrons(tiny_run: MakeRun, one_rank: object) -> dict[str, Curve]:
    return {
        kind: loss_curve(tiny_run(load_balance=balance, micro=2), num_steps=3)
        for kind, balance in BALANCES.items()
    }


@pytest.mark.parametrize("kind", BALANCES)
@pytest.mark.parametrize("name", EACH)
def test_each_kernel_alone_trains_megatrons_model(
    name: str, kind: str, megatrons: dict[str, Curve], tiny_run: MakeRun, one_rank: object
) -> None:
    run = tiny_run(load_balance=BALANCES[kind], micro=2, kernels=EACH[name])
    # sums in another order; measured up to 1e-7
    assert_same(loss_curve(run, num_steps=3), megatrons[kind], rel=1e-6)


@pytest.mark.parametrize(
    "recompute",
    [
        Recompute(kind="full"),
        Recompute(kind="selective", modules=("mla_up_proj", "moe", "mlp")),
        Recompute(kind="selective", modules=("shared_experts",)),
    ],
    ids=lambda recompute: "-".join((recompute.kind, *recompute.modules)),
)
def test_what_is_computed_again_is_the_same_with_all_kernels(
    recompute: Recompute, megatrons: dict[str, Curve], tiny_run: MakeRun, one_rank: object
) -> None:
    run = tiny_run(load_balance=BALANCES["bias"], micro=2, kernels=ALL, recompute=recompute)
    assert_same(loss_curve(run, num_steps=3), megatrons["bias"], rel=5e-6)


@pytest.mark.parametrize(
    ("sizes", "kind"),
    [
        ({"ep": 2}, "sequence_aux"),
        ({"tp": 2, "ep": 2}, "bias"),
        ({"tp": 2, "etp": 2}, "global_aux"),
        ({"cp": 2}, "sequence_aux"),
        ({"pp": 2}, "global_aux"),
    ],
    ids=str,
)
def test_two_ranks_train_the_model_of_one_with_all_kernels(
    sizes: dict[str, int],
    kind: str,
    megatrons: dict[str, Curve],
    tiny_run: MakeRun,
    two_ranks: RankPool,
) -> None:
    run = tiny_run(
        Layout(num_ranks=2, **sizes), load_balance=BALANCES[kind], micro=2, kernels=ALL
    )
    assert_same(two_ranks.run(loss_curve, run, num_steps=3)[0], megatrons[kind], rel=1e-4)
