"""The same small A.X K1 twice: as ours on one rank, and as transformers' with the same weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AXK1Config, AXK1ForCausalLM

from parallel.groups import join_world, start_groups
from parallel.layout import Layout
from parallel.seeds import seed_ranks
from pretrain.model.assemble import build_chunks
from pretrain.model.initialise import initialise_weights
from pretrain.model.kernels import Kernels
from pretrain.model.load_balance import LoadBalance
from pretrain.model.precision import Precision
from pretrain.model.spec import ModelSpec
from pretrain.model.transformer_config import transformer_config
from pretrain.serving.names import ROUTER_BIAS, to_hugging_face

# All sizes differ, so that none can stand in another's place; the ratios that transformers and
# megatron-core agree on are kept (experts per token = 2 * groups per token). With this spread of
# the weights logits reach 4: large enough to show a mistake, small enough for fp32.
TINY = {
    "num_layers": 4,
    "num_dense_layers": 1,
    "hidden_size": 64,
    "dense_ffn_size": 144,
    "num_routed_experts": 16,
    "num_experts_per_token": 4,
    "num_shared_experts": 1,
    "expert_ffn_size": 40,
    "num_expert_groups": 4,
    "num_groups_per_token": 2,
    "routed_scaling": 2.5,
    "num_heads": 3,
    "q_lora_rank": 48,
    "kv_lora_rank": 32,
    "qk_nope_head_size": 20,
    "qk_rope_head_size": 12,
    "v_head_size": 18,
    "vocab_size": 208,
    "max_context_tokens": 128,
    "num_mtp_layers": 0,
    "rms_norm_eps": 1e-5,  # not the 1e-6 of the latent norms
    "init_std": 0.15,
}
FP32 = Precision(kind="fp32")
NO_BALANCE = LoadBalance(kind="sequence_aux", aux_loss_coefficient=0.0)
BIAS = LoadBalance(kind="bias", aux_loss_coefficient=0.0, bias_update_rate=1e-3)


def tiny_spec(**changes: Any) -> ModelSpec:
    """Return the small model's sizes, some of them changed."""
    return ModelSpec(**(TINY | changes))


MEGATRONS = Kernels(swiglu="megatron", permute="megatron")
"""Its own operators wherever it has one, on a CPU, too."""


def build_ours(
    spec: ModelSpec, *, balance: LoadBalance = NO_BALANCE, kernels: Kernels | None = None
) -> Any:
    """Return our model in fp32 in the current world of one rank, its weights drawn with seed 0.

    Args:
        spec: the model's sizes.
        balance: decides whether routers have a bias.
        kernels: which operators run in kernels of ours; None: the defaults.
    """
    device = join_world()
    layout = Layout()
    start_groups(layout)
    seed_ranks(0)
    config = transformer_config(
        spec,
        layout=layout,
        device=device,
        precision=FP32,
        load_balance=balance,
        mtp_loss_weight=0.3,
    )
    [model] = build_chunks(
        spec,
        config=config,
        device=device,
        layout=layout,
        max_tokens=spec.max_context_tokens,
        kernels=kernels,
    )
    initialise_weights([model], std=spec.init_std, seed=0)
    return model


def tensors(model: torch.nn.Module) -> dict[str, Tensor]:
    """Return the parameters and router biases of our model by name."""
    biases = {n: b for n, b in model.named_buffers() if n.endswith(ROUTER_BIAS)}
    return dict(model.named_parameters()) | biases


def scatter_vectors(model: torch.nn.Module) -> None:
    """Move norm scales off 1 and router biases off 0, so that their places show; in place.

    The biases reach 0.1: sigmoid scores of competing experts differ by less.
    """
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in tensors(model).items():
            if tensor.dim() == 1:
                spread = 0.1 if name.endswith(ROUTER_BIAS) else 0.3
                tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=spread)


def transformers_config(spec: ModelSpec) -> AXK1Config:
    """Return transformers' configuration of `spec`, its layers MoE with post norm always."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": spec.rope.base}
    if spec.rope.scaling_factor > 1:
        rope |= {
            "rope_type": "yarn",
            "factor": spec.rope.scaling_factor,
            "original_max_position_embeddings": spec.rope.original_context_tokens,
            "beta_fast": spec.rope.beta_fast,
            "beta_slow": spec.rope.beta_slow,
            "mscale": spec.rope.mscale,
            "mscale_all_dim": spec.rope.mscale_all_dim,
        }
    return AXK1Config(
        vocab_size=spec.vocab_size,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.dense_ffn_size,
        moe_intermediate_size=spec.expert_ffn_size,
        num_hidden_layers=spec.num_layers,
        num_attention_heads=spec.num_heads,
        num_key_value_heads=spec.num_heads,
        n_shared_experts=spec.num_shared_experts,
        n_routed_experts=spec.num_routed_experts,
        routed_scaling_factor=spec.routed_scaling,
        kv_lora_rank=spec.kv_lora_rank,
        q_lora_rank=spec.q_lora_rank,
        qk_rope_head_dim=spec.qk_rope_head_size,
        qk_nope_head_dim=spec.qk_nope_head_size,
        v_head_dim=spec.v_head_size,
        n_group=spec.num_expert_groups,
        topk_group=spec.num_groups_per_token,
        num_experts_per_tok=spec.num_experts_per_token,
        max_position_embeddings=spec.max_context_tokens,
        rms_norm_eps=spec.rms_norm_eps,
        rope_parameters=rope,
        mlp_layer_types=["dense"] * spec.num_dense_layers + ["sparse"] * spec.num_moe_layers,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
    )


def build_transformers(
    state: Mapping[str, Tensor], spec: ModelSpec, folder: Path, **options: Any
) -> AXK1ForCausalLM:
    """Return transformers' model with our weights, loaded in fp32 as a user would load it.

    Args:
        state: our tensors by megatron name.
        spec: the model's sizes.
        folder: where the checkpoint is written.
        options: for `from_pretrained`, such as attn_implementation.
    """
    folder.mkdir(parents=True, exist_ok=True)
    transformers_config(spec).save_pretrained(folder)
    hub = {name: t.detach().contiguous() for name, t in to_hugging_face(state, spec).items()}
    save_file(hub, folder / "model.safetensors", metadata={"format": "pt"})
    loaded: Any = AXK1ForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, **options
    )
    model, report = loaded
    problems = {what: names for what, names in report.items() if names}
    assert not problems, f"transformers did not take our tensors as they are: {problems}"
    return model
