"""How many parameters does megatron-core really build, on each rank of a layout, without memory?

The modules are built on torch's meta device, where a tensor has a shape and no storage: all 519B of
A.X K1 in one process within seconds. The closed forms of count.py are checked against it.
"""

import dataclasses
from typing import Any

import torch

from parallel import groups
from parallel.device import Device
from parallel.layout import Layout
from pretrain.model.assemble import build_chunks
from pretrain.model.load_balance import LoadBalance
from pretrain.model.precision import Precision
from pretrain.model.spec import ModelSpec
from pretrain.model.transformer_config import transformer_config


def build_on_meta(spec: ModelSpec, *, layout: Layout) -> dict[str, int]:
    """Return the parameters of this rank by name, layers numbered through the whole model.

    A name is the same on every stage that holds a copy (the embedding, which MTP reads on the last
    stage): the union over the stages of a pipeline counts each weight once.

    Args:
        spec: the model's sizes.
        layout: how ranks divide it; tensor and expert ranks count their own part.

    Collective: every rank calls it; starts the layout's groups.
    """
    device = groups.join_world()
    groups.start_groups(layout)
    counts: dict[str, int] = {}
    for chunk in chunks_on_meta(spec, layout=layout, device=device):
        for name, parameter in chunk.named_parameters():
            counts[_global_name(name, chunk)] = parameter.numel()
    return counts


def chunks_on_meta(spec: ModelSpec, *, layout: Layout, device: Device) -> list[Any]:
    """Return this rank's model chunks in bf16, shapes without storage.

    Args:
        spec: the model's sizes.
        layout: the one whose groups are started.
        device: decides between Transformer Engine's modules and local ones.
    """
    config = transformer_config(
        spec,
        layout=layout,
        device=device,
        precision=Precision(kind="bf16"),
        load_balance=LoadBalance(),
        mtp_loss_weight=0.3,
    )
    config = dataclasses.replace(config, init_model_with_meta_device=True)
    with torch.device("meta"):
        chunks = build_chunks(
            spec, config=config, device=device, layout=layout, max_tokens=spec.max_context_tokens
        )
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            assert parameter.is_meta, f"{name} takes memory"
    return list(chunks)


def _global_name(name: str, chunk: Any) -> str:
    """Return `name` with the number that its decoder layer, if any, has in the whole model."""
    parts = name.split(".")
    if parts[:2] == ["decoder", "layers"]:
        parts[2] = str(chunk.decoder.layers[int(parts[2])].layer_number - 1)
    return ".".join(parts)
