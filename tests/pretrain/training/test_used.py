"""Is what the doctor names what a trainer is really built of, and what its steps really call?"""

import importlib
import json
from collections.abc import Callable
from dataclasses import asdict
from functools import reduce
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

from parallel.device import Device
from parallel.machine import Cpu
from pretrain.checkpoint.staging import Staging
from pretrain.model import assemble, exchange, precision
from pretrain.training import used
from pretrain.training.run import Run
from pretrain.training.used import MODULES, cross_entropy, machine_line, what_is_used
from pretrain.training.verify import make_trainer

MakeRun = Callable[..., Run]


@pytest.fixture
def told(tiny_run: MakeRun, one_rank: object) -> Any:
    return what_is_used(json.dumps(asdict(tiny_run().model)))


def name_of(thing: Any) -> str:
    return f"{type(thing).__module__}.{type(thing).__name__}"


def test_every_module_that_is_named_is_the_one_that_was_built(
    told: Any, tiny_run: MakeRun, one_rank: object
) -> None:
    (model,) = make_trainer(tiny_run()).modules
    layer = model.decoder.layers[-1]
    built = {
        part: name_of(reduce(getattr, filter(None, place.split(".")), layer))
        for part, place in MODULES.items()
    }
    assert {part: told["parts"][part] for part in MODULES} == built
    assert name_of(model.decoder.final_layernorm) == told["parts"]["norms"]
    assert isinstance(layer.mlp.token_dispatcher, MoEAlltoAllTokenDispatcher)
    assert told["parts"]["all-to-all"].split(", ")[0] == "alltoall"


def test_the_optimizer_that_is_named_updates_every_weight(
    told: Any, tiny_run: MakeRun, one_rank: object
) -> None:
    parts = make_trainer(tiny_run()).optimizer.chained_optimizers
    assert {name_of(part.optimizer) for part in parts} == {told["parts"]["optimizer"]}


@pytest.mark.parametrize("bf16", [False, True])
def test_a_step_calls_the_loss_and_the_experts_that_are_named(
    told: Any,
    tiny_run: MakeRun,
    one_rank: object,
    bf16: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    called: list[str] = []

    def count(module: str, name: str, what: str) -> None:
        real = getattr(importlib.import_module(module), name)
        monkeypatch.setattr(
            f"{module}.{name}", lambda *args, **words: called.append(what) or real(*args, **words)
        )

    module, _, name = told["parts"][
        "cross-entropy" if bf16 else "cross-entropy in fp32"
    ].rpartition(".")
    count(module if bf16 else assemble.__name__, name, "loss")
    count("pretrain.model.experts", "expert_ffn", "written out")
    trainer = make_trainer(tiny_run(bf16=bf16))
    trainer.step(trainer.next_batch())
    assert "loss" in called
    one_by_one = told["parts"]["experts in bf16"].startswith("one by one")
    assert ("written out" in called) is not (bf16 and one_by_one)


def test_a_fused_loss_is_named_as_megatron_chooses_it() -> None:
    fused = {"cross_entropy_loss_fusion": True}
    for kind, name in (("native", "fused_vocab_parallel"), ("te", "te_parallel")):
        told = cross_entropy(SimpleNamespace(**fused, cross_entropy_fusion_impl=kind))
        assert told.rpartition(".")[2] == f"{name}_cross_entropy"
        if kind == "native":
            module, _, function = told.rpartition(".")
            assert hasattr(importlib.import_module(module), function)


def test_fp8_and_the_exchanges_are_those_that_are_not_refused(
    tiny_run: MakeRun, one_rank: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "has_transformer_engine", lambda: True)
    monkeypatch.setattr(exchange, "has_cuda", lambda: True)
    monkeypatch.setitem(exchange.PACKAGES, "deepep", (lambda: True, "DeepEP"))
    monkeypatch.setitem(exchange.PACKAGES, "hybridep", (lambda: False, "HybridEP"))
    told = what_is_used(json.dumps(asdict(tiny_run().model)))
    assert told["fp8"] == ("fp8", "fp8_emulated")
    assert told["parts"]["all-to-all"] == "alltoall, allgather, deepep"


def test_fp8_that_is_refused_is_not_named(told: Any) -> None:
    assert tuple(told["fp8"]) == ("fp8_emulated",)


def test_a_copy_of_the_state_is_in_the_memory_that_is_named(told: Any) -> None:
    staging = Staging(torch.device("cpu"))
    staging.copy([])
    assert staging._memory is not None
    assert staging.is_pinned is staging._memory.is_pinned()
    assert ("pageable" in told["parts"]["checkpoint"]) is not staging.is_pinned


def test_on_a_cpu_it_says_what_stands_for_the_gpus_parts(told: Any) -> None:
    said = "\n".join(told["emulated"])
    assert "10 patches of parallel/device.py" in said
    assert "FusedAdam: kernels.adamw.FlatAdamW" in said
    assert "NCCL: gloo" in said


CPU = Cpu(model="x", cores=2, features=(), memory_bytes=24 * 2**30)


@pytest.mark.parametrize(
    ("kinds", "word"),
    [
        ((), "no FP8"),
        (("fp8_hybrid_emulated",), "FP8 emulated"),
        (("fp8_hybrid", "fp8_hybrid_emulated"), "FP8 in hardware"),
    ],
)
def test_one_line_tells_what_a_run_computes_on(
    kinds: tuple[str, ...], word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(used, "fp8_kinds", lambda: kinds)
    assert machine_line(Device(kind="cpu", backend="gloo"), CPU) == (
        "this machine: 2 cores, 24 GiB, no GPU; attention and experts in plain torch,"
        f" {word}; python launch/doctor.py tells more"
    )


def test_the_line_names_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 8)
    line = machine_line(Device(kind="cuda", backend="nccl"), CPU)
    assert "24 GiB, 8 x NVIDIA H200; attention and experts in Transformer Engine" in line
