"""What are the sizes of the model, in the report's words?

One frozen `ModelSpec` holds all of them; conf/model/*.yaml are its values. Everything that follows
from them (counts, FLOP, bytes) is in count.py. No torch: the planner runs on a login node.
"""

from dataclasses import dataclass, fields


@dataclass(frozen=True, kw_only=True, slots=True)
class Rope:
    """Rotary position embedding: base, and YaRN when `scaling_factor` is above 1.

    Raises:
        ValueError: if a value is out of range.

    Source: transformers 5.23 AXK1Config; YaRN, arXiv 2309.00071. What the report leaves open:
        docs/report.md.
    """

    base: float = 10_000.0
    """Base period; 10,000 in A.X K1 at 4K."""
    scaling_factor: float = 1.0
    """Context extension by YaRN; 1: none."""
    original_context_tokens: int = 4096
    """Context before the extension, in tokens; read by YaRN only."""
    beta_fast: float = 32.0
    """Rotations above which a dimension is left as it is."""
    beta_slow: float = 1.0
    """Rotations below which a dimension is interpolated in full."""
    mscale: float = 1.0
    """Scale of cos and sin (YaRN's temperature)."""
    mscale_all_dim: float = 0.0
    """Scale of the attention scores, squared; 0: none."""

    def __post_init__(self) -> None:
        if self.base <= 1:
            raise ValueError(f"rope.base={self.base} given, above 1 is allowed")
        if self.scaling_factor < 1:
            raise ValueError(
                f"rope.scaling_factor={self.scaling_factor} given, 1 (no YaRN) or more is allowed"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec:
    """Every size of an A.X K1; the defaults are none, conf/model gives all values.

    Raises:
        ValueError: if a size is impossible, or group scores would differ between megatron-core and
            transformers.

    Source: report section 2; transformers 5.23 AXK1Config (docs/report.md lists each value).
    """

    num_layers: int
    """Decoder layers, dense and MoE; 61."""
    num_dense_layers: int
    """First layers with a dense FFN; 1."""
    hidden_size: int
    """Residual stream; 7,168."""
    dense_ffn_size: int
    """Inner size of the dense FFN; 18,432."""
    num_routed_experts: int
    """Experts in each MoE layer; 192."""
    num_experts_per_token: int
    """Experts chosen for each token; 8."""
    num_shared_experts: int
    """Experts every token passes, fused into one FFN; 1."""
    expert_ffn_size: int
    """Inner size of one expert; 2,048."""
    num_expert_groups: int
    """Groups the experts are divided into; 8. 1: no groups."""
    num_groups_per_token: int
    """Groups a token may choose experts from; 4."""
    routed_scaling: float
    """Factor on the routed experts' sum; 2.5."""
    num_heads: int
    """Attention heads; 64."""
    q_lora_rank: int
    """Query latent; 1,536."""
    kv_lora_rank: int
    """Key and value latent; 512."""
    qk_nope_head_size: int
    """Query and key components without position; 128."""
    qk_rope_head_size: int
    """Query and key components with rotary position; 64."""
    v_head_size: int
    """Value components; 128."""
    vocab_size: int
    """Ids, padding included; 163,840."""
    max_context_tokens: int
    """Longest sequence the model is meant for; 131,072."""
    num_mtp_layers: int
    """Multi-token-prediction modules; 1."""
    dual_norm: bool = True
    """RMSNorm after the MoE block as well; False is the report's ablation."""
    rms_norm_eps: float = 1e-6
    """Added to the mean square in every RMSNorm of hidden size."""
    init_std: float = 0.006
    """Standard deviation of initial weights. Silent in the report; DeepSeek-V3 uses 0.006."""
    rope: Rope = Rope()

    def __post_init__(self) -> None:
        may_be_zero = ("num_dense_layers", "num_shared_experts", "num_mtp_layers")
        sizes = [f.name for f in fields(self) if f.type is int and f.name not in may_be_zero]
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name}={getattr(self, name)} given, at least 1 is allowed")
        if not 0 <= self.num_dense_layers < self.num_layers:
            raise ValueError(
                f"model.num_dense_layers={self.num_dense_layers} given, 0 to"
                f" {self.num_layers - 1} is allowed"
                f" with model.num_layers={self.num_layers}: at least one layer is MoE"
            )
        if self.num_shared_experts < 1 or self.num_mtp_layers not in (0, 1):
            raise ValueError(
                f"model.num_shared_experts={self.num_shared_experts},"
                f" model.num_mtp_layers={self.num_mtp_layers}"
                " given; at least 1, and 0 or 1, are allowed"
            )
        if self.qk_rope_head_size % 2:
            raise ValueError(
                f"model.qk_rope_head_size={self.qk_rope_head_size} given, an even size is allowed"
            )
        if self.v_head_size > self.qk_head_size:
            raise ValueError(
                f"model.v_head_size={self.v_head_size} given, at most qk_nope_head_size +"
                f" qk_rope_head_size ="
                f" {self.qk_head_size} is allowed"
            )
        self._check_groups()

    def _check_groups(self) -> None:
        experts, groups = self.num_routed_experts, self.num_expert_groups
        if experts % groups or self.num_groups_per_token > groups:
            raise ValueError(
                f"model.num_expert_groups={groups} and"
                f" num_groups_per_token={self.num_groups_per_token} given; the"
                f" groups must divide num_routed_experts={experts}, and a token chooses at most"
                f" all groups"
            )
        choices = self.num_groups_per_token * (experts // groups)
        if self.num_experts_per_token > choices:
            raise ValueError(
                f"model.num_experts_per_token={self.num_experts_per_token} given, at most the"
                f" {choices} experts of"
                f" {self.num_groups_per_token} groups are allowed"
            )
        if groups > 1 and self.num_experts_per_token != 2 * self.num_groups_per_token:
            raise ValueError(
                f"model.num_experts_per_token={self.num_experts_per_token} with"
                f" num_groups_per_token="
                f"{self.num_groups_per_token} given; with groups on, 2 * num_groups_per_token ="
                f" {2 * self.num_groups_per_token} experts per token are allowed: transformers"
                f" and vLLM always score a"
                " group by its best two experts, megatron-core by its best (experts per token /"
                " groups per token), so"
                " any other ratio would train another routing than is served. Change one of the"
                " two keys, or set"
                " model.num_expert_groups=1"
            )

    @property
    def qk_head_size(self) -> int:
        """Query and key head: 128 + 64 = 192 in A.X K1."""
        return self.qk_nope_head_size + self.qk_rope_head_size

    @property
    def num_moe_layers(self) -> int:
        """MoE layers of the decoder, without MTP; 60."""
        return self.num_layers - self.num_dense_layers

    @property
    def shared_ffn_size(self) -> int:
        """Inner size of the fused shared experts; 2,048."""
        return self.num_shared_experts * self.expert_ffn_size
