"""transformers' A.X K1 with weights seeded by tensor name, saved by transformers itself.

Nothing of ours is in the folder but the MTP layer, for which transformers' class has no place: so a
test that reads the folder and finds the oracle's numbers needs no trust in our exporter.
"""

import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AXK1ForCausalLM

from pretrain.model.spec import ModelSpec
from pretrain.serving.names import HUB_ROUTER_BIAS, name_table
from tests.pretrain.serving import twin

SPREAD = 0.15  # logits reach 5: large enough to show a mistake


def seeded(name: str, shape: tuple[int, ...]) -> Tensor:
    """Return values that depend on the tensor's hub name only; norms around 1."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    values = torch.randn(shape, generator=generator) * SPREAD
    return values + 1 if name.endswith("norm.weight") else values


def make_hub(
    folder: Path,
    spec: ModelSpec,
    *,
    router_bias: bool = False,
    dtype: torch.dtype = torch.float32,
    **saving: Any,
) -> None:
    """Save an A.X K1 as transformers does.

    Args:
        folder: to be made.
        spec: the model's sizes.
        router_bias: whether routers get a trained bias; else the tensors are not in the folder.
        dtype: of all but router biases.
        saving: for `save_pretrained`, such as max_shard_size.
    """
    model = AXK1ForCausalLM(twin.transformers_config(replace(spec, num_mtp_layers=0)))
    model.save_pretrained(folder)  # once, to learn its own names of what it holds
    state = {
        name: seeded(name, tuple(tensor.shape)).to(_dtype(name, dtype))
        for name, tensor in load_file(folder / "model.safetensors").items()
        if router_bias or not name.endswith(HUB_ROUTER_BIAS)
    }
    for row in name_table(spec, router_bias=router_bias):
        if row.megatron.startswith("mtp."):
            state[row.hub] = seeded(row.hub, row.shape).to(_dtype(row.hub, dtype))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    if saving:
        loaded = AXK1ForCausalLM.from_pretrained(folder, dtype=dtype)
        (folder / "model.safetensors").unlink()
        loaded.save_pretrained(folder, **saving)
    config = json.loads((folder / "config.json").read_text())
    config["num_nextn_predict_layers"] = spec.num_mtp_layers
    (folder / "config.json").write_text(json.dumps(config))


def _dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if name.endswith(HUB_ROUTER_BIAS) else dtype


@dataclass(frozen=True, kw_only=True)
class Truth:
    """What transformers makes of a batch."""

    logits: NDArray[np.float32]
    loss: float
    experts: dict[int, NDArray[np.int64]]
    """By layer: `[B, S, k]`, ascending."""
    expert_weights: dict[int, NDArray[np.float32]]
    gradient_norms: dict[str, float]
    """By hub name."""


def truth(folder: Path, ids: NDArray[np.int64], labels: NDArray[np.int64]) -> Truth:
    """Run a batch through transformers' model of a folder, with gradients."""
    model: Any = AXK1ForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager"
    )
    chosen: dict[int, tuple[Tensor, Tensor]] = {}

    def watch(layer: int) -> Any:
        def keep(_module: object, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
            chosen[layer] = (inputs[1].detach(), inputs[2].detach())

        return keep

    for layer, block in enumerate(model.model.layers):
        if hasattr(block.mlp, "experts"):
            block.mlp.experts.register_forward_pre_hook(watch(layer))
    output = model(torch.from_numpy(ids), labels=torch.from_numpy(labels))
    output.loss.backward()
    experts: dict[int, NDArray[np.int64]] = {}
    weights: dict[int, NDArray[np.float32]] = {}
    for layer, (index_TK, weight_TK) in chosen.items():
        ordered, order = index_TK.sort(-1)
        experts[layer] = ordered.view(*ids.shape, -1).numpy()
        weights[layer] = weight_TK.gather(-1, order).view(*ids.shape, -1).float().numpy()
    return Truth(
        logits=output.logits.detach().numpy(),
        loss=output.loss.item(),
        experts=experts,
        expert_weights=weights,
        gradient_norms=dict(_gradient_norms(model)),
    )


def _gradient_norms(model: Any) -> Iterator[tuple[str, float]]:
    """Yield gradient norms under hub names; transformers fuses experts and moves one norm."""
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        if name.endswith("experts.gate_up_proj"):
            for expert, fused in enumerate(gradient):
                for part, half in zip(("gate", "up"), fused.chunk(2), strict=True):
                    hub = name.replace("gate_up_proj", f"{expert}.{part}_proj.weight")
                    yield hub, float(half.norm())
        elif name.endswith("experts.down_proj"):
            for expert, down in enumerate(gradient):
                yield name.replace("down_proj", f"{expert}.down_proj.weight"), float(down.norm())
        else:
            yield (
                name.replace("mlp.post_mlp_layernorm", "post_mlp_layernorm"),
                float(gradient.norm()),
            )
