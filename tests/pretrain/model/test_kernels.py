"""A model trains the same whichever of its operators run in kernels of ours.

The oracle is megatron-core's way through the same model on the same ranks: plain torch, whose
numbers other tests hold against transformers. Each kernel has tests of its own in tests/kernels,
each hook beside its file; here is the model that has them.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from parallel.layout import Layout
from parallel.spawn import RankPool
from pretrain.model import activation, dispatcher, router
from pretrain.model.exchange import Exchange
from pretrain.model.kernels import Kernels
from pretrain.model.load_balance import LoadBalance
from pretrain.model.precision import Precision
from pretrain.model.recompute import Recompute
from pretrain.training.run import Run
from pretrain.training.verify import Curve, loss_curve, make_trainer
from tests.conftest import tiny_curriculum
from tests.pretrain.model.test_dual_norm_layer import assert_same
from tests.pretrain.serving.twin import MEGATRONS
from tests.pretrain.training.metric_steps import metrics_of_steps

MakeRun = Callable[..., Run]
NAMES = ("router", "swiglu", "permute")
EACH = {name: replace(MEGATRONS, **{name: "fused"}) for name in NAMES}
THREE = Kernels(router="fused", swiglu="fused", permute="fused")
BALANCES = {
    "sequence_aux": LoadBalance(aux_loss_coefficient=1.0),
    "global_aux": LoadBalance(kind="global_aux", aux_loss_coefficient=1.0),
    "bias": LoadBalance(kind="bias", aux_loss_coefficient=1.0, bias_update_rate=1e-3),
}
"""With a coefficient that makes the loss's gradient a visible part of the norm."""
# In fp32 the operations are megatron's in megatron's order, but for one sum over a row (the
# gradient of the router's weight); it was the same to the bit where this was written.
SAME = 1e-6


@pytest.fixture(scope="module")
def megatrons(tiny_run: MakeRun, one_rank: object) -> dict[str, Curve]:
    return {
        kind: loss_curve(tiny_run(load_balance=balance, micro=4, kernels=MEGATRONS), num_steps=3)
        for kind, balance in BALANCES.items()
    }


@pytest.mark.parametrize("kind", BALANCES)
@pytest.mark.parametrize("name", NAMES)
def test_each_kernel_alone_trains_megatrons_model(
    name: str, kind: str, megatrons: dict[str, Curve], tiny_run: MakeRun, one_rank: object
) -> None:
    run = tiny_run(load_balance=BALANCES[kind], micro=4, kernels=EACH[name])
    assert_same(loss_curve(run, num_steps=3), megatrons[kind], rel=SAME)


def test_each_kernel_is_really_called(
    tiny_run: MakeRun, one_rank: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: dict[str, int] = {}

    def count(module: Any, name: str) -> None:
        function = getattr(module, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            called[name] = called.get(name, 0) + 1
            return function(*args, **kwargs)

        monkeypatch.setattr(module, name, counted)

    places = ((router, "route"), (dispatcher, "permute"), (dispatcher, "unpermute"))
    for module, name in (*places, (activation, "swiglu")):
        count(module, name)
    trainer = make_trainer(tiny_run(micro=8, bf16=True, kernels=THREE))
    trainer.step(trainer.next_batch())
    spec = trainer.run.model
    num_moe = spec.num_layers - spec.num_dense_layers + spec.num_mtp_layers
    assert {name: called[name] for name in ("route", "permute", "unpermute")} == dict.fromkeys(
        ("route", "permute", "unpermute"), num_moe
    )
    # in bf16 experts are called one by one; a shared expert beside them, dense layers besides
    num_activations = num_moe * (spec.num_routed_experts + 1) + spec.num_dense_layers
    assert called["swiglu"] == num_activations


@pytest.mark.parametrize(
    "recompute",
    [
        Recompute(kind="full"),
        Recompute(kind="selective", modules=("mla_up_proj", "moe", "mlp")),
        Recompute(kind="selective", modules=("layernorm", "shared_experts")),
    ],
    ids=lambda recompute: "-".join((recompute.kind, *recompute.modules)),
)
def test_what_is_computed_again_is_the_same_with_all_kernels(
    recompute: Recompute, megatrons: dict[str, Curve], tiny_run: MakeRun, one_rank: object
) -> None:
    run = tiny_run(load_balance=BALANCES["bias"], micro=4, kernels=THREE, recompute=recompute)
    assert_same(loss_curve(run, num_steps=3), megatrons["bias"], rel=SAME)


@pytest.mark.parametrize(
    ("sizes", "kind"),
    [
        ({"ep": 2}, "sequence_aux"),
        pytest.param({"tp": 2, "ep": 2}, "bias", marks=pytest.mark.slow),
        ({"tp": 2, "etp": 2}, "global_aux"),
        pytest.param({"cp": 2}, "sequence_aux", marks=pytest.mark.slow),
        pytest.param({"pp": 2}, "global_aux", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_two_ranks_train_megatrons_model(
    sizes: dict[str, int], kind: str, tiny_run: MakeRun, two_ranks: RankPool
) -> None:
    run = tiny_run(Layout(num_ranks=2, **sizes), load_balance=BALANCES[kind], micro=4)
    run = replace(run, kernels=MEGATRONS)
    expected = two_ranks.run(loss_curve, run, num_steps=2)[0]
    found = two_ranks.run(loss_curve, replace(run, kernels=THREE), num_steps=2)[0]
    assert_same(found, expected, rel=SAME)


ALL = replace(THREE, dual_norm="fused", combine="fused")


@pytest.mark.parametrize(
    "sizes",
    [
        {"ep": 2},
        pytest.param({"tp": 2, "ep": 2}, marks=pytest.mark.slow),
        pytest.param({"pp": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_on_two_ranks_rows_come_back_into_the_dual_norm(
    sizes: dict[str, int], tiny_run: MakeRun, two_ranks: RankPool
) -> None:
    run = tiny_run(Layout(num_ranks=2, **sizes), bias=True, kernels=MEGATRONS)
    expected = two_ranks.run(loss_curve, run, num_steps=2)[0]
    found = two_ranks.run(loss_curve, replace(run, kernels=ALL), num_steps=2)[0]
    assert_same(found, expected, rel=5e-6)


@pytest.mark.parametrize(
    "recompute",
    [
        Recompute(),
        Recompute(kind="full"),
        Recompute(kind="selective", modules=("mla_up_proj", "shared_experts")),
    ],
    ids=lambda recompute: "-".join((recompute.kind, *recompute.modules)),
)
def test_rows_come_back_into_the_dual_norm(
    recompute: Recompute,
    megatrons: dict[str, Curve],
    tiny_run: MakeRun,
    one_rank: object,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dispatcher, "unpermute", None)  # nobody adds them up before
    run = tiny_run(load_balance=BALANCES["bias"], micro=4, kernels=ALL, recompute=recompute)
    assert_same(loss_curve(run, num_steps=3), megatrons["bias"], rel=5e-6)


def test_gauges_see_the_sum_that_is_inside_the_dual_norm(
    tiny_run: MakeRun, one_rank: object
) -> None:
    run = tiny_run(load_balance=BALANCES["bias"], micro=4, kernels=MEGATRONS)
    expected = metrics_of_steps(run)
    found = metrics_of_steps(replace(run, kernels=ALL))
    assert found.keys() == expected.keys()
    names = [name for name in expected if "norm_" in name and name.startswith("layer/")]
    assert len(names) >= 8
    for name in names:
        assert found[name] == pytest.approx(expected[name], rel=1e-3), name


def emulated(make: MakeRun, **changes: Any) -> Run:
    """Return a run in FP8 with one scale for each tensor."""
    run = make(curriculum=tiny_curriculum(sequences=2), **changes)
    return replace(run, precision=Precision(kind="fp8_emulated", fp8_recipe="tensorwise"))


@pytest.fixture(scope="module")
def megatrons_fp8(tiny_run: MakeRun, one_rank: object) -> Curve:
    return loss_curve(emulated(tiny_run, kernels=MEGATRONS), num_steps=2)


@pytest.mark.parametrize("name", ["router", "permute"])
def test_emulated_fp8_sees_the_same_tokens(
    name: str, megatrons_fp8: Curve, tiny_run: MakeRun, one_rank: object
) -> None:
    curve = loss_curve(emulated(tiny_run, kernels=EACH[name]), num_steps=2)
    # a token's rows are added up in fp32 and rounded once, as torch's scatter_add does on a CPU
    assert_same(curve, megatrons_fp8, rel=SAME)


def test_emulated_fp8_trains_behind_an_activation_with_fewer_roundings(
    megatrons_fp8: Curve, tiny_run: MakeRun, one_rank: object
) -> None:
    curve = loss_curve(emulated(tiny_run, kernels=EACH["swiglu"]), num_steps=2)
    # half a step of E4M3 is 1/16: a rounding less of bf16 moves a few values over a border
    assert curve.losses == pytest.approx(megatrons_fp8.losses, abs=0.01)
    assert curve.gradient_norms == pytest.approx(megatrons_fp8.gradient_norms, rel=0.05)


def test_gauges_and_metrics_see_the_same(tiny_run: MakeRun, one_rank: object) -> None:
    run = tiny_run(load_balance=BALANCES["bias"], micro=4, kernels=MEGATRONS)
    expected = metrics_of_steps(run)
    found = metrics_of_steps(replace(run, kernels=THREE))
    assert found.keys() == expected.keys()
    assert len([name for name in found if name.endswith("router_entropy")]) > 3
    assert found == pytest.approx(expected, rel=1e-5)


def test_values_and_keys_that_cannot_be_are_named(tiny_run: MakeRun) -> None:
    for name in NAMES:
        with pytest.raises(ValueError, match=rf"kernels\.{name}=triton given, .*megatron or fused"):
            replace(Kernels(), **{name: "triton"})
    activated_again = Recompute(kind="selective", modules=("moe_act",))
    moe_again = Recompute(kind="selective", modules=("moe",))
    overlapped = Exchange(overlap_shared_expert=True)
    for kernels, changes, message in (
        (EACH["swiglu"], {"recompute": activated_again}, r"swiglu=fused with recompute\.modules"),
        (EACH["swiglu"], {"exchange": overlapped}, "swiglu=fused with exchange.overlap_shared"),
        (EACH["permute"], {"exchange": overlapped}, "permute=fused with exchange.overlap_shared"),
        (EACH["permute"], {"exchange": Exchange(dispatcher="allgather")}, "dispatcher=allgather"),
        (replace(ALL, dual_norm="separate"), {}, r"combine=fused with kernels\.dual_norm=separate"),
        (replace(ALL, permute="megatron"), {}, r"combine=fused with .*permute=megatron"),
        (ALL, {"model": replace(tiny_run().model, dual_norm=False)}, r"model\.dual_norm=false"),
        (ALL, {"recompute": moe_again}, r"combine=fused with .*modules=\['moe'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(tiny_run(), kernels=kernels, **changes)
