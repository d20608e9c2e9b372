# pyright: basic
# (megatron's specs and config are loosely typed; strict mode would check them, not us)
"""What of this machine is really used, and for what?

No decision is taken here: the functions that take them are asked, those that build a rank's model
among them. launch/doctor.py asks in a process of its own; a run says one line of it when it starts.
"""

import json
from typing import Any, get_args, get_type_hints

import torch

from kernels.early_cross_entropy import early_cross_entropy
from parallel.device import PATCHES, Device, prepare
from parallel.layout import Layout
from parallel.machine import Cpu, read_cpu
from pretrain.checkpoint.staging import Staging
from pretrain.model.assemble import decoder_spec
from pretrain.model.exchange import Exchange, check_exchange_available
from pretrain.model.experts import why_one_by_one
from pretrain.model.load_balance import LoadBalance
from pretrain.model.precision import Precision, check_available
from pretrain.model.spec import ModelSpec, Rope
from pretrain.model.transformer_config import transformer_config
from pretrain.training.optimizer import adam_class

MODULES = {
    "attention core": "self_attention.core_attention",
    "query projection": "self_attention.linear_q_up_proj",
    "latent norms": "self_attention.kv_layernorm",
    "norms": "input_layernorm",
    "layer with the second norm": "",
    "router": "mlp.router",
    "experts": "mlp.experts",
    "shared expert": "mlp.shared_experts",
}
"""Parts of a MoE layer by what we call them: where megatron has them in the layer."""
_FP8 = "fp8"
EMULATED = "emulated"
"""In the name of a precision whose FP8 is computed in a wider format."""


def what_is_used(spec_json: str) -> dict[str, Any]:
    """Return what trains here, as JSON values.

    `parts`: which class or function does each part of training; `emulated`: what stands for
    something that this machine has not; `fp8`: the values of precision.kind that are FP8 and can
    run.

    Args:
        spec_json: the model's sizes, `dataclasses.asdict` of its ModelSpec as JSON.

    Raises:
        RuntimeError: if no run could train on this machine (device.prepare).
    """
    device = prepare()
    values = json.loads(spec_json)
    spec = ModelSpec(**{**values, "rope": Rope(**values["rope"])})
    config = transformer_config(
        spec,
        layout=Layout(),
        device=device,
        precision=Precision(kind="bf16"),
        load_balance=LoadBalance(),
        mtp_loss_weight=0.3,
    )
    layer = decoder_spec(spec, config=config, device=device, stage=0).layer_specs[-1]
    staging = Staging(device.current())
    kinds = fp8_kinds()
    parts = {
        **{part: _class_name(_part_of(layer, place)) for part, place in MODULES.items()},
        **_experts(device),
        "cross-entropy": cross_entropy(config),
        **_loss_in_fp32(device),
        "optimizer": _name(adam_class()),
        "collectives": device.backend,
        "all-to-all": ", ".join(_allowed(Exchange, "dispatcher", check_exchange_available)),
        "FP8": ", ".join(kinds) or "refused",
        "checkpoint": f"a copy in {'pinned' if staging.is_pinned else 'pageable'} memory, then a"
        " thread that writes",
    }
    return {"parts": parts, "emulated": _emulated(device, kinds), "fp8": kinds}


def _emulated(device: Device, kinds: tuple[str, ...]) -> list[str]:
    found = [f"FP8: precision.kind={kind}" for kind in kinds if EMULATED in kind]
    if device.kind == "cpu":
        found += [
            f"CUDA for megatron-core: {len(PATCHES)} patches of parallel/device.py, streams and"
            " events that have nothing to wait for",
            f"FusedAdam: {_name(adam_class())}, with the same state",
            f"NCCL: {device.backend}",
        ]
    return found


def _experts(device: Device) -> dict[str, str]:
    if device.uses_transformer_engine:
        return {}
    why = why_one_by_one(torch.bfloat16)
    return {"experts in bf16": f"one by one: {why}" if why else "as experts"}


def _loss_in_fp32(device: Device) -> dict[str, str]:
    return (
        {}
        if device.uses_transformer_engine
        else {"cross-entropy in fp32": _name(early_cross_entropy)}
    )


def _part_of(layer: Any, place: str) -> Any:
    part = layer
    for name in filter(None, place.split(".")):
        part = getattr(part.submodules, name)
    return part


def _class_name(part: Any) -> str:
    return _name(getattr(part, "module", part))


def _name(thing: Any) -> str:
    return f"{thing.__module__}.{thing.__name__}"


def cross_entropy(config: Any) -> str:
    """Return which function megatron computes the main loss with.

    Args:
        config: megatron's config of the model.

    Source: megatron-core 0.16.1, language_module.py:140.
    """
    if not config.cross_entropy_loss_fusion:
        return "megatron.core.tensor_parallel.vocab_parallel_cross_entropy"
    if config.cross_entropy_fusion_impl == "te":
        return "megatron.core.extensions.transformer_engine.te_parallel_cross_entropy"
    return "megatron.core.fusions.fused_cross_entropy.fused_vocab_parallel_cross_entropy"


def fp8_kinds() -> tuple[str, ...]:
    """Return the values of precision.kind that are FP8 and that this machine can run."""
    return tuple(
        kind for kind in _allowed(Precision, "kind", check_available) if kind.startswith(_FP8)
    )


def _allowed(cls: Any, key: str, check: Any) -> list[str]:
    """Return the values of a field that `check` does not refuse here."""
    found: list[str] = []
    for value in get_args(get_type_hints(cls)[key]):
        try:
            check(cls(**{key: value}))
        except ValueError:
            continue
        found.append(value)
    return found


def machine_line(device: Device, cpu: Cpu | None = None) -> str:
    """Return in one line what this process computes on and through what.

    Args:
        device: of this process.
        cpu: of this machine; None: read now.
    """
    cpu = cpu or read_cpu()
    cores = f"{cpu.cores} core{'' if cpu.cores == 1 else 's'}"
    gpus = f"{torch.accelerator.device_count()} x {device.name}"
    through = "Transformer Engine" if device.uses_transformer_engine else "plain torch"
    return (
        f"this machine: {cores}, {cpu.memory_bytes / 2**30:.0f} GiB,"
        f" {'no GPU' if device.kind == 'cpu' else gpus}; attention and experts in {through},"
        f" {_fp8_word(fp8_kinds())}; python launch/doctor.py tells more"
    )


def _fp8_word(kinds: tuple[str, ...]) -> str:
    if not kinds:
        return "no FP8"
    return "FP8 emulated" if all(EMULATED in kind for kind in kinds) else "FP8 in hardware"
