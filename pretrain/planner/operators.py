"""Which way of computing each operator does a run have, as far as autograd keeps other tensors?

The same model keeps other tensors on a GPU than on a CPU: a fused norm keeps its input and one
number a token, a norm of elementary operators keeps fp32 copies besides. Each choice is a field
here, so that what hooks count on a CPU and what a GPU allocates come from one set of formulas.
"""

from dataclasses import dataclass
from typing import Literal

from pretrain.planner.workload import Workload


@dataclass(frozen=True, kw_only=True, slots=True)
class Operators:
    """What is kept by each operator follows from these choices."""

    value_bytes: int = 2
    """Of an activation: 2 in bf16, 4 in fp32."""
    input_bytes: int = 2
    """Of the input of a product inside a layer: 1 in FP8."""
    norm: Literal["fused", "dense", "elementary"] = "fused"
    """fused: input and one fp32 number a token; dense (kernels/rms_norm.py in fp32): the same, but
    of an input that is a slice a copy instead of all that it is a slice of; elementary: an fp32
    copy of the input, the normalised values and that number (kernels/rms_norm.py in bf16)."""
    norm_in_linear: bool = True
    """Whether the norm before a dense FFN, and before grouped-query attention, belongs to the
    linear layer (Transformer Engine's LayerNormLinear): layernorm then does not recompute it."""
    dual_norm: Literal["separate", "fused"] = "separate"
    """fused: the end of an MoE layer and the norm that follows are one operator."""
    rotary: Literal["fused", "tables", "elementary"] = "fused"
    """tables (kernels/mla_rotation.py): cosines and sines of the sequence are kept by each layer.
    elementary: cosines and sines of the sequence are kept by each layer, twice."""
    attention_core: Literal["flash", "padded_flash", "compiled"] = "flash"
    """flash: queries, keys, values, output and the logarithm of each row's sum. padded_flash
    (kernels/attention.py): the same with values as wide as queries; where they were narrower, the
    output projection keeps its own input. compiled (kernels/attention.c): two numbers a row instead
    of output and logarithms, and values as they are."""
    context_exchange: Literal["ring", "all_to_all", "gather"] = "ring"
    """How context ranks share keys and values. ring: each keeps its own; all_to_all: heads for
    tokens, the output before and after the exchange is kept; gather: keys and values of the whole
    sequence are kept (pretrain/model/attention.py)."""
    gate: Literal["fused", "elementary"] = "fused"
    """fused: an FFN's activation keeps the first product only; elementary: silu of the gate and the
    other half as well."""
    experts: Literal["grouped", "one_by_one", "shared_buffers"] = "grouped"
    """one_by_one: megatron's experts as modules, whose activation is elementary and whose weight by
    the router keeps one more copy. shared_buffers (kernels/expert_ffn.py): the first product
    alone."""
    permutation: Literal["fused", "rows", "elementary"] = "fused"
    """How tokens are sorted by expert. fused: a map of 2 E + 1 int32 a token; rows
    (kernels/permute.py): maps from rows to tokens and back; elementary: scores, choices and the
    sorted order."""
    loss: Literal["in_place", "fp32_softmax", "early"] = "in_place"
    """in_place: the gradient overwrites the logits (Transformer Engine); fp32_softmax: the softmax
    is kept in fp32 (megatron-core's, fused or not). early (kernels/early_cross_entropy.py): no
    logits, but the gradients of the head's input and weight."""
    gradient_products: Literal["accumulated", "separate"] = "accumulated"
    """Where a weight's gradient goes. accumulated: into the fp32 buffer, with one bf16 dummy for
    each shape of a weight, which Transformer Engine keeps; separate: into a tensor of its own that
    is then added."""


def operators_of(workload: Workload) -> Operators:
    """Return the operators of a published run: Megatron-LM with Transformer Engine on a GPU.

    Args:
        workload: `number_format` and `fused_loss` are read.
    """
    return Operators(
        value_bytes=4 if workload.number_format == "fp32" else 2,
        input_bytes={"fp32": 4, "bf16": 2, "fp8": 1, "nvfp4": 1}[workload.number_format],
        loss="in_place" if workload.fused_loss else "fp32_softmax",
    )


def own_operators(workload: Workload, *, dual_norm: Literal["separate", "fused"]) -> Operators:
    """Return the operators of our model on a GPU (pretrain/model/transformer_config.py).

    megatron-core's fused loss keeps an fp32 softmax, and gradients are products of their own.

    Args:
        workload: `number_format` is read.
        dual_norm: the run's `kernels.dual_norm`.
    """
    return Operators(
        value_bytes=4 if workload.number_format == "fp32" else 2,
        input_bytes={"fp32": 4, "bf16": 2, "fp8": 1, "nvfp4": 1}[workload.number_format],
        dual_norm=dual_norm,
        loss="fp32_softmax",
        gradient_products="separate",
    )


def cpu_operators(
    workload: Workload, *, dual_norm: Literal["separate", "fused"], is_compiled: bool
) -> Operators:
    """Return the operators of our model on a CPU.

    Args:
        workload: `number_format` is read; fp32 has operators of our own, as with `auto` in the
            run's other kernels.
        dual_norm: the run's `kernels.dual_norm`.
        is_compiled: whether there is a compiler for them (kernels/native.py).
    """
    is_fp32 = workload.number_format == "fp32"
    value_bytes = 4 if is_fp32 else 2
    return Operators(
        value_bytes=value_bytes,
        input_bytes=value_bytes,
        norm="dense" if is_fp32 else "elementary",
        norm_in_linear=False,
        dual_norm=dual_norm,
        rotary="tables" if is_fp32 else "elementary",
        attention_core="compiled" if is_fp32 and is_compiled else "padded_flash",
        context_exchange="gather",
        gate="fused" if is_fp32 else "elementary",
        experts="shared_buffers" if is_fp32 else "one_by_one",
        permutation="rows" if is_fp32 else "elementary",
        loss="early" if is_fp32 else "fp32_softmax",
        gradient_products="separate",
    )
