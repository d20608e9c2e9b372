"""Which ways to exchange tokens are refused, and with which words."""

from typing import Any

import pytest

from parallel.device import Device
from parallel.layout import Layout
from pretrain.model import exchange as module
from pretrain.model.exchange import Exchange, check_exchange, check_exchange_available
from pretrain.model.load_balance import LoadBalance
from pretrain.model.precision import Precision
from pretrain.model.recompute import Recompute
from pretrain.model.spec import ModelSpec
from pretrain.model.transformer_config import transformer_config
from tests.conftest import TINY_MODEL

SPEC = ModelSpec(**TINY_MODEL)  # type: ignore[arg-type]  a table


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"dispatcher": "allgather", "overlap_all_to_all": True}, "exchange.dispatcher=allgather"),
        ({"dispatcher": "deepep", "overlap_shared_expert": True}, "exchange.dispatcher=alltoall"),
        ({"overlap_all_to_all": True, "overlap_shared_expert": True}, "one of them"),
    ],
)
def test_values_that_exclude_each_other_are_refused(values: Any, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Exchange(**values)


@pytest.mark.parametrize(
    ("exchange", "precision", "recompute", "named"),
    [
        (Exchange(overlap_all_to_all=True), "bf16", Recompute(), "model.dual_norm=true"),
        (Exchange(dispatcher="allgather"), "fp8", Recompute(), "precision.kind=fp8"),
        (Exchange(dispatcher="deepep"), "bf16", Recompute(), "layout.ep=1"),
        (
            Exchange(overlap_shared_expert=True),
            "bf16",
            Recompute(kind="selective", modules=("shared_experts",)),
            "recompute.modules",
        ),
    ],
)
def test_what_megatron_could_not_do_is_refused(
    exchange: Exchange, precision: Any, recompute: Recompute, named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        check_exchange(
            exchange,
            spec=SPEC,
            layout=Layout(),
            precision=Precision(kind=precision),
            recompute=recompute,
        )


@pytest.mark.parametrize(
    ("dispatcher", "package"), [("deepep", "DeepEP"), ("hybridep", "branch hybrid-ep")]
)
def test_a_gpu_without_the_package_is_told_what_it_lacks_and_what_it_costs(
    dispatcher: Any, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "has_cuda", lambda: True)
    with pytest.raises(ValueError, match=rf"exchange\.dispatcher={dispatcher} .*{package}.*costs"):
        check_exchange_available(Exchange(dispatcher=dispatcher))


def test_what_runs_anywhere_is_not_refused() -> None:
    check_exchange_available(Exchange())
    check_exchange_available(Exchange(dispatcher="allgather"))


@pytest.mark.parametrize("dispatcher", ["deepep", "hybridep"])
def test_the_packages_are_megatrons_flex_dispatcher(
    dispatcher: Any, monkeypatch: pytest.MonkeyPatch, one_rank: Device
) -> None:
    monkeypatch.setattr(module, "has_cuda", lambda: True)
    packages = {name: (lambda: True, text) for name, (_, text) in module.PACKAGES.items()}
    monkeypatch.setattr(module, "PACKAGES", packages)
    config = transformer_config(
        SPEC,
        layout=Layout(num_ranks=2, ep=2),
        device=one_rank,
        precision=Precision(kind="bf16"),
        load_balance=LoadBalance(),
        mtp_loss_weight=0.3,
        exchange=Exchange(dispatcher=dispatcher),
    )
    assert config.moe_token_dispatcher_type == "flex"
    assert config.moe_flex_dispatcher_backend == dispatcher
