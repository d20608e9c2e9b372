"""Which sizes has a decoder transformer, ours or a published one?

`Architecture` describes what published measurements need beyond our own model: grouped-query
attention with or without sliding windows beside MLA, dense models, tied embeddings, biases. Closed
forms, integers, no torch. For A.X K1 parameters and FLOP equal pretrain/model/count.py exactly;
for the others they are checked against transformers' modules and NVIDIA's published tables.
"""

from dataclasses import dataclass

from pretrain.model.spec import ModelSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupedAttention:
    """Attention whose query heads share keys and values in groups (GQA; MHA if as many of both)."""

    num_heads: int
    """Query heads."""
    num_kv_heads: int
    """Key and value heads."""
    head_size: int
    """Components of each head."""
    num_bias_values: int = 0
    """Biases of the four projections and sinks in a layer; 0: none."""
    qk_norm: bool = False
    """RMSNorm of `head_size` over queries and over keys."""

    @property
    def score_size(self) -> int:
        """Components of a query and key that a score multiplies."""
        return self.head_size

    @property
    def value_size(self) -> int:
        """Components of a head's value."""
        return self.head_size

    def matrices(self, hidden_size: int) -> tuple[tuple[int, int], ...]:
        """Return `(inputs, outputs)` of the layer's projections: queries, keys and values; out."""
        inner = self.num_heads * self.head_size
        return (
            (hidden_size, inner + 2 * self.num_kv_heads * self.head_size),
            (inner, hidden_size),
        )

    @property
    def num_vector_values(self) -> int:
        """Parameters of norms and biases in a layer."""
        return self.num_bias_values + (2 * self.head_size if self.qk_norm else 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentAttention:
    """MLA: queries, keys and values from latents."""

    num_heads: int
    """Heads."""
    q_lora_rank: int
    """Query latent; 0: queries come from the residual stream."""
    kv_lora_rank: int
    """Key and value latent."""
    qk_nope_head_size: int
    """Query and key components without position."""
    qk_rope_head_size: int
    """Query and key components with rotary position, shared by all heads' keys."""
    v_head_size: int
    """Value components."""

    @property
    def score_size(self) -> int:
        """Components of a query and key that a score multiplies."""
        return self.qk_nope_head_size + self.qk_rope_head_size

    @property
    def value_size(self) -> int:
        """Components of a head's value."""
        return self.v_head_size

    def matrices(self, hidden_size: int) -> tuple[tuple[int, int], ...]:
        """Return `(inputs, outputs)` of the layer's projections: q down and up, kv, out."""
        heads = self.num_heads
        queries = heads * self.score_size
        down_up = ((hidden_size, self.q_lora_rank), (self.q_lora_rank, queries))
        return (
            *(down_up if self.q_lora_rank else ((hidden_size, queries),)),
            (hidden_size, self.kv_lora_rank + self.qk_rope_head_size),
            (self.kv_lora_rank, heads * (self.qk_nope_head_size + self.v_head_size)),
            (heads * self.v_head_size, hidden_size),
        )

    @property
    def num_vector_values(self) -> int:
        """Parameters of the two latent norms in a layer."""
        return self.q_lora_rank + self.kv_lora_rank


Attention = GroupedAttention | LatentAttention


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """Every size of a decoder transformer with gated FFNs, dense or MoE.

    Raises:
        ValueError: if a size is impossible.
    """

    name: str
    """As published."""
    num_layers: int
    """Decoder layers, dense and MoE, without MTP."""
    num_dense_layers: int
    """First layers with a dense FFN; `num_layers` in a dense model."""
    hidden_size: int
    """Residual stream."""
    attention: Attention
    """The same in every layer but for the window."""
    dense_ffn_size: int = 0
    """Inner size of the dense FFN; 0 without dense layers."""
    num_routed_experts: int = 0
    """Experts in each MoE layer; 0 without MoE layers."""
    num_experts_per_token: int = 0
    """Experts chosen for each token."""
    expert_ffn_size: int = 0
    """Inner size of one expert."""
    num_shared_experts: int = 0
    """Experts every token passes."""
    num_expert_groups: int = 1
    """Groups the experts are divided into; 1: none."""
    num_groups_per_token: int = 1
    """Groups a token may choose experts from."""
    vocab_size: int
    """Rows of the embedding."""
    tied_embedding: bool = False
    """Whether the head is the embedding."""
    num_mtp_layers: int = 0
    """MTP modules; each is one more layer like the last, with a projection of two streams."""
    window_tokens: int = 0
    """Keys a query of a windowed layer sees at most; 0: no windowed layers."""
    num_windowed_layers: int = 0
    """Layers with the window."""
    post_ffn_norm: bool = False
    """A norm after the FFN of MoE layers as well (dual norm)."""
    ffn_bias: bool = False
    """Biases in experts and router (GPT-OSS)."""

    def __post_init__(self) -> None:
        if min(self.num_layers, self.hidden_size, self.vocab_size) < 1:
            raise ValueError(
                f"{self.name}: num_layers={self.num_layers}, hidden_size={self.hidden_size},"
                f" vocab_size={self.vocab_size} given, at least 1 each is allowed"
            )
        if not 0 <= self.num_dense_layers <= self.num_layers:
            raise ValueError(
                f"{self.name}: num_dense_layers={self.num_dense_layers} given, 0 to num_layers ="
                f" {self.num_layers} is allowed"
            )
        if bool(self.num_dense_layers) and self.dense_ffn_size < 1:
            raise ValueError(f"{self.name}: dense layers without dense_ffn_size")
        expert_sizes = (self.num_routed_experts, self.num_experts_per_token, self.expert_ffn_size)
        if self.num_moe_layers and min(expert_sizes) < 1:
            raise ValueError(
                f"{self.name}: {self.num_moe_layers} MoE layers with num_routed_experts,"
                f" num_experts_per_token, expert_ffn_size = {expert_sizes} given, at least 1 each"
                " is allowed"
            )
        if not 0 <= self.num_windowed_layers <= self.num_layers:
            raise ValueError(f"{self.name}: num_windowed_layers={self.num_windowed_layers} given")

    @property
    def num_moe_layers(self) -> int:
        """MoE layers of the decoder, without MTP."""
        return self.num_layers - self.num_dense_layers

    @property
    def shared_ffn_size(self) -> int:
        """Inner size of all shared experts together."""
        return self.num_shared_experts * self.expert_ffn_size

    @property
    def mtp_is_moe(self) -> bool:
        """Whether the layer in an MTP module is an MoE layer: as the last layer is."""
        return self.num_moe_layers > 0

    @property
    def attention_parameters(self) -> int:
        """One layer's attention, latent norms and biases included; A.X K1 101,124,096."""
        matrices = self.attention.matrices(self.hidden_size)
        return sum(rows * columns for rows, columns in matrices) + self.attention.num_vector_values

    @property
    def expert_parameters(self) -> int:
        """One routed expert; A.X K1 44,040,192."""
        biases = 2 * self.expert_ffn_size + self.hidden_size if self.ffn_bias else 0
        return 3 * self.hidden_size * self.expert_ffn_size + biases

    @property
    def dense_layer_parameters(self) -> int:
        """A whole dense layer: attention, two norms, FFN; A.X K1 497,500,160."""
        ffn = 3 * self.hidden_size * self.dense_ffn_size
        return self.attention_parameters + 2 * self.hidden_size + ffn

    @property
    def around_experts_parameters(self) -> int:
        """An MoE layer without its routed experts: attention, norms, router, shared experts."""
        hidden = self.hidden_size
        router = self.num_routed_experts * (hidden + (1 if self.ffn_bias else 0))
        norms = (3 if self.post_ffn_norm else 2) * hidden
        return self.attention_parameters + norms + router + 3 * hidden * self.shared_ffn_size

    @property
    def moe_layer_parameters(self) -> int:
        """A whole MoE layer; A.X K1 8,602,278,912."""
        routed = self.num_routed_experts * self.expert_parameters
        return self.around_experts_parameters + routed

    @property
    def embedding_parameters(self) -> int:
        """The input embedding; the head has as many unless it is tied."""
        return self.vocab_size * self.hidden_size

    @property
    def mtp_module_parameters(self) -> int:
        """One MTP module, embedding and head shared: projection, layer, three norms."""
        layer = self.moe_layer_parameters if self.mtp_is_moe else self.dense_layer_parameters
        return 2 * self.hidden_size**2 + 3 * self.hidden_size + layer

    @property
    def main_parameters(self) -> int:
        """The model without MTP; A.X K1 518,983,052,288."""
        ends = (1 if self.tied_embedding else 2) * self.embedding_parameters + self.hidden_size
        dense = self.num_dense_layers * self.dense_layer_parameters
        return ends + dense + self.num_moe_layers * self.moe_layer_parameters

    @property
    def total_parameters(self) -> int:
        """Main model and MTP; A.X K1 527,688,113,152."""
        return self.main_parameters + self.num_mtp_layers * self.mtp_module_parameters

    def seen_keys(self, sequence_tokens: int, *, windowed: bool = False) -> float:
        """Return the keys a query sees on average in a causal sequence of `sequence_tokens`."""
        window = min(self.window_tokens, sequence_tokens)
        if windowed and window:
            return window - window * (window - 1) / (2 * sequence_tokens)
        return (sequence_tokens + 1) / 2

    def core_flop_per_token(self, sequence_tokens: int, *, windowed: bool = False) -> float:
        """Return forward FLOP of one layer's attention core per token: scores and values."""
        sizes = self.attention.score_size + self.attention.value_size
        keys = self.seen_keys(sequence_tokens, windowed=windowed)
        return 2 * keys * self.attention.num_heads * sizes

    def flop_per_token(self, *, sequence_tokens: int, with_mtp: bool = True) -> float:
        """Return the floating-point operations to train on one token.

        Convention of pretrain/model/count.py and NVIDIA's tables: 6 per parameter of every matrix a
            token passes, attention causal, head counted, embedding and router not.

        Args:
            sequence_tokens: length of the training sequences.
            with_mtp: whether MTP modules are counted.

        Returns:
            FLOP per token; DeepSeek-V3 at 4,096: 2.498e11 without MTP and 2.600e11 with it.

        Source: NVIDIA Megatron Bridge, docs/performance-summary.md: TFLOP/s over tokens/s.
        """
        hidden = self.hidden_size
        matrices = sum(rows * columns for rows, columns in self.attention.matrices(hidden))
        full = 2 * matrices + self.core_flop_per_token(sequence_tokens)
        windowed = self.core_flop_per_token(sequence_tokens, windowed=True)
        saved = self.num_windowed_layers * (self.core_flop_per_token(sequence_tokens) - windowed)
        ffn = 2 * 3 * hidden
        dense = full + ffn * self.dense_ffn_size
        chosen = self.num_experts_per_token * self.expert_ffn_size
        moe = full + ffn * (chosen + self.shared_ffn_size)
        head = 2 * self.vocab_size * hidden
        module = 2 * 2 * hidden**2 + (moe if self.mtp_is_moe else dense) + head
        main = self.num_dense_layers * dense + self.num_moe_layers * moe - saved + head
        return 3 * (main + (self.num_mtp_layers * module if with_mtp else 0))


def architecture_of(spec: ModelSpec, *, name: str = "A.X K1") -> Architecture:
    """Return our model's sizes as an `Architecture`.

    Args:
        spec: the model.
        name: what tables call it.
    """
    return Architecture(
        name=name,
        num_layers=spec.num_layers,
        num_dense_layers=spec.num_dense_layers,
        hidden_size=spec.hidden_size,
        attention=LatentAttention(
            num_heads=spec.num_heads,
            q_lora_rank=spec.q_lora_rank,
            kv_lora_rank=spec.kv_lora_rank,
            qk_nope_head_size=spec.qk_nope_head_size,
            qk_rope_head_size=spec.qk_rope_head_size,
            v_head_size=spec.v_head_size,
        ),
        dense_ffn_size=spec.dense_ffn_size,
        num_routed_experts=spec.num_routed_experts,
        num_experts_per_token=spec.num_experts_per_token,
        expert_ffn_size=spec.expert_ffn_size,
        num_shared_experts=spec.num_shared_experts,
        num_expert_groups=spec.num_expert_groups,
        num_groups_per_token=spec.num_groups_per_token,
        vocab_size=spec.vocab_size,
        num_mtp_layers=spec.num_mtp_layers,
        post_ffn_norm=spec.dual_norm,
    )
