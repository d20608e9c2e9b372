"""How does this rank's part of the model come together from megatron-core's modules?

megatron's layer specs, with a few modules exchanged: the layer and the router of MoE blocks (second
RMSNorm, scale of the auxiliary loss), and, where there is no Transformer Engine, the norms, the
core attention, the experts, the two down-projections of MLA and, in fp32, the loss. Nothing of
megatron is copied.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_decoder_layer_specs,
    get_gpt_mtp_block_spec,
)
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.post_training.modelopt.layers import Linear as ReplicatedLinear
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import MLATransformerConfig

from kernels.cross_entropy import cross_entropy
from kernels.early_cross_entropy import early_cross_entropy
from parallel import groups
from parallel.context import put_right_megatron
from parallel.device import Device
from parallel.layout import Layout
from parallel.reduce import max_over_scale_ranks
from pretrain.model.activation import fuse_swiglu
from pretrain.model.attention import CoreAttention
from pretrain.model.dispatcher import fuse_permutation
from pretrain.model.dual_norm_layer import DualNormLayer, fuse_combines, fuse_dual_norms
from pretrain.model.experts import Experts, mark_expert_parameters
from pretrain.model.fp8_histories import Fp8Histories
from pretrain.model.fp8_modules import emulate_fp8
from pretrain.model.head import ChunkedLossModel
from pretrain.model.kernels import Kernels
from pretrain.model.norm import LATENT_NORM_EPS, RMSNorm
from pretrain.model.precision import Precision
from pretrain.model.rotation import fuse_rotation
from pretrain.model.router import ScaledAuxLossRouter, fuse_routers
from pretrain.model.spec import ModelSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """Which part of the pipeline a model chunk is."""

    is_first: bool
    """Holds the embedding."""
    is_last: bool
    """Holds the final norm, the head and the loss."""
    vp_stage: int | None = None
    """Index of the chunk on its rank with virtual pipeline, else None."""


def build_chunks(
    spec: ModelSpec,
    *,
    config: MLATransformerConfig,
    device: Device,
    layout: Layout,
    max_tokens: int,
    loss_chunk_tokens: int = 0,
    kernels: Kernels | None = None,
    precision: Precision | None = None,
) -> list[GPTModel]:
    """Return all model chunks of this rank, one or, with virtual pipeline, vp of them.

    Args:
        spec: the model's sizes.
        config: megatron's config of it (transformer_config.py).
        device: decides between Transformer Engine's modules and local ones.
        layout: the one whose process groups are started.
        max_tokens: longest sequence, in tokens.
        loss_chunk_tokens: tokens whose logits exist at once; 0: all (head.py).
        kernels: which operators run in kernels of ours; None: the defaults.
        precision: what runs in FP8; None: nothing.
    """
    chunks = [
        build_chunk(
            spec,
            config=config,
            device=device,
            stage=Stage(
                is_first=groups.is_first_stage() and chunk == 0,
                is_last=groups.is_last_stage() and chunk == layout.vp - 1,
                vp_stage=chunk if layout.vp > 1 else None,
            ),
            max_tokens=max_tokens,
            loss_chunk_tokens=loss_chunk_tokens,
            precision=precision,
        )
        for chunk in range(layout.vp)
    ]
    for chunk in chunks:
        mark_expert_parameters(chunk, layout)
        _use_kernels(chunk, kernels or Kernels(), config=config, device=device)
        if precision is not None and precision.is_emulated:
            products = list(emulate_fp8(chunk, precision=precision, spec=spec).values())
            if products and precision.is_delayed:
                Fp8Histories(chunk, products, reduce=max_over_scale_ranks)
    return chunks


def _use_kernels(
    chunk: GPTModel, kernels: Kernels, *, config: MLATransformerConfig, device: Device
) -> None:
    """Put the chosen kernels of ours into a built chunk: the one place where that is done."""
    is_written_out = _is_written_out(config, device)
    kernels = kernels.made_out(
        is_written_out=is_written_out,
        dispatcher=str(config.moe_token_dispatcher_type),
        is_taken_apart=config.moe_shared_expert_overlap,
        recomputes_activation="moe_act" in (config.recompute_modules or ()),
    )
    if is_written_out:
        fuse_rotation(chunk)
    if kernels.dual_norm == "fused":
        fuse_dual_norms(chunk)
    if kernels.router == "fused":
        fuse_routers(chunk)
    if kernels.swiglu == "fused":
        fuse_swiglu(chunk)
    if kernels.permute == "fused":
        fuse_permutation(chunk)
    if kernels.combine == "fused":
        fuse_combines(chunk)


def build_chunk(
    spec: ModelSpec,
    *,
    config: MLATransformerConfig,
    device: Device,
    stage: Stage,
    max_tokens: int,
    loss_chunk_tokens: int = 0,
    precision: Precision | None = None,
) -> GPTModel:
    """Return one model chunk of this rank, its weights not yet drawn (initialise.py).

    Args:
        spec: the model's sizes.
        config: megatron's config of it (transformer_config.py).
        device: decides between Transformer Engine's modules and local ones.
        stage: which part of the pipeline.
        max_tokens: longest sequence, in tokens.
        loss_chunk_tokens: tokens whose logits exist at once; 0: all (head.py).
        precision: what runs in FP8; None: nothing.

    Reads the current process groups, so they must be started.
    """
    put_right_megatron()
    decoder = decoder_spec(spec, config=config, device=device, vp_stage=stage.vp_stage)
    norm = decoder.layer_norm
    exchange = _exchange_modules(spec, norm, device)
    model = _model_class(config, device, loss_chunk_tokens)
    mtp = _mtp_spec(config, exchange, norm, device, stage.vp_stage)
    if mtp is not None and precision is not None and precision.kind == "fp8":
        mtp = _without_fp8_projection(mtp, precision)
    return model(
        config,
        decoder,
        spec.vocab_size,
        max_tokens,
        pre_process=stage.is_first,
        post_process=stage.is_last,
        position_embedding_type="none",  # MLA rotates inside
        share_embeddings_and_output_weights=False,
        mtp_block_spec=mtp,
        vp_stage=stage.vp_stage,
    )


def _model_class(
    config: MLATransformerConfig, device: Device, loss_chunk_tokens: int
) -> Callable[..., GPTModel]:
    """Return megatron's model, or the one with a loss of ours."""
    if loss_chunk_tokens:
        loss = partial(cross_entropy, chunk_tokens=loss_chunk_tokens)
        return partial(ChunkedLossModel, loss=loss)
    if _is_written_out(config, device):
        return partial(ChunkedLossModel, loss=early_cross_entropy)
    return GPTModel


def _is_written_out(config: MLATransformerConfig, device: Device) -> bool:
    """Return whether operators of ours run wherever there is one: fp32 without a GPU."""
    return not device.uses_transformer_engine and not config.bf16


def decoder_spec(
    spec: ModelSpec,
    *,
    config: MLATransformerConfig,
    device: Device,
    vp_stage: int | None = None,
    stage: int | None = None,
) -> Any:
    """Return megatron's spec of a stage's decoder: which class each part of a layer is.

    Args:
        spec: the model's sizes.
        config: megatron's config of it (transformer_config.py).
        device: decides between Transformer Engine's modules and local ones.
        vp_stage: index of the chunk on its rank with virtual pipeline, else None.
        stage: which pipeline rank; None asks the current process groups.
    """
    decoder: Any = get_gpt_decoder_block_spec(
        config,
        device.uses_transformer_engine,
        normalization="RMSNorm",
        vp_stage=vp_stage,
        pp_rank=stage,
    )
    norm = _norm(decoder.layer_norm, device)
    exchange = _exchange_modules(spec, norm, device)
    return replace(
        decoder, layer_specs=[exchange(layer) for layer in decoder.layer_specs], layer_norm=norm
    )


def _without_fp8_projection(mtp: Any, precision: Precision) -> Any:
    """Return MTP's spec with a projection that Transformer Engine does not compute.

    megatron-core runs all of MTP in one FP8 context (multi_token_prediction.py:773), so a
    projection of Transformer Engine would be in FP8.
    """
    if "mtp_projection" not in precision.high_precision:
        return mtp
    layers = [replace_submodules(one, eh_proj=ColumnParallelLinear) for one in mtp.layer_specs]
    return replace(mtp, layer_specs=layers)


def _norm(transformer_engine_norm: Any, device: Device) -> Any:
    return transformer_engine_norm if device.uses_transformer_engine else RMSNorm


def _exchange_modules(
    spec: ModelSpec, norm: Any, device: Device
) -> Callable[[ModuleSpec], ModuleSpec]:
    def exchange(layer: ModuleSpec) -> ModuleSpec:
        parts: Any = layer.submodules
        if not device.uses_transformer_engine:
            latent_norm = ModuleSpec(module=RMSNorm, params={"fixed_eps": LATENT_NORM_EPS})
            attention = replace_submodules(
                parts.self_attention,
                q_layernorm=latent_norm,
                kv_layernorm=latent_norm,
                core_attention=CoreAttention,
                # Replicated, as Transformer Engine does: megatron's local spec cuts them by
                # columns, whose gathered
                # rotary key then gets only the local heads' gradient (wrong numbers with
                # tp > 1).
                linear_q_down_proj=ReplicatedLinear,
                linear_kv_down_proj=ReplicatedLinear,
            )
            parts = replace(
                parts, input_layernorm=norm, pre_mlp_layernorm=norm, self_attention=attention
            )
        if parts.mlp.module is not MoELayer:
            return ModuleSpec(module=layer.module, params=layer.params, submodules=parts)
        mlp = replace_submodules(parts.mlp, router=ScaledAuxLossRouter)
        if not device.uses_transformer_engine:
            sequential = parts.mlp.submodules.experts
            experts = ModuleSpec(module=Experts, submodules=sequential.submodules)
            mlp = replace_submodules(mlp, experts=experts)
        parts = replace(parts, mlp=mlp)
        if spec.dual_norm:
            return ModuleSpec(
                module=DualNormLayer, params={"post_mlp_norm": norm}, submodules=parts
            )
        return ModuleSpec(module=layer.module, params=layer.params, submodules=parts)

    return exchange


def replace_submodules(module: ModuleSpec, **parts: Any) -> ModuleSpec:
    """Return a copy of `module` with some of its submodules exchanged."""
    submodules: Any = module.submodules
    return ModuleSpec(
        module=module.module, params=module.params, submodules=replace(submodules, **parts)
    )


def _mtp_spec(
    config: MLATransformerConfig,
    exchange: Callable[[ModuleSpec], ModuleSpec],
    norm: Any,
    device: Device,
    vp_stage: int | None,
) -> Any:
    if not config.mtp_num_layers:
        return None
    on_gpu = device.uses_transformer_engine
    layer_specs: Any = get_gpt_decoder_layer_specs(config, on_gpu, "RMSNorm")
    block = get_gpt_decoder_block_spec(config, on_gpu, normalization="RMSNorm", vp_stage=vp_stage)
    mtp: Any = get_gpt_mtp_block_spec(
        config, replace(block, layer_specs=[exchange(layer_specs[-1])]), on_gpu, vp_stage=vp_stage
    )
    if mtp is None:
        return None
    layers = [
        replace_submodules(layer, enorm=norm, hnorm=norm, layer_norm=norm)
        for layer in mtp.layer_specs
    ]
    return replace(mtp, layer_specs=layers)
