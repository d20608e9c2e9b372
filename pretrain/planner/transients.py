"""What does a rank hold for a moment, beside the state and what autograd keeps?

Three moments can be the heaviest of a pass: the backward pass of the head (its input, its gradient
and the gradient of its weight), that of a layer's FFN or experts, and, where layers are computed
twice, everything of the layer that is computed again. Transformer Engine also keeps a dummy for
each shape of a weight whose gradient goes straight into the buffer.

Source: megatron-core 0.16.1, tensor_parallel/layers.py:500-620 (a linear layer's backward pass);
Transformer Engine 2.11, module/base.py get_dummy_wgrad.
"""

from dataclasses import replace

from parallel.stages import EMBEDDING, LAYER, LOSS, MTP
from pretrain.planner.kept import Sizes, decoder_layer
from pretrain.planner.operators import Operators
from pretrain.planner.weights import Weight, chunk_weights
from pretrain.planner.workload import Recomputed, Workload

_FP32, _BF16 = 4, 2


def head_backward(sizes: Sizes) -> int:
    """Return what the head's backward pass holds: gradients of logits, input and weight.

    Worked: Llama 3 70B, 4,096 tokens, TP 1: 4,096 x 8,192 x 2 bytes of gradient and 128,384 x 8,192
    x 2 of the weight's, 2.2 GB.
    """
    workload, operators = sizes.workload, sizes.operators
    model, tokens, q = workload.architecture, sizes.tokens, operators.value_bytes
    words = -(-model.vocab_size // workload.layout.tp)
    whole = tokens * model.hidden_size * q
    held = whole + words * model.hidden_size * q
    if workload.layout.tp > 1:
        held += whole + sizes.stream  # the gathered input, and this rank's part of the gradient
    chunk = workload.recompute.loss_chunk_tokens
    if chunk:
        return held + min(chunk, tokens) * words * (_FP32 + q)
    return held + (tokens * words * q if operators.loss == "fp32_softmax" else 0)


def layer_backward(sizes: Sizes, stage: int) -> int:
    """Return the most that the backward pass of one layer of a stage holds.

    Args:
        sizes: of a micro-batch.
        stage: 0 <= stage < pp * vp.
    """
    kinds = layer_kinds(sizes.workload, stage)
    if not kinds:
        return 0
    return max(
        _ffn_backward(sizes, is_moe=kind) + _computed_again(sizes, is_moe=kind) for kind in kinds
    ) + _weight_gradient(sizes.operators, chunk_weights(sizes.workload, stage))


def layer_kinds(workload: Workload, stage: int) -> set[bool]:
    """Return which kinds of layers stand on a stage, True: MoE; MTP's counts."""
    model, slots = workload.architecture, workload.stages[stage]
    first = workload.first_layer(stage)
    layers = range(first, first + slots.count(LAYER))
    kinds = {layer >= model.num_dense_layers for layer in layers}
    return kinds | ({model.mtp_is_moe} if MTP in slots else set())


def _ffn_backward(sizes: Sizes, *, is_moe: bool) -> int:
    """Return gradients of an FFN: of its first product and the stream, or of the experts' rows."""
    workload, q = sizes.workload, sizes.operators.value_bytes
    model, layout = workload.architecture, workload.layout
    if not is_moe:
        return sizes.tokens * 2 * model.dense_ffn_size // layout.tp * q + sizes.stream
    travelling = 2 * sizes.routed_rows * model.hidden_size * q  # before and after the exchange
    inside = sizes.routed_rows * 2 * model.expert_ffn_size // layout.etp * q
    return max(travelling, travelling // 2 + inside) + sizes.stream


def _computed_again(sizes: Sizes, *, is_moe: bool) -> int:
    """Return what a layer's second forward pass brings back for its backward pass."""
    recompute = sizes.workload.recompute
    if recompute.kind not in ("full", "selective"):
        return 0

    def ledger(of: Sizes) -> int:
        return decoder_layer(of, is_moe=is_moe, takes_norm=False, gives_norm=True).total()

    plain = replace(sizes, workload=replace(sizes.workload, recompute=Recomputed()))
    if recompute.kind == "full":
        together = recompute.num_layers if recompute.method == "uniform" else 1
        return together * ledger(plain)
    return ledger(plain) - ledger(sizes)


def _weight_gradient(operators: Operators, weights: tuple[Weight, ...]) -> int:
    """Return the gradient of a weight before it is added to the buffer; of grouped experts, all."""
    if operators.gradient_products == "accumulated":
        return 0
    linear = [weight for weight in weights if weight.is_linear]
    experts: dict[tuple[int, ...], int] = {}
    for weight in linear:
        if weight.name.startswith("experts"):
            experts[weight.shape] = experts.get(weight.shape, 0) + weight.num_values
    num_layers = sum(weight.name == "router" for weight in weights)
    grouped = max(experts.values(), default=0) // max(num_layers, 1)
    largest = max((weight.num_values for weight in linear), default=0)
    return max(grouped, largest) * operators.value_bytes


def dummies(sizes: Sizes, pipeline_rank: int) -> int:
    """Return the bytes of one bf16 dummy for each shape of a weight on the rank."""
    if sizes.operators.gradient_products != "accumulated":
        return 0
    workload = sizes.workload
    shapes = {
        weight.shape: weight.num_values
        for stage in range(pipeline_rank, len(workload.stages), workload.layout.pp)
        for weight in chunk_weights(workload, stage)
        if weight.is_linear
    }
    return sum(shapes.values()) * _BF16


def hops(sizes: Sizes, pipeline_rank: int) -> int:
    """Return what a rank holds of its neighbours' tensors: one on its way on middle ranks."""
    workload = sizes.workload
    slots = "".join(workload.rank_stages(pipeline_rank))
    is_end = EMBEDDING in slots or LOSS in slots
    return 0 if is_end and workload.layout.vp == 1 else sizes.stream
