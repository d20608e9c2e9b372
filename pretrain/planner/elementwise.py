"""How many bytes do a layer's other operators move, and how many kernels does a pass launch?

Norms, residual sums, rotary positions, activations, permutations and casts are bound by memory:
each is counted as the values it reads and writes, 2 bytes in bf16. Casts to FP8 read a tensor twice
(its largest value first, tensorwise scaling) and write it in two orders.
"""

from collections.abc import Sequence

from pretrain.planner.architecture import GroupedAttention
from pretrain.planner.products import Product, expert_tokens
from pretrain.planner.workload import Workload

CAST_BYTES = {
    "none": 0,
    "delayed": 4,
    "tensorwise": 6,
    "rowwise": 8,
    "blockwise": 4,
    "mxfp8": 4,
    "nvfp4": 6,
}
"""Bytes moved to cast one bf16 value: read (twice if the scale needs the largest first), and
written by rows and by columns."""
EAGER_NORM, EAGER_ROTARY, EAGER_ACTIVATION = 3.4, 5.0, 1.7
"""Bytes of torch's eager operators over those of fused ones, counted forward: a norm casts to
fp32, squares, scales and casts back, 28 bytes a value and not 4 (with residual sums 68 and not 20);
rotary positions are complex products in fp32, 20 and not 4; SwiGLU is two operators, 10 and not 6.
"""
COMPILED_SAVING = 2
"""Bytes a cast saves where torch.compile finds the largest value while it makes the tensor."""
MEGATRON_BIAS_BYTES = (28, 36)
"""Bytes for each output value of an expert with biases, forward and backward, in megatron-core
0.16.1 (transformer/moe/experts.py, _apply_bias): bias times probability in fp32, sum, concatenation
and cast are an operator each."""

DENSE_LAUNCHES = (30, 55)
"""Kernels of attention and a dense FFN, forward and backward (megatron-core 0.16.1)."""
MOE_LAUNCHES = (60, 90)
"""Kernels that router, permutation, exchange and grouped products add to attention's."""
CAST_LAUNCHES = (12, 16)
"""Kernels that FP8 adds to a layer."""


def norm_bytes(workload: Workload) -> tuple[float, float]:
    """Return bytes of a layer's norms and residual sums, forward and backward.

    A norm reads and writes a row, a residual sum reads two and writes one: 5 rows for each half of
    the layer. Backward 7: a norm reads two and writes one, sums and their gradients 4.
    """
    architecture = workload.architecture
    row = 2 * architecture.hidden_size * workload.micro_batch_tokens / workload.layout.tp
    halves = 2.4 if architecture.post_ffn_norm else 2.0
    halves *= EAGER_NORM if workload.stack == "fsdp_eager" else 1.0
    return 5 * halves * row, 7 * halves * row


def rotary_bytes(workload: Workload) -> tuple[float, float]:
    """Return bytes of rotary positions and norms of queries and keys, forward and backward."""
    attention = workload.architecture.attention
    tokens = workload.micro_batch_tokens / workload.layout.tp
    if isinstance(attention, GroupedAttention):
        values = (attention.num_heads + attention.num_kv_heads) * attention.head_size
        passes = 2.0 if attention.qk_norm else 1.0
    else:
        # rotation, and putting keys together from their shared and their own components
        values = attention.num_heads * (2 * attention.score_size + attention.v_head_size)
        passes = 1.0
    passes *= EAGER_ROTARY if workload.stack == "fsdp_eager" else 1.0
    moved = 4 * passes * values * tokens
    return moved, moved


def activation_bytes(workload: Workload, *, rows: float, inner_size: float) -> tuple[float, float]:
    """Return bytes of SwiGLU: 2 values in and 1 out; backward 3 in and 2 out."""
    values = rows * inner_size
    values *= EAGER_ACTIVATION if workload.stack == "fsdp_eager" else 1.0
    return 6 * values, 10 * values


def bias_bytes(workload: Workload) -> tuple[float, float]:
    """Return bytes of adding biases to the experts' outputs, and of summing their gradients."""
    architecture = workload.architecture
    if not architecture.ffn_bias:
        return 0.0, 0.0
    values = expert_tokens(workload) * architecture.hidden_size
    forward, backward = MEGATRON_BIAS_BYTES if workload.stack == "megatron" else (4, 2)
    return forward * values, backward * values


def routing_bytes(workload: Workload) -> tuple[float, float]:
    """Return bytes of router scores (fp32) and of sorting rows to experts and back."""
    architecture = workload.architecture
    tokens = workload.micro_batch_tokens / workload.layout.tp
    scores = 4 * architecture.num_routed_experts * tokens
    hidden = 2 * architecture.hidden_size
    sorted_rows = expert_tokens(workload)
    copies = tokens * architecture.num_experts_per_token
    # to the ranks' order, to the experts' order, and back both ways
    moved = hidden * (2 * tokens + 2 * copies + 4 * sorted_rows)
    return 8 * scores + moved, 6 * scores + moved


def loss_bytes(workload: Workload) -> tuple[float, float]:
    """Return bytes of the loss over a rank's logits, forward and backward."""
    tokens = workload.micro_batch_tokens
    logits = tokens * workload.architecture.vocab_size / workload.layout.tp
    return (6 * logits, 4 * logits) if workload.fused_loss else (14 * logits, 12 * logits)


def cast_bytes(workload: Workload, products: Sequence[Product]) -> tuple[float, float]:
    """Return bytes of casts: inputs in the forward pass, gradients of outputs in the backward."""
    low = [product for product in products if product.is_low]
    each = CAST_BYTES[workload.recipe]
    if each and workload.stack == "fsdp_compiled":
        each -= COMPILED_SAVING
    inputs = sum(product.input_values for product in low)
    outputs = sum(product.output_values for product in low)
    return each * inputs, each * outputs


def launches(workload: Workload, *, is_moe: bool) -> tuple[int, int]:
    """Return the kernels of a layer, forward and backward."""
    forward, backward = DENSE_LAUNCHES
    if is_moe:
        forward, backward = forward + MOE_LAUNCHES[0], backward + MOE_LAUNCHES[1]
    if workload.number_format in ("fp8", "nvfp4"):
        forward, backward = forward + CAST_LAUNCHES[0], backward + CAST_LAUNCHES[1]
    return forward, backward
