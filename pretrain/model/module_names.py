"""Which part of the model does a parameter belong to, whatever the layout?

A part is what people look at together: `embedding`, `head`, `final_norm`, and of each layer
`layer_<n>.<attention | mlp | router | experts | shared_experts | norms>`, of the module of
multi-token prediction `mtp.<the same | projection>`; layers are counted from 0.
"""

import re
from collections.abc import Iterator

import torch
from torch.nn import Parameter

from pretrain.model.expert_load import layer_of
from pretrain.model.spec import ModelSpec

_MOE_PARTS = ("attention", "router", "experts", "shared_experts", "norms")
_DENSE_PARTS = ("attention", "mlp", "norms")
_WHOLE = {
    "embedding": "embedding",
    "output_layer": "head",
    "decoder.final_layernorm": "final_norm",
}
_PART = (
    (r"mlp\.router\.", "router"),
    (r"mlp\.experts\.", "experts"),
    (r"mlp\.shared_experts\.", "shared_experts"),
    # Transformer Engine keeps a norm's weight with the matrix product behind it
    (r"(.*layernorm|enorm|hnorm)\.weight|.*layer_norm_weight", "norms"),
    (r"self_attention\.", "attention"),
    (r"mlp\.linear_", "mlp"),
    (r"eh_proj\.", "projection"),
)


def module_names(spec: ModelSpec) -> tuple[str, ...]:
    """Return the parts of a model, in one order on all ranks.

    Args:
        spec: the model.
    """
    layers = [
        f"layer_{layer}.{part}"
        for layer in range(spec.num_layers)
        for part in (_DENSE_PARTS if layer < spec.num_dense_layers else _MOE_PARTS)
    ]
    mtp = [f"mtp.{part}" for part in (*_MOE_PARTS, "projection")] if spec.num_mtp_layers else []
    return ("embedding", *layers, "final_norm", "head", *mtp)


def named_modules_of(chunk: torch.nn.Module, *, num_layers: int) -> Iterator[tuple[str, Parameter]]:
    """Yield each parameter of a chunk with the part of the model that it belongs to.

    Args and errors: see `named_tensors_of`.
    """
    for part, _, parameter in _parts_of(chunk, num_layers=num_layers):
        yield part, parameter


def named_tensors_of(chunk: torch.nn.Module, *, num_layers: int) -> Iterator[tuple[str, Parameter]]:
    """Yield each parameter of a chunk with the name of the tensor of the model that it is part of.

    A tensor is what a layer has one of: all tensor ranks have parts of one
    `layer_3.self_attention.linear_proj.weight`, and so have all experts of the layer of one
    `layer_3.mlp.experts.linear_fc1.weight`.

    Args:
        chunk: a model chunk, not wrapped.
        num_layers: decoder layers and MTP modules of the whole model.

    Raises:
        ValueError: if a parameter belongs to no part.
    """
    for part, inner, parameter in _parts_of(chunk, num_layers=num_layers):
        # megatron's experts are modules, Transformer Engine's numbered weights of one module
        name = re.sub(r"local_experts\.\d+\.|(?<=\.weight)\d+$", "", inner)
        layer, is_of_layer, _ = part.partition(".")
        yield f"{layer}.{name}" if is_of_layer else name, parameter


def _parts_of(chunk: torch.nn.Module, *, num_layers: int) -> Iterator[tuple[str, str, Parameter]]:
    """Yield part, name inside the layer and parameter."""
    modules = dict(chunk.named_modules())
    for name, parameter in chunk.named_parameters():
        whole = next((part for start, part in _WHOLE.items() if name.startswith(start)), None)
        if whole is not None:
            yield whole, name, parameter
            continue
        found = re.match(r"(decoder\.layers\.\d+|mtp\.layers\.\d+(?:\.transformer_layer)?)\.", name)
        inner = name[found.end() :] if found else name
        part = next((part for pattern, part in _PART if re.match(pattern, inner)), None)
        if found is None or part is None:
            raise ValueError(
                f"parameter {name} belongs to no part of pretrain/model/module_names.py"
            )
        if name.startswith("mtp."):
            yield f"mtp.{part}", inner, parameter
        else:
            layer = layer_of(name, modules[found[1]], num_layers=num_layers)
            yield f"layer_{layer}.{part}", inner, parameter
