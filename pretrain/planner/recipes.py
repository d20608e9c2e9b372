"""What does the recipe behind a published measurement say that the table leaves open?

Tables of speeds state layouts and batches; whether exchanges overlap, what is computed twice and
which attention runs stands in the recipes that were run. Only what recipes say stands here, each
with its file, never what would make a speed fit.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class RecipeWords:
    """Choices of a step that tables leave open."""

    gradient_bytes: int = 4
    """Bytes of a gradient that is reduced."""
    recompute: str = ""
    """In the words of the tables' column, where that is empty."""
    overlap_experts: bool = False
    """Whether tokens travel beside another micro-batch's computation."""
    overlap_tensor_parallel: bool = True
    """Whether exchanges of tensor parallelism run beside their products."""
    experts_over_all_ranks: bool = False
    """Whether ep is the number of ranks where the table has none."""
    attention_kernel: Literal["tuned", "torch"] = "tuned"
    """See `Workload.attention_kernel`."""
    fused_loss: bool = True
    """See `Workload.fused_loss`."""


BRIDGE, AUTOMODEL, TORCHTITAN = "Bridge", "AutoModel", "torchtitan"

_STACKS: Mapping[str, RecipeWords] = {
    # scripts/performance/configs/*: grad_reduce_in_fp32 = False, tp_comm_overlap = True
    BRIDGE: RecipeWords(gradient_bytes=2),
    # examples/llm_benchmark: FSDP2 reduces in fp32; loss_fn MaskedCrossEntropy
    AUTOMODEL: RecipeWords(overlap_tensor_parallel=False, fused_loss=False),
    # models call scaled_dot_product_attention; async TP is named where it is on;
    # torchtitan/train.py of December 2024 casts logits to fp32 for cross_entropy
    TORCHTITAN: RecipeWords(
        overlap_tensor_parallel=False, attention_kernel="torch", fused_loss=False
    ),
}

_MODELS: Mapping[tuple[str, str, str], RecipeWords] = {
    # scripts/performance/configs/qwen/qwen3_workload_base_configs.py: moe_a2a_overlap = True;
    # qwen3_llm_pretrain.py: tp_comm_overlap = False on H100
    (BRIDGE, "Qwen3-235B-A22B", "H100"): RecipeWords(
        gradient_bytes=2, overlap_experts=True, overlap_tensor_parallel=False
    ),
    # scripts/performance/configs/gpt_oss/gpt_oss_workload_base_configs.py
    (BRIDGE, "GPT-OSS-120B", "H100"): RecipeWords(
        gradient_bytes=2, recompute="selective: layernorm, moe_act"
    ),
    # examples/benchmark/configs/gptoss_20b_te_deepep.yaml, gptoss_120b_te_deepep.yaml: ep_size 8 on
    # 8 and 64 on 64 ranks; the table has a dash
    (AUTOMODEL, "GPT-OSS-20B", "H100"): RecipeWords(
        overlap_tensor_parallel=False,
        experts_over_all_ranks=True,
        attention_kernel="torch",
        fused_loss=False,
    ),
    (AUTOMODEL, "GPT-OSS-120B", "H100"): RecipeWords(
        overlap_tensor_parallel=False,
        experts_over_all_ranks=True,
        attention_kernel="torch",
        fused_loss=False,
    ),
    # examples/llm_benchmark/llama3_3/custom_llama3_1_70b_pretrain_benchmark_8nodes.yaml
    (AUTOMODEL, "Llama3-70B", "H100"): RecipeWords(
        overlap_tensor_parallel=False,
        recompute="full AC",
        attention_kernel="torch",
        fused_loss=False,
    ),
}


def recipe_of(row: Mapping[str, str]) -> RecipeWords:
    """Return what the recipe of a row says; megatron's defaults where none is known."""
    for (stack, model, gpu), words in _MODELS.items():
        if stack in row["stack"] and model == row["model"] and row["gpu"].startswith(gpu):
            return words
    for stack, words in _STACKS.items():
        if stack in row["stack"]:
            return words
    return RecipeWords()
