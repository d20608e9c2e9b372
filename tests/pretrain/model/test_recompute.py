"""What is computed twice must count once: losses, counters and gradients of a plain run."""

from collections.abc import Callable
from typing import Any

import pytest

from parallel.layout import Layout
from pretrain.model.load_balance import LoadBalance
from pretrain.model.precision import Precision
from pretrain.model.recompute import Module, Recompute, check_recompute
from pretrain.model.spec import ModelSpec
from pretrain.training.run import Run
from pretrain.training.verify import Curve, loss_curve, make_trainer
from tests.conftest import TINY_MODEL

MakeRun = Callable[..., Run]

BALANCES = {
    "bias": LoadBalance(kind="bias", aux_loss_coefficient=0.1, bias_update_rate=1e-3),
    "global_aux": LoadBalance(kind="global_aux", aux_loss_coefficient=0.1),
}
EVERY_MODULE: tuple[Module, ...] = ("core_attn", "mla_up_proj", "layernorm", "mlp", "moe")


@pytest.fixture(scope="module")
def plain(tiny_run: MakeRun, one_rank: object) -> dict[str, Curve]:
    return {
        name: loss_curve(tiny_run(load_balance=balance), num_steps=2)
        for name, balance in BALANCES.items()
    }


# megatron's advice for Transformer Engine's attention, and that block leaves MTP alone
@pytest.mark.filterwarnings("ignore:If you are using transformer_engine:UserWarning")
@pytest.mark.filterwarnings("ignore:recompute_method == 'block':UserWarning")
@pytest.mark.parametrize(
    ("balance", "recompute"),
    [
        ("bias", Recompute(kind="full")),
        ("global_aux", Recompute(kind="full")),
        ("bias", Recompute(kind="full", method="block", num_layers=2)),
        ("bias", Recompute(kind="selective", modules=EVERY_MODULE)),
        ("global_aux", Recompute(kind="selective", modules=EVERY_MODULE)),
        ("bias", Recompute(kind="selective", modules=("mla_up_proj", "shared_experts"))),
    ],
    ids=lambda value: str(getattr(value, "kind", value)),
)
def test_recomputation_changes_no_number(
    balance: str, recompute: Recompute, plain: dict[str, Curve], tiny_run: MakeRun
) -> None:
    run = tiny_run(load_balance=BALANCES[balance], recompute=recompute)
    curve, expected = loss_curve(run, num_steps=2), plain[balance]
    assert curve.expert_tokens == expected.expert_tokens
    for name in ("losses", "mtp_losses", "aux_losses", "gradient_norms", "validation"):
        # fp32: a gradient may come as a sum in another order
        assert getattr(curve, name) == pytest.approx(getattr(expected, name), rel=1e-6), name


NAMES = {
    "mla_up_proj": "decoder.layers.1.self_attention.linear_q_up_proj",
    "layernorm": "decoder.layers.1.pre_mlp_layernorm",
    "mlp": "decoder.layers.0.mlp",
    "shared_experts": "decoder.layers.1.mlp.shared_experts",
    "router": "decoder.layers.1.mlp.router",
    "MTP's router": "mtp.layers.0.transformer_layer.mlp.router",
}


@pytest.mark.parametrize(
    ("recompute", "twice"),
    [
        (Recompute(), set[str]()),
        (Recompute(kind="full"), set(NAMES)),
        (Recompute(kind="selective", modules=("mla_up_proj",)), {"mla_up_proj"}),
        (Recompute(kind="selective", modules=("layernorm",)), {"layernorm"}),
        (Recompute(kind="selective", modules=("mlp",)), {"mlp"}),
        (
            Recompute(kind="selective", modules=("moe",)),
            {"shared_experts", "router", "MTP's router"},
        ),
    ],
    ids=lambda value: ",".join(value.modules) or value.kind if hasattr(value, "kind") else "",
)
def test_what_is_named_is_computed_twice_and_nothing_else(
    recompute: Recompute, twice: set[str], tiny_run: MakeRun, one_rank: object
) -> None:
    trainer = make_trainer(tiny_run(recompute=recompute, micro=8))
    model: Any = trainer.chunks[0].module
    calls = dict.fromkeys(NAMES, 0)

    def count(name: str) -> Any:
        def add(*_: object) -> None:
            calls[name] += 1

        return add

    for name, path in NAMES.items():
        model.get_submodule(path).register_forward_hook(count(name))
    trainer.step(trainer.next_batch())
    assert calls == {name: 2 if name in twice else 1 for name in NAMES}


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"kind": "selective"}, "at least one"),
        ({"kind": "none", "modules": ("mlp",)}, "recompute.modules"),
        ({"kind": "full", "modules": ("mlp",)}, "recompute.modules"),
        ({"kind": "selective", "modules": ("mlp", "mlp")}, "each once"),
        ({"kind": "selective", "modules": ("moe", "shared_experts")}, "moe contains"),
        ({"kind": "full", "num_layers": 0}, "1 or more"),
        ({"kind": "none", "num_layers": 2}, "recompute.kind=full only"),
    ],
)
def test_values_that_do_not_belong_together_are_refused(values: Any, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Recompute(**values)


@pytest.mark.parametrize(
    ("changes", "recompute", "precision", "named"),
    [
        ({}, Recompute(kind="full", num_layers=2), Precision(kind="bf16"), "MTP"),
        # four layers on two stages with embedding and loss: three and one
        (
            {"num_mtp_layers": 0, "num_layers": 5},
            Recompute(kind="full", num_layers=2),
            Precision(kind="bf16"),
            "every stage",
        ),
        (
            {},
            Recompute(kind="selective", modules=("layernorm",)),
            Precision(kind="fp8", fp8_recipe="delayed"),
            "precision.fp8_recipe=tensorwise",
        ),
    ],
)
def test_what_megatron_could_not_do_is_refused(
    changes: dict[str, Any], recompute: Recompute, precision: Precision, named: str
) -> None:
    spec: Any = ModelSpec(**{**TINY_MODEL, **changes})  # pyright: ignore[reportArgumentType]  a table
    layout = Layout(num_ranks=2, pp=2)
    with pytest.raises(ValueError, match=named):
        check_recompute(recompute, spec=spec, layout=layout, precision=precision)
