"""Number formats: FP8 is refused where it would silently be something else."""

from typing import Any

import pytest

from parallel.device import Device
from parallel.layout import Layout
from pretrain.model import precision, transformer_config
from pretrain.model.load_balance import LoadBalance
from pretrain.model.precision import NEVER_FP8, Precision, check_available, check_precision
from pretrain.model.spec import ModelSpec
from tests.conftest import TINY_MODEL

SPEC = ModelSpec(**TINY_MODEL)  # type: ignore[arg-type]  from a table


def machine(monkeypatch: pytest.MonkeyPatch, *, has_gpu: bool) -> None:
    monkeypatch.setattr(precision, "has_transformer_engine", lambda: has_gpu)
    monkeypatch.setattr(precision, "has_cuda", lambda: has_gpu)


def test_fp8_without_transformer_engine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, has_gpu=False)
    with pytest.raises(ValueError, match=r"precision\.kind=fp8 given.*pip.*set precision=bf16"):
        check_available(Precision(kind="fp8"))
    check_available(Precision(kind="fp8_emulated"))


def test_the_emulation_on_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, has_gpu=True)
    with pytest.raises(ValueError, match=r"precision\.kind=fp8_emulated given.*precision=fp8_hyb"):
        check_available(Precision(kind="fp8_emulated"))
    check_available(Precision(kind="fp8"))


@pytest.mark.parametrize("has_gpu", [False, True])
@pytest.mark.parametrize(("kind", "is_low"), [("fp32", False), ("bf16", True)])
def test_the_others_run_anywhere(
    kind: Any, is_low: bool, has_gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, has_gpu=has_gpu)
    check_available(Precision(kind=kind))
    assert Precision(kind=kind).is_low is is_low


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"kind": "bf16", "fp8_format": "e4m3"}, r"fp8_format=e4m3.*precision\.kind=fp8"),
        ({"kind": "fp32", "shadow_interval_steps": 5}, r"shadow_interval_steps=5.*kind=fp8"),
        ({"kind": "fp8", "fp8_margin": 1}, r"fp8_margin=1.*precision\.fp8_recipe=delayed"),
        ({"kind": "fp8_emulated", "fp8_amax_history": 16}, r"fp8_amax_history=16.*delayed"),
        ({"kind": "fp8", "fp8_accumulation": "hopper"}, r"fp8_accumulation=hopper.*fp8_emulated"),
        ({"kind": "fp8", "shadow_interval_steps": -1}, "shadow_interval_steps=-1 given, at least"),
        (
            {"kind": "fp8", "fp8_recipe": "delayed", "shadow_interval_steps": 9},
            "shadow_interval_steps=9.*histories",
        ),
        (
            {"kind": "fp8_emulated", "fp8_recipe": "delayed", "num_last_high_layers": 1},
            r"num_last_high_layers=1.*precision\.fp8_recipe=tensorwise",
        ),
        ({"kind": "fp8", "high_precision": NEVER_FP8[1:]}, r"high_precision.*embedding cannot run"),
        (
            {"kind": "fp8", "high_precision": (*NEVER_FP8, "dense_ffn")},
            r"dense_ffn.*precision\.kind=fp8_emulated",
        ),
        ({"kind": "fp8", "high_precision": (*NEVER_FP8, "head")}, "each once"),
    ],
)
def test_what_would_not_be_read_or_cannot_be_is_refused(given: Any, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Precision(**given)


def test_more_high_layers_than_megatron_takes_or_the_model_has_are_refused() -> None:
    chosen = Precision(kind="fp8", num_first_high_layers=3)
    check_precision(chosen, spec=SPEC, layout=Layout())
    with pytest.raises(ValueError, match=r"num_first_high_layers=3.*layout\.pp = 2"):
        check_precision(chosen, spec=SPEC, layout=Layout(num_ranks=2, pp=2))
    none_left = Precision(kind="fp8", num_first_high_layers=2, num_last_high_layers=2)
    with pytest.raises(ValueError, match=r"no layer of model\.num_layers=4 is left"):
        check_precision(none_left, spec=SPEC, layout=Layout())


@pytest.mark.parametrize(
    ("given", "label"),
    [
        ({"kind": "bf16"}, "bf16"),
        ({"kind": "fp8"}, "fp8 hybrid tensorwise, Transformer Engine"),
        (
            {"kind": "fp8_emulated", "fp8_format": "e4m3", "fp8_accumulation": "hopper"},
            "fp8 e4m3 tensorwise, emulated, hopper accumulation",
        ),
    ],
)
def test_what_ran_has_a_name(given: Any, label: str) -> None:
    assert Precision(**given).label == label


CPU = Device(kind="cpu", backend="gloo")


def megatrons_options(monkeypatch: pytest.MonkeyPatch, **given: Any) -> dict[str, Any]:
    """Return what megatron's config is made with, which asks for Transformer Engine's version."""
    machine(monkeypatch, has_gpu=given["kind"] == "fp8")
    monkeypatch.setattr(transformer_config, "MLATransformerConfig", lambda **options: options)
    return transformer_config.transformer_config(  # type: ignore[return-value]
        SPEC,
        layout=Layout(),
        device=CPU,
        precision=Precision(**given),
        load_balance=LoadBalance(),
        mtp_loss_weight=0.3,
    )


@pytest.mark.parametrize(
    ("given", "options"),
    [
        ({}, {"fp8": "hybrid", "fp8_recipe": "tensorwise"}),
        (
            {"fp8_recipe": "blockwise", "fp8_format": "e4m3", "num_last_high_layers": 2},
            {
                "fp8": "e4m3",
                "fp8_recipe": "blockwise",
                "first_last_layers_bf16": True,
                "num_layers_at_start_in_bf16": 0,
                "num_layers_at_end_in_bf16": 2,
            },
        ),
        (
            {"fp8_recipe": "delayed", "fp8_margin": 1, "fp8_amax_algorithm": "most_recent"},
            {
                "fp8": "hybrid",
                "fp8_recipe": "delayed",
                "fp8_margin": 1,
                "fp8_amax_history_len": 1024,
                "fp8_amax_compute_algo": "most_recent",
            },
        ),
    ],
)
def test_megatron_is_told_the_recipe(
    given: Any, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    told = megatrons_options(monkeypatch, kind="fp8", **given)
    words = ("fp8", "first_last", "in_bf16")
    assert {name: told[name] for name in told if any(word in name for word in words)} == options
    assert told["moe_router_padding_for_quantization"] is True
    assert told["bf16"] is True


def test_megatron_hears_nothing_of_the_emulation(monkeypatch: pytest.MonkeyPatch) -> None:
    told = megatrons_options(monkeypatch, kind="fp8_emulated")
    assert told == megatrons_options(monkeypatch, kind="bf16")
