"""Sizes of published models against transformers' modules and NVIDIA's tables."""

import csv
from typing import Any

import pytest
import torch
import transformers
from hydra import compose, initialize_config_dir

from launch.compose import build
from pretrain.model.count import count_parameters, flop_per_token
from pretrain.model.spec import ModelSpec
from pretrain.planner.architecture import Architecture, GroupedAttention, architecture_of
from pretrain.planner.known_models import DEEPSEEK_V3, KIMI_K2, KNOWN_MODELS
from tests.pretrain.planner.measured import ABSENT, ROOT, ROWS


@pytest.fixture(scope="module")
def axk1() -> ModelSpec:
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        return build(ModelSpec, compose("plan", ["+cluster=h200_1536"]).model)


def test_parameters_of_axk1_are_those_of_the_model_room(axk1: ModelSpec) -> None:
    ours, counted = architecture_of(axk1), count_parameters(axk1)
    assert ours.attention_parameters == counted.attention
    assert ours.dense_layer_parameters == counted.dense_layer
    assert ours.moe_layer_parameters == counted.moe_layer
    assert ours.embedding_parameters == counted.embedding
    assert ours.main_parameters == counted.main == 518_983_052_288
    assert ours.total_parameters == counted.total


@pytest.mark.parametrize("sequence_tokens", [4096, 32_768])
def test_flop_of_axk1_are_those_of_the_model_room(axk1: ModelSpec, sequence_tokens: int) -> None:
    ours = architecture_of(axk1).flop_per_token(sequence_tokens=sequence_tokens)
    assert ours == flop_per_token(axk1, sequence_tokens=sequence_tokens)


def test_flop_of_axk1_are_204_and_215_gflop_per_token(axk1: ModelSpec) -> None:
    ours = architecture_of(axk1)
    without = ours.flop_per_token(sequence_tokens=4096, with_mtp=False)
    assert without / 1e9 == pytest.approx(204.5, abs=0.05)
    assert ours.flop_per_token(sequence_tokens=4096) / 1e9 == pytest.approx(215.4, abs=0.05)


def test_flop_of_deepseek_v3_and_kimi_k2_are_those_that_nvidia_counts() -> None:
    """NVIDIA Megatron Bridge, performance-summary.md: TFLOP/s over tokens/s at 4,096 tokens."""
    without = DEEPSEEK_V3.flop_per_token(sequence_tokens=4096, with_mtp=False)
    assert without / 1e9 == pytest.approx(249.8, abs=0.05)
    assert DEEPSEEK_V3.flop_per_token(sequence_tokens=4096) / 1e9 == pytest.approx(260.0, abs=0.05)
    assert KIMI_K2.flop_per_token(sequence_tokens=4096) / 1e9 == pytest.approx(204.5, abs=0.05)


# NVIDIA's Llama rows of the Megatron-LM example count attention as not causal; its GPT-OSS rows
# before release 26.06 leave out a part (27.2 instead of 32.6), AutoModel's take another window.
OTHER_CONVENTIONS = (
    "Megatron-Core (Megatron-LM example)",
    "NeMo AutoModel (PyTorch FSDP2/DTensor)",
)


def stated_rows() -> list[dict[str, str]]:
    if not ROWS.exists():
        return []
    with ROWS.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["implied_flops_per_token_g"]]
    own = [row for row in rows if row["stack"] not in OTHER_CONVENTIONS]
    return [
        row
        for row in own
        if not row["model"].startswith("GPT-OSS") or row["stack_version"] >= "26.06"
    ]


@pytest.mark.shared
@pytest.mark.skipif(not ROWS.exists(), reason=ABSENT)
def test_flop_are_those_implied_by_every_row_of_nvidias_tables() -> None:
    rows = stated_rows()
    assert len(rows) > 100
    for row in rows:
        model = KNOWN_MODELS[row["model"]]
        flop = model.flop_per_token(sequence_tokens=int(row["seq_len"])) / 1e9
        # Tokens/s and TFLOP/s are rounded in the tables: up to 1 of 118 TFLOP/s, and 26.04.01
        # rounds tokens/s to 16 or 32 of 864.
        room = 0.025 if row["stack_version"].startswith("26.04.01") else 0.01
        assert flop == pytest.approx(float(row["implied_flops_per_token_g"]), rel=room), row["id"]


def transformers_config(model: Architecture) -> Any:
    """Return the configuration of transformers' class for a model with our sizes."""
    words: dict[str, Any] = {
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "vocab_size": model.vocab_size,
        "num_attention_heads": model.attention.num_heads,
        "tie_word_embeddings": False,
    }
    if isinstance(model.attention, GroupedAttention):
        words["num_key_value_heads"] = model.attention.num_kv_heads
        words["head_dim"] = model.attention.head_size
        if model.name.startswith("Llama"):
            return transformers.LlamaConfig(**words, intermediate_size=model.dense_ffn_size)
        words["num_experts_per_tok"] = model.num_experts_per_token
        if model.name.startswith("Qwen3"):
            return transformers.Qwen3MoeConfig(
                **words,
                num_experts=model.num_routed_experts,
                moe_intermediate_size=model.expert_ffn_size,
            )
        words |= {
            "num_local_experts": model.num_routed_experts,
            "intermediate_size": model.expert_ffn_size,
        }
        if model.name.startswith("GPT"):
            return transformers.GptOssConfig(**words)
        return transformers.MixtralConfig(**words)
    attention = model.attention
    return transformers.DeepseekV3Config(
        **words,
        num_key_value_heads=attention.num_heads,
        intermediate_size=model.dense_ffn_size,
        moe_intermediate_size=model.expert_ffn_size,
        n_routed_experts=model.num_routed_experts,
        n_shared_experts=model.num_shared_experts,
        num_experts_per_tok=model.num_experts_per_token,
        first_k_dense_replace=model.num_dense_layers,
        q_lora_rank=attention.q_lora_rank,
        kv_lora_rank=attention.kv_lora_rank,
        qk_nope_head_dim=attention.qk_nope_head_size,
        qk_rope_head_dim=attention.qk_rope_head_size,
        v_head_dim=attention.v_head_size,
    )


@pytest.mark.parametrize("name", sorted(KNOWN_MODELS))
def test_parameters_are_those_of_transformers_modules(name: str) -> None:
    model = KNOWN_MODELS[name]
    with torch.device("meta"):
        built = transformers.AutoModelForCausalLM.from_config(transformers_config(model))
    assert sum(weight.numel() for weight in built.parameters()) == model.main_parameters


def test_a_window_is_seen_as_a_sum_over_queries_says() -> None:
    model = KNOWN_MODELS["GPT-OSS-120B"]
    seen = sum(min(query + 1, 128) for query in range(4096)) / 4096
    assert model.seen_keys(4096, windowed=True) == pytest.approx(seen, rel=1e-12)
    assert model.seen_keys(100, windowed=True) == model.seen_keys(100) == 50.5


def test_an_impossible_size_is_refused() -> None:
    attention = GroupedAttention(num_heads=2, num_kv_heads=1, head_size=8)
    sizes = {"name": "x", "hidden_size": 16, "attention": attention, "vocab_size": 32}
    with pytest.raises(ValueError, match="num_dense_layers=3 given, 0 to num_layers = 2"):
        Architecture(**sizes, num_layers=2, num_dense_layers=3, dense_ffn_size=8)
    with pytest.raises(ValueError, match="2 MoE layers with num_routed_experts"):
        Architecture(**sizes, num_layers=2, num_dense_layers=0)
    with pytest.raises(ValueError, match="num_layers=-1"):
        Architecture(**sizes, num_layers=-1, num_dense_layers=0)
