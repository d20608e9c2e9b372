"""How many parameters and how much arithmetic does a model have?

Closed forms over ModelSpec, no torch. The parameter counts are checked against megatron's modules
on the meta device and against transformers (tests/pretrain/model). FLOP counts matrix products
only, 2 for each multiply-add, forward and backward (3 forward passes), attention causal: a query
sees (S + 1) / 2 keys on average.
"""

from dataclasses import dataclass

from pretrain.model.spec import ModelSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class ParameterCount:
    """Parameters by part; A.X K1's values beside each."""

    attention: int
    """One layer's MLA with its two latent norms: 101,124,096."""
    dense_layer: int
    """A whole dense layer: 497,500,160."""
    moe_layer: int
    """A whole MoE layer: 8,602,278,912."""
    moe_layer_active: int
    """What one token uses of it: 498,883,584."""
    embedding: int
    """The input embedding, and as many in the head: 1,174,405,120."""
    main: int
    """The model without MTP: 518,983,052,288."""
    mtp: int
    """All MTP modules, embedding and head shared: 8,705,060,864."""
    active: int
    """What one token uses of the main model, embedding and head counted: 32,779,332,608."""

    @property
    def total(self) -> int:
        """Main model and MTP: 527,688,113,152."""
        return self.main + self.mtp


def count_parameters(spec: ModelSpec) -> ParameterCount:
    """Return the exact parameter counts of `spec`.

    Source: report section 2 (519B total, 33B active); docs/report.md.
    """
    d, heads = spec.hidden_size, spec.num_heads
    attention = (
        d * spec.q_lora_rank
        + spec.q_lora_rank
        + spec.q_lora_rank * heads * spec.qk_head_size
        + d * (spec.kv_lora_rank + spec.qk_rope_head_size)
        + spec.kv_lora_rank
        + spec.kv_lora_rank * heads * (spec.qk_nope_head_size + spec.v_head_size)
        + heads * spec.v_head_size * d
    )
    norms = 2 * d
    dense_layer = attention + norms + 3 * d * spec.dense_ffn_size
    expert = 3 * d * spec.expert_ffn_size
    around_experts = (
        attention
        + norms
        + spec.num_routed_experts * d
        + 3 * d * spec.shared_ffn_size
        + (d if spec.dual_norm else 0)
    )
    moe_layer = around_experts + spec.num_routed_experts * expert
    moe_layer_active = around_experts + spec.num_experts_per_token * expert
    embedding = spec.vocab_size * d
    ends = 2 * embedding + d
    # An MTP module: two norms, the projection of [embedding; hidden], one MoE layer, a final norm.
    mtp_module = 2 * d + 2 * d * d + moe_layer + d
    return ParameterCount(
        attention=attention,
        dense_layer=dense_layer,
        moe_layer=moe_layer,
        moe_layer_active=moe_layer_active,
        embedding=embedding,
        main=ends + spec.num_dense_layers * dense_layer + spec.num_moe_layers * moe_layer,
        mtp=spec.num_mtp_layers * mtp_module,
        active=ends + spec.num_dense_layers * dense_layer + spec.num_moe_layers * moe_layer_active,
    )


def flop_per_token(spec: ModelSpec, *, sequence_tokens: int) -> float:
    """Return the floating-point operations to train on one token, MTP included.

    Convention: 6 per parameter of every matrix a token passes (head once for the main model and
        once for each MTP module; router and input embedding excluded) plus causal attention scores
        and values; recomputation is not counted.

    Args:
        spec: the model.
        sequence_tokens: length of the training sequences, in tokens.

    Returns:
        FLOP per token; A.X K1 at 4,096: 2.05e11 without MTP, 2.15e11 with it.

    Source: docs/report.md (205 and 216 GF per token); the convention is NVIDIA's for DeepSeek-V3.
    """
    attention_matrices = count_parameters(spec).attention - spec.q_lora_rank - spec.kv_lora_rank
    seen_keys = (sequence_tokens + 1) / 2
    scores = 2 * seen_keys * spec.num_heads * (spec.qk_head_size + spec.v_head_size)
    attention = 2 * attention_matrices + scores
    ffn = 2 * 3 * spec.hidden_size
    dense_layer = attention + ffn * spec.dense_ffn_size
    moe_layer = attention + ffn * (
        spec.num_experts_per_token * spec.expert_ffn_size + spec.shared_ffn_size
    )
    head = 2 * spec.vocab_size * spec.hidden_size
    mtp_module = 2 * 2 * spec.hidden_size**2 + moe_layer + head
    forward = (
        spec.num_dense_layers * dense_layer
        + spec.num_moe_layers * moe_layer
        + head
        + spec.num_mtp_layers * mtp_module
    )
    return 3 * forward
