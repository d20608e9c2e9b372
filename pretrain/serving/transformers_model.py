"""How does transformers run a Hugging Face folder, as a whole and a few layers at a time?

The only file that imports transformers, and only when it is asked: the trainer does without.

B batch, S sequence, D model.
"""

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.model.spec import ModelSpec
from pretrain.serving.hub import CONFIG_NAME
from pretrain.serving.hub_files import HubTensors


class ExportMismatchError(RuntimeError):
    """A Hugging Face folder is not the model it should be; names what differs."""


def check_installed() -> None:
    """Refuse to go on without transformers.

    Raises:
        ValueError: if it is not installed.
    """
    if importlib.util.find_spec("transformers") is None:
        raise ValueError(
            "the result is compared with transformers, which is not installed:"
            " pip install -c constraints.txt -e '.[hf]'"
        )


def is_quantised(hub: Path) -> bool:
    """Return whether a folder's weights are FP8 by blocks."""
    return "quantization_config" in json.loads((hub / CONFIG_NAME).read_text(encoding="utf-8"))


def from_pretrained(hub: Path, spec: ModelSpec) -> Any:
    """Return transformers' model of a folder, loaded as a user would, in fp32.

    Raises:
        ExportMismatchError: if transformers misses a tensor, or finds one it does not expect
            (MTP's excepted, for which its class has no place).
    """
    transformers: Any = importlib.import_module("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    options: dict[str, Any] = {"dtype": torch.float32}
    if is_quantised(hub):  # to bf16, as everything else then is; fp32 would be half and half
        options = {"quantization_config": transformers.FineGrainedFP8Config(dequantize=True)}
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        hub,
        output_loading_info=True,
        experts_implementation="eager",  # grouped_mm refuses sizes that are no multiple of 16 bytes
        **options,
    )
    mtp = tuple(
        f"model.layers.{spec.num_layers + module}." for module in range(spec.num_mtp_layers)
    )
    problems = {
        what: sorted(names)[:5]
        for what, found in report.items()
        if (names := {str(n) for n in found if not str(n).startswith(mtp or ("?",))})
    }
    if problems:
        raise ExportMismatchError(f"transformers reports {problems}")
    return model.float().eval()


def run_layers(hub: Path, tensors: HubTensors, block: range, x_BSD: Tensor) -> Tensor:
    """Return what some of transformers' layers make of hidden states.

    Args:
        hub: the folder.
        tensors: its tensors.
        block: which layers.
        x_BSD: `[B, S, D]` fp32, their input.
    """
    modeling: Any = importlib.import_module("transformers.models.axk1.modeling_axk1")
    config = modeling.AXK1Config.from_pretrained(hub)
    config.mlp_layer_types = [config.mlp_layer_types[layer] for layer in block]
    config.num_hidden_layers, config.vocab_size, config.pad_token_id = len(block), 1, None
    config._attn_implementation = config._experts_implementation = "eager"
    with torch.device("meta"):
        model = modeling.AXK1Model(config)
    model = model.to_empty(device="cpu").float().eval()
    model.rotary_emb = modeling.AXK1RotaryEmbedding(config)
    model.norm = torch.nn.Identity()
    state: dict[str, Tensor] = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        for name, tensor in state.items():
            if name.startswith("layers."):
                _, idx, rest = name.split(".", 2)
                _fill(tensor, f"model.layers.{block[int(idx)]}.", rest, tensors)
        output: Tensor = model(inputs_embeds=x_BSD, use_cache=False).last_hidden_state
    return output


def _fill(target: Tensor, layer: str, name: str, hub: HubTensors) -> None:
    """Put a hub tensor where transformers' modules have it; experts are fused there."""
    if name == "mlp.experts.gate_up_proj":
        for expert in range(len(target)):
            gate, up = (
                hub.read_weight(f"{layer}mlp.experts.{expert}.{part}_proj.weight")
                for part in ("gate", "up")
            )
            target[expert] = torch.cat([gate, up])
    elif name == "mlp.experts.down_proj":
        for expert in range(len(target)):
            target[expert] = hub.read_weight(f"{layer}mlp.experts.{expert}.down_proj.weight")
    elif name.endswith("e_score_correction_bias") and layer + name not in hub.tensors:
        target.zero_()
    else:
        name = name.removeprefix("mlp.") if "post_mlp_layernorm" in name else name
        target.copy_(hub.read_weight(layer + name))


def loss_and_gradient_norms(model: Any, ids_BS: Tensor) -> tuple[float, dict[str, float]]:
    """Return the loss on a batch and the norm of its gradient for every tensor, by hub name.

    Args:
        model: from `from_pretrained`.
        ids_BS: `[B, S]`, also the labels.
    """
    loss = model(ids_BS, labels=ids_BS).loss
    loss.backward()
    norms: dict[str, float] = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        if "mlp.experts." not in name:
            norms[name.replace("mlp.post_mlp_layernorm", "post_mlp_layernorm")] = float(
                gradient.norm()
            )
            continue
        prefix, fused = name.rsplit(".", 1)
        parts = ("gate_proj", "up_proj") if fused == "gate_up_proj" else ("down_proj",)
        for expert, whole in enumerate(gradient):
            for part, own in zip(parts, whole.chunk(len(parts)), strict=True):
                norms[f"{prefix}.{expert}.{part}.weight"] = float(own.norm())
    return loss.item(), norms
