"""Which sizes have the models whose training speed others have published?

Sizes from each model's config.json on the Hugging Face hub, as transformers reads them; the names
are those of the published tables. Parameters come out exactly as transformers counts them
(tests/pretrain/planner/test_architecture.py).
"""

from collections.abc import Mapping

from pretrain.planner.architecture import Architecture, GroupedAttention, LatentAttention


def _llama(name: str, *, layers: int, hidden: int, ffn: int, heads: int) -> Architecture:
    return Architecture(
        name=name,
        num_layers=layers,
        num_dense_layers=layers,
        hidden_size=hidden,
        dense_ffn_size=ffn,
        attention=GroupedAttention(num_heads=heads, num_kv_heads=8, head_size=128),
        vocab_size=128_256,
    )


def _qwen3(name: str, *, layers: int, hidden: int, expert_ffn: int, heads: int) -> Architecture:
    return Architecture(
        name=name,
        num_layers=layers,
        num_dense_layers=0,
        hidden_size=hidden,
        num_routed_experts=128,
        num_experts_per_token=8,
        expert_ffn_size=expert_ffn,
        attention=GroupedAttention(num_heads=heads, num_kv_heads=4, head_size=128, qk_norm=True),
        vocab_size=151_936,
    )


def _gpt_oss(name: str, *, layers: int, experts: int) -> Architecture:
    hidden, heads, kv_heads, head = 2880, 64, 8, 64
    biases = (heads + 2 * kv_heads) * head + hidden
    return Architecture(
        name=name,
        num_layers=layers,
        num_dense_layers=0,
        hidden_size=hidden,
        num_routed_experts=experts,
        num_experts_per_token=4,
        expert_ffn_size=2880,
        attention=GroupedAttention(
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_size=head,
            num_bias_values=biases + heads,  # and a sink for each head
        ),
        vocab_size=201_088,
        window_tokens=128,
        num_windowed_layers=layers // 2,
        ffn_bias=True,
    )


def _mixtral(
    name: str, *, layers: int, hidden: int, ffn: int, heads: int, vocab: int
) -> Architecture:
    return Architecture(
        name=name,
        num_layers=layers,
        num_dense_layers=0,
        hidden_size=hidden,
        num_routed_experts=8,
        num_experts_per_token=2,
        expert_ffn_size=ffn,
        attention=GroupedAttention(num_heads=heads, num_kv_heads=8, head_size=128),
        vocab_size=vocab,
    )


DEEPSEEK_V3 = Architecture(
    name="DeepSeek-V3",
    num_layers=61,
    num_dense_layers=3,
    hidden_size=7168,
    dense_ffn_size=18_432,
    num_routed_experts=256,
    num_experts_per_token=8,
    expert_ffn_size=2048,
    num_shared_experts=1,
    num_expert_groups=8,
    num_groups_per_token=4,
    attention=LatentAttention(
        num_heads=128,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_size=128,
        qk_rope_head_size=64,
        v_head_size=128,
    ),
    vocab_size=129_280,
    num_mtp_layers=1,
)

DEEPSEEK_V2 = Architecture(
    name="DeepSeek-V2",
    num_layers=60,
    num_dense_layers=1,
    hidden_size=5120,
    dense_ffn_size=12_288,
    num_routed_experts=160,
    num_experts_per_token=6,
    expert_ffn_size=1536,
    num_shared_experts=2,
    num_expert_groups=8,
    num_groups_per_token=3,
    attention=LatentAttention(
        num_heads=128,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_size=128,
        qk_rope_head_size=64,
        v_head_size=128,
    ),
    vocab_size=102_400,
)

KIMI_K2 = Architecture(
    name="Kimi-K2",
    num_layers=61,
    num_dense_layers=1,
    hidden_size=7168,
    dense_ffn_size=18_432,
    num_routed_experts=384,
    num_experts_per_token=8,
    expert_ffn_size=2048,
    num_shared_experts=1,
    attention=LatentAttention(
        num_heads=64,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_size=128,
        qk_rope_head_size=64,
        v_head_size=128,
    ),
    vocab_size=163_840,
)

KNOWN_MODELS: Mapping[str, Architecture] = {
    model.name: model
    for model in (
        _llama("Llama3-8B", layers=32, hidden=4096, ffn=14_336, heads=32),
        _llama("Llama3-70B", layers=80, hidden=8192, ffn=28_672, heads=64),
        _llama("Llama3.1-405B", layers=126, hidden=16_384, ffn=53_248, heads=128),
        _qwen3("Qwen3-30B-A3B", layers=48, hidden=2048, expert_ffn=768, heads=32),
        _qwen3("Qwen3-235B-A22B", layers=94, hidden=4096, expert_ffn=1536, heads=64),
        _gpt_oss("GPT-OSS-20B", layers=24, experts=32),
        _gpt_oss("GPT-OSS-120B", layers=36, experts=128),
        _mixtral("Mixtral-8x7B", layers=32, hidden=4096, ffn=14_336, heads=32, vocab=32_000),
        _mixtral("Mixtral-8x22B", layers=56, hidden=6144, ffn=16_384, heads=48, vocab=32_768),
        DEEPSEEK_V3,
        DEEPSEEK_V2,
        KIMI_K2,
    )
}
"""Model name of a published table -> its sizes."""
