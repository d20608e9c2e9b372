"""Which megatron-core config does a ModelSpec become?

The one place where the report's words are translated into megatron's. Every option is named that
differs from megatron's default or that the numbers depend on.
"""

from typing import Any

import torch
from megatron.core.transformer.transformer_config import MLATransformerConfig

from parallel.device import Device
from parallel.layout import Layout
from parallel.stages import megatron_pipeline_layout, stage_slots
from pretrain.model.exchange import Exchange, check_exchange_available
from pretrain.model.load_balance import LoadBalance
from pretrain.model.precision import Precision, check_available
from pretrain.model.recompute import Recompute, check_recompute_available
from pretrain.model.spec import ModelSpec

_AUX_LOSS = {
    "sequence_aux": "seq_aux_loss",
    "global_aux": "global_aux_loss",
    "bias": "seq_aux_loss",
}


def transformer_config(
    spec: ModelSpec,
    *,
    layout: Layout,
    device: Device,
    precision: Precision,
    load_balance: LoadBalance,
    mtp_loss_weight: float,
    exchange: Exchange | None = None,
    recompute: Recompute | None = None,
) -> MLATransformerConfig:
    """Return megatron's config of the model on `layout`.

    Args:
        spec: the model's sizes.
        layout: how ranks divide it.
        device: what the ranks compute on.
        precision: number formats.
        load_balance: how experts are kept even.
        mtp_loss_weight: factor on the MTP loss beside the main loss, >= 0.
        exchange: how tokens reach experts; None: all-to-all.
        recompute: what the backward pass computes again; None: nothing.

    Raises:
        ValueError: if the machine cannot run the precision, the exchange or the recomputation, or
            the stages cannot hold the layers (LayoutError).
    """
    check_available(precision)
    exchange, recompute = exchange or Exchange(), recompute or Recompute()
    on_gpu = device.uses_transformer_engine
    check_exchange_available(exchange)
    check_recompute_available(recompute, uses_transformer_engine=on_gpu)
    dtype = torch.bfloat16 if precision.is_low else torch.float32
    return MLATransformerConfig(
        **_sizes(spec),
        **_router(spec, load_balance),
        **_layout(spec, layout),
        **_precision(precision),
        **_exchange(exchange),
        **_recompute(recompute),
        mtp_num_layers=spec.num_mtp_layers or None,
        mtp_loss_scaling_factor=mtp_loss_weight,
        calculate_per_token_loss=True,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=precision.is_low,
        use_cpu_initialization=not on_gpu,
        perform_initialization=False,  # weights are drawn by name: initialise.py
        moe_grouped_gemm=on_gpu,
        moe_permute_fusion=on_gpu,
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=on_gpu,
        bias_activation_fusion=on_gpu,
        masked_softmax_fusion=False,
        persist_layer_norm=on_gpu,
        apply_rope_fusion=on_gpu and spec.rope.scaling_factor > 1,
        cross_entropy_loss_fusion=on_gpu,
        cuda_graph_scope=[],  # whole layers; the default "full" says the same with a warning
        # gloo may still be reading the buffer that megatron would free (wrong numbers
        # without an error).
        deallocate_pipeline_outputs=on_gpu,
    )


def _sizes(spec: ModelSpec) -> dict[str, Any]:
    rope = spec.rope
    return {
        "multi_latent_attention": True,
        "num_layers": spec.num_layers,
        "hidden_size": spec.hidden_size,
        "ffn_hidden_size": spec.dense_ffn_size,
        "num_attention_heads": spec.num_heads,
        "q_lora_rank": spec.q_lora_rank,
        "kv_lora_rank": spec.kv_lora_rank,
        "qk_head_dim": spec.qk_nope_head_size,
        "qk_pos_emb_head_dim": spec.qk_rope_head_size,
        "v_head_dim": spec.v_head_size,
        "rope_type": "yarn" if rope.scaling_factor > 1 else "rope",
        "rotary_base": rope.base,
        "rotary_scaling_factor": rope.scaling_factor,
        "original_max_position_embeddings": rope.original_context_tokens,
        "beta_fast": rope.beta_fast,
        "beta_slow": rope.beta_slow,
        "mscale": rope.mscale,
        "mscale_all_dim": rope.mscale_all_dim,
        "normalization": "RMSNorm",
        "layernorm_epsilon": spec.rms_norm_eps,
        "qk_layernorm": True,  # the latent norms; without it megatron makes them identities
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "init_method_std": spec.init_std,
    }


def _router(spec: ModelSpec, balance: LoadBalance) -> dict[str, Any]:
    grouped = spec.num_expert_groups > 1
    return {
        "num_moe_experts": spec.num_routed_experts,
        "moe_layer_freq": [0] * spec.num_dense_layers + [1] * spec.num_moe_layers,
        "moe_ffn_hidden_size": spec.expert_ffn_size,
        "moe_shared_expert_intermediate_size": spec.shared_ffn_size,
        "moe_router_topk": spec.num_experts_per_token,
        "moe_router_num_groups": spec.num_expert_groups if grouped else None,
        "moe_router_group_topk": spec.num_groups_per_token if grouped else None,
        "moe_router_topk_scaling_factor": spec.routed_scaling,
        "moe_router_score_function": "sigmoid",
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": _AUX_LOSS[balance.kind],
        "moe_aux_loss_coeff": balance.aux_loss_coefficient,
        "moe_router_enable_expert_bias": balance.uses_bias,
        "moe_router_bias_update_rate": balance.bias_update_rate,
    }


def _layout(spec: ModelSpec, layout: Layout) -> dict[str, Any]:
    sizes: dict[str, Any] = {
        "tensor_model_parallel_size": layout.tp,
        "sequence_parallel": layout.sequence_parallel,
        "context_parallel_size": layout.cp,
        "pipeline_model_parallel_size": layout.pp,
        "virtual_pipeline_model_parallel_size": layout.vp if layout.vp > 1 else None,
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.etp,
    }
    if layout.pp > 1:
        slots = stage_slots(
            num_layers=spec.num_layers,
            num_mtp_layers=spec.num_mtp_layers,
            num_stages=layout.pp * layout.vp,
        )
        sizes["pipeline_model_parallel_layout"] = megatron_pipeline_layout(slots)
    if layout.overlaps_hops:  # megatron-core's defaults are batched, with a host sync after each
        sizes |= {"overlap_p2p_comm": True, "batch_p2p_comm": False}
    return sizes


def _precision(precision: Precision) -> dict[str, Any]:
    if precision.kind != "fp8":
        return {}  # emulated FP8 is not megatron's: fp8_modules.py
    options: dict[str, Any] = {
        "fp8": precision.fp8_format,
        "fp8_recipe": precision.fp8_recipe,
        "moe_router_padding_for_quantization": True,
    }
    if precision.num_high_layers:
        options |= {
            "first_last_layers_bf16": True,
            "num_layers_at_start_in_bf16": precision.num_first_high_layers,
            "num_layers_at_end_in_bf16": precision.num_last_high_layers,
        }
    if precision.is_delayed:
        options |= {
            "fp8_margin": precision.fp8_margin,
            "fp8_amax_history_len": precision.fp8_amax_history,
            "fp8_amax_compute_algo": precision.fp8_amax_algorithm,
        }
    return options


def _exchange(exchange: Exchange) -> dict[str, Any]:
    options: dict[str, Any] = {
        "moe_token_dispatcher_type": exchange.dispatcher,
        "moe_shared_expert_overlap": exchange.overlap_shared_expert,
        "overlap_moe_expert_parallel_comm": exchange.overlap_all_to_all,
    }
    if exchange.dispatcher in ("deepep", "hybridep"):
        options |= {
            "moe_token_dispatcher_type": "flex",
            "moe_flex_dispatcher_backend": exchange.dispatcher,
        }
    return options


def _recompute(recompute: Recompute) -> dict[str, Any]:
    if recompute.kind == "selective":
        return {
            "recompute_granularity": "selective",
            "recompute_modules": list(recompute.modules),
        }
    if recompute.kind == "full":
        return {
            "recompute_granularity": "full",
            "recompute_method": recompute.method,
            "recompute_num_layers": recompute.num_layers,
        }
    return {}
