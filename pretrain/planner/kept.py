"""What does autograd keep of a layer for its backward pass, operator by operator?

A ledger: bytes by operator, with the names of megatron-core's modules, so that each line can be
compared with what saved-tensor hooks count (tests/pretrain/planner/test_kept.py). A tensor that two
operators keep stands at the first. What recomputation throws away is left out where it is named.

T tokens of a micro-batch on a context rank, t = T / tp of them where the sequence is cut, R rows
that the experts of this rank get; D model, N local heads, H query and W value head, F FFN width, E
experts, K chosen; q bytes of a value.
"""

from collections import Counter
from dataclasses import dataclass

from pretrain.planner.architecture import LatentAttention
from pretrain.planner.operators import Operators
from pretrain.planner.workload import Workload

Ledger = Counter[str]
"""Bytes by operator."""
_FP32, _INT64, _INT32, _BOOL = 4, 8, 4, 1
_MASK_ROWS = 256
"""TILE_TOKENS of kernels/attention.py."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """What one micro-batch is on one rank."""

    workload: Workload
    operators: Operators
    routed_rows: int
    """R: tokens that this rank's experts get in a layer, once for each expert chosen."""

    @property
    def tokens(self) -> int:
        """T."""
        return self.workload.micro_batch_tokens

    @property
    def own_tokens(self) -> int:
        """Tokens of a tensor rank where sequence parallelism cuts them."""
        return self.tokens // self.workload.layout.tp

    @property
    def stream(self) -> int:
        """Bytes of the residual stream."""
        return self.own_tokens * self.workload.architecture.hidden_size * self.operators.value_bytes

    @property
    def product_input(self) -> int:
        """Bytes of the stream as a product of a layer keeps it; 1 a value in FP8."""
        return self.own_tokens * self.workload.architecture.hidden_size * self.operators.input_bytes


def balanced_rows(workload: Workload) -> int:
    """Return the rows of a rank's experts if the router spreads tokens evenly: t K etp."""
    own = workload.micro_batch_tokens // workload.layout.tp
    return own * workload.architecture.num_experts_per_token * workload.layout.etp


def norm(sizes: Sizes, width: int, *, tokens: int | None = None) -> int:
    """Return what an RMSNorm over `width` keeps: its input (fused), or copies of it."""
    tokens = sizes.own_tokens if tokens is None else tokens
    if sizes.operators.norm != "elementary":
        return tokens * (width * sizes.operators.value_bytes + _FP32)
    return tokens * (width * (_FP32 + sizes.operators.value_bytes) + _FP32)


def decoder_layer(sizes: Sizes, *, is_moe: bool, takes_norm: bool, gives_norm: bool) -> Ledger:
    """Return what a whole layer keeps, recomputation of `selective` left out.

    Args:
        sizes: of the micro-batch.
        is_moe: whether its FFN is routed experts.
        takes_norm: whether the layer before has computed its first norm (fused dual norm).
        gives_norm: whether it computes the norm that follows (fused dual norm).
    """
    modules = sizes.workload.recompute.modules
    in_linear = sizes.operators.norm_in_linear
    is_latent = isinstance(sizes.workload.architecture.attention, LatentAttention)
    ledger = _norm_and_output(
        sizes,
        "input_layernorm",
        recomputed="layernorm" in modules and (is_latent or not in_linear),
        is_taken=takes_norm,
    )
    ledger += _attention(sizes)
    if is_moe:
        ledger += _norm_and_output(
            sizes, "pre_mlp_layernorm", recomputed="layernorm" in modules, is_taken=False
        )
        ledger += _moe(sizes)
        ledger += _end_of_moe(sizes, gives_norm=gives_norm)
        return ledger
    if "mlp" in modules and in_linear:
        ledger["mlp"] += sizes.stream  # norm and FFN are computed again from the stream
        return ledger
    ledger += _norm_and_output(
        sizes,
        "pre_mlp_layernorm",
        recomputed="layernorm" in modules and not in_linear,
        is_taken=False,
    )
    if "mlp" not in modules:
        ledger += _ffn(sizes, "mlp", sizes.workload.architecture.dense_ffn_size)
    return ledger


def _norm_and_output(sizes: Sizes, name: str, *, recomputed: bool, is_taken: bool) -> Ledger:
    """Return what a norm and the products that read its output keep."""
    if recomputed:
        return Ledger({name: sizes.stream})
    own = 0 if is_taken else norm(sizes, sizes.workload.architecture.hidden_size)
    return Ledger({name: own, f"{name}.output": sizes.product_input})


def _attention(sizes: Sizes) -> Ledger:
    attention = sizes.workload.architecture.attention
    if isinstance(attention, LatentAttention):
        return _latents(sizes, attention) + _core(
            sizes, num_kv_heads=attention.num_heads, is_latent=True
        )
    ledger = _core(sizes, num_kv_heads=attention.num_kv_heads, is_latent=False)
    if attention.qk_norm:
        heads = (attention.num_heads + attention.num_kv_heads) // sizes.workload.layout.tp
        ledger["qk_norm"] = heads * norm(sizes, attention.head_size, tokens=sizes.tokens)
    return ledger


def _latents(sizes: Sizes, attention: LatentAttention) -> Ledger:
    """Return what the way from the stream to queries, keys and values keeps."""
    operators, own = sizes.operators, sizes.own_tokens
    with_rope = attention.kv_lora_rank + attention.qk_rope_head_size
    ledger = Ledger()
    if attention.q_lora_rank:
        ledger["q_layernorm"] = norm(sizes, attention.q_lora_rank)
        ledger["linear_q_up_proj"] = own * attention.q_lora_rank * operators.input_bytes
    ledger["linear_kv_up_proj"] = own * attention.kv_lora_rank * operators.input_bytes
    # the latent is a part of the down-projection's output, all of which stays
    is_fused = operators.norm == "fused"
    ledger["kv_layernorm"] = norm(sizes, with_rope if is_fused else attention.kv_lora_rank)
    elementary_rotary = operators.rotary == "elementary"
    keys_are_gathered = sizes.workload.layout.tp > 1
    sequence = sizes.tokens // sizes.workload.micro_batch_sequences
    rope = attention.qk_rope_head_size
    if "mla_up_proj" in sizes.workload.recompute.modules:
        # what the second pass starts from: both latents above, the rotary key and its angles
        if keys_are_gathered:
            ledger["mla_up_proj"] += sizes.tokens * rope * operators.value_bytes
        elif not is_fused:
            ledger["mla_up_proj"] += own * with_rope * operators.value_bytes
        if elementary_rotary:
            ledger["mla_up_proj"] += sequence * rope * _FP32
    elif elementary_rotary:
        ledger["rotary"] = 4 * sequence * rope * operators.value_bytes
    elif operators.rotary == "tables":
        ledger["rotary"] = 2 * sequence * rope * _FP32
    return ledger


def _core(sizes: Sizes, *, num_kv_heads: int, is_latent: bool) -> Ledger:
    """Return what scores and values, and the projection of their sum, keep."""
    workload, operators = sizes.workload, sizes.operators
    attention, modules = workload.architecture.attention, workload.recompute.modules
    tp, q = workload.layout.tp, operators.value_bytes
    heads, groups = attention.num_heads // tp, max(num_kv_heads // tp, 1)
    score, value = attention.score_size, attention.value_size
    is_padded = operators.attention_core == "padded_flash" and value < score
    wide = score if is_padded else value
    tokens = sizes.tokens
    queries, output = tokens * heads * score * q, tokens * heads * value * q
    is_dropped = is_latent and "mla_up_proj" in modules
    if "core_attn" in modules:
        core = 0 if is_dropped else queries + tokens * groups * (score + value) * q
        return Ledger({"core_attention": core, "linear_proj": output})
    cp = workload.layout.cp
    if operators.attention_core == "compiled":
        keys = cp * tokens * groups * (score + value) * q  # of all context ranks: kept anyway
        core = 2 * tokens * heads * _FP32 + (0 if is_dropped else queries)
        core += 0 if is_dropped and cp == 1 else keys
        return Ledger({"core_attention": core, "linear_proj": output})
    core = tokens * heads * (wide * q + _FP32)
    if cp > 1 and operators.context_exchange == "gather":
        core += cp * tokens * groups * (score + value) * q
        core += 0 if is_dropped else queries
        core += _later_chunks(sizes, padded_values=cp * tokens * groups * wide * q)
    else:
        keys, values = tokens * groups * score * q, tokens * groups * wide * q
        core += (values if wide > value else 0) if is_dropped else queries + keys + values
    # otherwise the projection reads the output itself; cut to its width, exchanged or put together
    # from chunks it is another tensor
    is_copied = is_padded or (cp > 1 and operators.context_exchange != "ring")
    return Ledger({"core_attention": core, "linear_proj": output if is_copied else 0})


def _later_chunks(sizes: Sizes, *, padded_values: int) -> int:
    """Return what both chunks of a context rank keep because neither starts the sequence.

    Each has its own copy of all padded values and a mask of up to 256 rows; rank 0, one of whose
    chunks does start the sequence, keeps less.
    """
    workload = sizes.workload
    chunk = workload.sequence_tokens // (2 * workload.layout.cp)
    masks = min(chunk, _MASK_ROWS) * (2 * workload.layout.cp + 1) * chunk
    return 2 * padded_values + masks * sizes.operators.value_bytes


def _ffn(sizes: Sizes, name: str, width: int) -> Ledger:
    """Return what a gated FFN of `width` keeps after its input: first product, activation."""
    operators = sizes.operators
    values = sizes.tokens * width // sizes.workload.layout.tp
    gate = (2 if operators.gate == "fused" else 4) * values * operators.value_bytes
    return Ledger({f"{name}.gate": gate, f"{name}.linear_fc2": values * operators.input_bytes})


def _moe(sizes: Sizes) -> Ledger:
    model, modules = sizes.workload.architecture, sizes.workload.recompute.modules
    if "moe" in modules:
        return Ledger()
    ledger = _router(sizes) + _experts(sizes)
    if model.num_shared_experts and "shared_experts" not in modules:
        ledger += _ffn(sizes, "shared_experts", model.shared_ffn_size)
    return ledger


def _router(sizes: Sizes) -> Ledger:
    """Return what scores, choices and the sorting of tokens keep, mostly fp32 and int64."""
    model, own = sizes.workload.architecture, sizes.own_tokens
    experts, chosen = model.num_routed_experts, model.num_experts_per_token
    scores = own * experts * _FP32
    mask = own * experts * _BOOL
    router = scores + own * (chosen * (_INT64 + _FP32) + _FP32)
    if model.num_expert_groups > 1:
        router += mask
    auxiliary = scores + own * _FP32
    auxiliary += sizes.workload.micro_batch_sequences * experts * _INT64 + _FP32
    if sizes.operators.permutation == "fused":
        permutation = own * (2 * experts + 1) * _INT32
    elif sizes.operators.permutation == "rows":
        # the token of each row (one more takes what is absent), a token's rows, their places, their
        # experts, and the scores that weights are picked from
        permutation = scores + (4 * own * chosen + 1 + 2 * experts) * _INT64
    else:
        permutation = scores + mask + own * chosen * _INT64
    return Ledger({"router": router + auxiliary, "permutation": permutation})


def _experts(sizes: Sizes) -> Ledger:
    workload, operators = sizes.workload, sizes.operators
    model, rows, q = workload.architecture, sizes.routed_rows, operators.value_bytes
    values = rows * model.expert_ffn_size // workload.layout.etp
    weights = rows + (operators.permutation == "rows")  # one more takes what is absent
    rows_in = rows * model.hidden_size * operators.input_bytes + weights * _FP32
    # one by one: the first product, silu of the gate, the other half, and what both give
    gate = (5 if operators.experts == "one_by_one" else 2) * values * q
    is_computed_again = "moe_act" in workload.recompute.modules
    is_computed_again |= operators.experts == "shared_buffers"
    second = 0 if is_computed_again else values * operators.input_bytes
    return Ledger({"experts": rows_in + gate + second})


def _end_of_moe(sizes: Sizes, *, gives_norm: bool) -> Ledger:
    """Return what the second norm of an MoE layer keeps; fused, the norm that follows as well."""
    if not sizes.workload.architecture.post_ffn_norm:
        return Ledger()
    if sizes.operators.dual_norm == "separate":
        return Ledger({"post_mlp_layernorm": norm(sizes, sizes.workload.architecture.hidden_size)})
    next_number = sizes.own_tokens * _FP32 if gives_norm else 0
    return Ledger({"post_mlp_layernorm": 2 * sizes.stream + sizes.own_tokens * _FP32 + next_number})


def mtp_module(sizes: Sizes) -> Ledger:
    """Return what a module for the token after the next keeps, its part of the head left out."""
    model = sizes.workload.architecture
    hidden = model.hidden_size
    if sizes.workload.recompute.kind == "full" and sizes.workload.recompute.method == "uniform":
        ledger = Ledger({"mtp": 2 * sizes.stream})
        if sizes.operators.dual_norm == "fused" and model.post_ffn_norm:
            # what its first pass has kept stays until the second: seen by hooks, not meant
            ledger["mtp.post_mlp_layernorm"] = 2 * sizes.stream + sizes.own_tokens * _FP32
        return ledger
    layer = decoder_layer(sizes, is_moe=model.mtp_is_moe, takes_norm=False, gives_norm=False)
    ledger = Ledger({f"mtp.{name}": size for name, size in layer.items()})
    ledger["mtp.enorm"] = ledger["mtp.hnorm"] = norm(sizes, hidden)
    ledger["mtp.eh_proj"] = 2 * sizes.product_input
    if sizes.operators.norm != "elementary":
        # the layer's input is a part of what all tensor ranks' projections were gathered to
        ledger["mtp.input_layernorm"] += (sizes.workload.layout.tp - 1) * sizes.stream
    final = norm(sizes, hidden)
    if sizes.operators.dual_norm == "fused" and sizes.operators.norm != "elementary":
        final -= sizes.stream  # its input is what the layer's end has kept
    ledger["mtp.final_layernorm"] = final
    return ledger


def embedding(sizes: Sizes, *, num_lookups: int) -> Ledger:
    """Return what looking up tokens keeps: their ids, once for the model and for each MTP.

    With tensor ranks also which of them are another rank's words.
    """
    mask = _BOOL if sizes.workload.layout.tp > 1 else 0
    return Ledger({"word_embeddings": num_lookups * sizes.tokens * (_INT64 + mask)})


def head_and_loss(sizes: Sizes) -> Ledger:
    """Return what the head and the loss keep, of the model and of its MTP modules."""
    workload, operators = sizes.workload, sizes.operators
    model, tokens = workload.architecture, sizes.tokens
    heads = 1 + model.num_mtp_layers
    words = -(-model.vocab_size // workload.layout.tp)
    ledger = Ledger({"mtp_loss": 2 * model.num_mtp_layers * tokens * _FP32})
    if workload.recompute.loss_chunk_tokens:
        whole = tokens * model.hidden_size * operators.value_bytes
        ledger["loss"] = heads * (whole + tokens * (_INT64 + _FP32))
        return ledger
    if operators.loss == "early":
        whole = tokens * model.hidden_size * operators.value_bytes
        weight = words * model.hidden_size * operators.value_bytes
        ledger["loss"] = heads * (2 * whole + weight + tokens * (_INT64 + _FP32))
        return ledger
    ledger["output_layer"] = heads * sizes.stream
    if operators.loss == "in_place":
        ledger["loss"] = heads * tokens * words * operators.value_bytes
    else:
        ledger["loss"] = heads * tokens * (words * _FP32 + _BOOL + _INT64)
    return ledger
