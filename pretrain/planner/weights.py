"""Which weights does a pipeline rank hold, and in which order do its modules name them?

The order decides which values of the optimizer fall on which replica: megatron-core lays a chunk's
parameters into one buffer and cuts it evenly (state_bytes.py). Names and shapes are those of
megatron-core's modules, our own model first; tests compare them with the modules themselves.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from parallel.stages import EMBEDDING, LAYER, LOSS, MTP
from pretrain.planner.architecture import Architecture, GroupedAttention, LatentAttention
from pretrain.planner.workload import Workload


@dataclass(frozen=True, kw_only=True, slots=True)
class Weight:
    """One parameter of a rank."""

    name: str
    """As megatron-core names it, without the layer's number."""
    shape: tuple[int, ...]
    """This rank's part."""
    is_expert: bool = False
    """Whether its gradient is summed over expert_dp instead of dp and cp."""
    is_linear: bool = False
    """A matrix of a linear layer inside a layer: may be in FP8, has a gradient product."""
    has_own_bucket: bool = False
    """A copy of the embedding that two stages share: megatron-core gives it a bucket."""

    @property
    def num_values(self) -> int:
        """Values of this rank's part."""
        return math.prod(self.shape)


def chunk_weights(workload: Workload, stage: int) -> tuple[Weight, ...]:
    """Return the weights of one of the pp * vp stages in the order of its modules.

    Args:
        workload: architecture and layout.
        stage: 0 <= stage < pp * vp, in the order of the layers.
    """
    model, slots = workload.architecture, workload.stages[stage]
    tp, pp = workload.layout.tp, workload.layout.pp
    hidden = model.hidden_size
    vocabulary = (-(-model.vocab_size // tp), hidden)
    found: list[Weight] = []
    # MTP embeds its tokens itself: its stage holds a second copy, or a tied head is one
    is_shared = pp > 1 and (model.num_mtp_layers > 0 or model.tied_embedding)
    if EMBEDDING in slots or MTP in slots:
        found.append(Weight(name="word_embeddings", shape=vocabulary, has_own_bucket=is_shared))
    first = workload.first_layer(stage)
    for layer in range(first, first + slots.count(LAYER)):
        found += layer_weights(workload, is_moe=layer >= model.num_dense_layers)
    ends = LOSS in slots
    # MTP reads the normalised stream, so with it the norm follows the last layer, wherever that is
    is_last = first + slots.count(LAYER) == model.num_layers and LAYER in slots
    if is_last if model.num_mtp_layers else ends:
        found.append(Weight(name="final_layernorm", shape=(hidden,)))
    for _ in range(slots.count(MTP)):
        found += [Weight(name=name, shape=(hidden,)) for name in ("enorm", "hnorm")]
        found.append(Weight(name="eh_proj", shape=(hidden // tp, 2 * hidden), is_linear=True))
        found += layer_weights(workload, is_moe=model.mtp_is_moe)
        found.append(Weight(name="mtp.final_layernorm", shape=(hidden,)))
    is_whole = EMBEDDING in slots or MTP in slots
    if ends and not (model.tied_embedding and is_whole):
        found.append(
            Weight(
                name="output_layer",
                shape=vocabulary,
                has_own_bucket=is_shared and model.tied_embedding,
            )
        )
    return tuple(found)


def layer_weights(workload: Workload, *, is_moe: bool) -> tuple[Weight, ...]:
    """Return the weights of a layer in the order of its modules."""
    layout = workload.layout
    cut = (layout.tp, layout.ep, layout.etp)
    return _of_layer(workload.architecture, cut, is_moe)


@lru_cache(maxsize=256)  # a search asks for the same ones a million times
def _of_layer(model: Architecture, cut: tuple[int, int, int], is_moe: bool) -> tuple[Weight, ...]:
    return tuple(_layer(model, *cut, is_moe=is_moe))


def _layer(model: Architecture, tp: int, ep: int, etp: int, *, is_moe: bool) -> Iterator[Weight]:
    hidden = model.hidden_size
    yield Weight(name="input_layernorm", shape=(hidden,))
    yield from _attention(model, tp)
    yield Weight(name="pre_mlp_layernorm", shape=(hidden,))
    if not is_moe:
        yield from _ffn("mlp", hidden, model.dense_ffn_size, tp)
        return
    yield Weight(name="router", shape=(model.num_routed_experts, hidden))
    if model.ffn_bias:
        yield Weight(name="router.bias", shape=(model.num_routed_experts,))
    is_expert = ep > 1 or etp != tp
    for _ in range(model.num_routed_experts // ep):
        yield from _ffn("experts", hidden, model.expert_ffn_size, etp, is_expert=is_expert)
        if model.ffn_bias:
            width = 2 * model.expert_ffn_size // etp + hidden
            yield Weight(name="experts.bias", shape=(width,), is_expert=is_expert)
    if model.num_shared_experts:
        yield from _ffn("shared_experts", hidden, model.shared_ffn_size, tp)
    if model.post_ffn_norm:
        yield Weight(name="post_mlp_layernorm", shape=(hidden,))


def _ffn(
    name: str, hidden: int, width: int, cut: int, *, is_expert: bool = False
) -> Iterator[Weight]:
    for part, shape in (("fc1", (2 * width // cut, hidden)), ("fc2", (hidden, width // cut))):
        yield Weight(name=f"{name}.linear_{part}", shape=shape, is_expert=is_expert, is_linear=True)


def _attention(model: Architecture, tp: int) -> Iterator[Weight]:
    hidden, attention = model.hidden_size, model.attention
    heads = attention.num_heads // tp

    def linear(name: str, *shape: int) -> Weight:
        return Weight(name=name, shape=shape, is_linear=True)

    yield linear("linear_proj", hidden, heads * attention.value_size)
    if isinstance(attention, LatentAttention):
        queries = heads * attention.score_size
        if attention.q_lora_rank:
            yield linear("linear_q_down_proj", attention.q_lora_rank, hidden)
            yield linear("linear_q_up_proj", queries, attention.q_lora_rank)
        else:
            yield linear("linear_q_proj", queries, hidden)
        latent = attention.kv_lora_rank + attention.qk_rope_head_size
        yield linear("linear_kv_down_proj", latent, hidden)
        keys_and_values = heads * (attention.qk_nope_head_size + attention.v_head_size)
        yield linear("linear_kv_up_proj", keys_and_values, attention.kv_lora_rank)
        if attention.q_lora_rank:
            yield Weight(name="q_layernorm", shape=(attention.q_lora_rank,))
        yield Weight(name="kv_layernorm", shape=(attention.kv_lora_rank,))
        return
    assert isinstance(attention, GroupedAttention)
    # fewer groups than tensor ranks: each rank holds a whole group
    groups = max(attention.num_kv_heads // tp, 1)
    yield linear("linear_qkv", (heads + 2 * groups) * attention.head_size, hidden)
    if attention.num_bias_values:
        yield Weight(name="attention.bias", shape=(-(-attention.num_bias_values // tp),))
    if attention.qk_norm:
        yield Weight(name="q_layernorm", shape=(attention.head_size,))
        yield Weight(name="k_layernorm", shape=(attention.head_size,))
