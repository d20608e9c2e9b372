"""How long does a rank take to pass a micro-batch through one slot of a stage?

A slot is a layer, the embedding, an MTP module or head and loss (parallel/stages.py). Each pass is
a sum of named parts: products, attention, operators bound by memory, visible exchanges, and what
the host adds where a GPU would have been done sooner than kernels are launched.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from parallel.stages import EMBEDDING, LAYER, LOSS, MTP
from pretrain.planner import elementwise as counted
from pretrain.planner import exchanges
from pretrain.planner.hardware import Hardware
from pretrain.planner.products import (
    ATTENTION_BACKWARD,
    Product,
    attention_core_s,
    attention_products,
    expert_products,
    expert_tokens,
    ffn_products,
    head_product,
    total_s,
)
from pretrain.planner.workload import Workload


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """Seconds of a pass, by what takes them; they add up."""

    products_s: float = 0.0
    """Matrix products."""
    attention_s: float = 0.0
    """Scores and values."""
    memory_s: float = 0.0
    """Operators bound by memory, casts included."""
    tensor_exchange_s: float = 0.0
    """Visible exchange over tp."""
    context_exchange_s: float = 0.0
    """Visible exchange over cp."""
    expert_exchange_s: float = 0.0
    """Visible exchange over ep."""
    weight_exchange_s: float = 0.0
    """Visible gathers of FSDP."""
    host_s: float = 0.0
    """Waiting for the host, counts of tokens and small kernels."""

    @property
    def total_s(self) -> float:
        """Sum of all parts."""
        return (
            self.products_s
            + self.attention_s
            + self.memory_s
            + self.tensor_exchange_s
            + self.context_exchange_s
            + self.expert_exchange_s
            + self.weight_exchange_s
            + self.host_s
        )

    def plus(self, other: "Parts", *, times: float = 1.0) -> "Parts":
        """Return these parts and `times` others; written out, since a fit calls it most."""
        return Parts(
            products_s=self.products_s + times * other.products_s,
            attention_s=self.attention_s + times * other.attention_s,
            memory_s=self.memory_s + times * other.memory_s,
            tensor_exchange_s=self.tensor_exchange_s + times * other.tensor_exchange_s,
            context_exchange_s=self.context_exchange_s + times * other.context_exchange_s,
            expert_exchange_s=self.expert_exchange_s + times * other.expert_exchange_s,
            weight_exchange_s=self.weight_exchange_s + times * other.weight_exchange_s,
            host_s=self.host_s + times * other.host_s,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Slot:
    """Forward and backward pass of a micro-batch through a slot; recomputation is in the latter."""

    forward: Parts
    """Forward pass."""
    backward: Parts
    """Backward pass."""


def layer_slot(workload: Workload, hardware: Hardware, *, is_moe: bool, windowed: bool) -> Slot:
    """Return the time of one decoder layer.

    Args:
        workload: the step.
        hardware: what computes it.
        is_moe: whether it has experts.
        windowed: whether its attention has the window.
    """
    forward, backward = _computed(workload, hardware, is_moe=is_moe, windowed=windowed)
    forward, backward = _with_exchanges(workload, hardware, forward, backward, is_moe=is_moe)
    again = _recomputed(workload, forward, is_moe=is_moe, hardware=hardware)
    backward = backward.plus(again)
    backward = _with_weights(workload, hardware, backward, is_moe=is_moe)
    forward = _with_weights(workload, hardware, forward, is_moe=is_moe)
    return Slot(
        forward=_with_host(workload, hardware, forward, is_moe=is_moe, is_backward=False),
        backward=_with_host(workload, hardware, backward, is_moe=is_moe, is_backward=True),
    )


def _computed(
    workload: Workload, hardware: Hardware, *, is_moe: bool, windowed: bool
) -> tuple[Parts, Parts]:
    architecture = workload.architecture
    products = list(attention_products(workload))
    own_rows = float(workload.micro_batch_tokens)
    tp = workload.layout.tp
    moved = [counted.norm_bytes(workload), counted.rotary_bytes(workload)]
    if is_moe:
        products += expert_products(workload)
        inner = architecture.expert_ffn_size / workload.layout.etp
        rows = expert_tokens(workload)
        moved.append(counted.activation_bytes(workload, rows=rows, inner_size=inner))
        moved += [counted.routing_bytes(workload), counted.bias_bytes(workload)]
        shared = architecture.shared_ffn_size
    else:
        shared = architecture.dense_ffn_size
    if shared:
        products += ffn_products(workload, inner_size=shared)
        moved.append(counted.activation_bytes(workload, rows=own_rows, inner_size=shared / tp))
    moved.append(counted.cast_bytes(workload, products))
    product_s = total_s(products, workload=workload, hardware=hardware)
    core_s = attention_core_s(workload, hardware=hardware, windowed=windowed)
    speed = hardware.gpu.memory_bytes_per_s * hardware.constants.memory
    forward, backward = (sum(item[idx] for item in moved) / speed for idx in (0, 1))
    return (
        Parts(products_s=product_s, attention_s=core_s, memory_s=forward),
        Parts(
            products_s=2 * product_s,
            attention_s=ATTENTION_BACKWARD * core_s,
            memory_s=backward,
        ),
    )


def _with_exchanges(
    workload: Workload, hardware: Hardware, forward: Parts, backward: Parts, *, is_moe: bool
) -> tuple[Parts, Parts]:
    """Return the passes with the visible part of tp's, cp's and ep's exchanges."""
    num_pairs = 1 if is_moe and not workload.architecture.shared_ffn_size else 2
    tensor_s = exchanges.tensor_s(workload, hardware)
    context_s = exchanges.context_s(workload, hardware)
    expert_s = 2 * exchanges.expert_s(workload, hardware) if is_moe else 0.0
    # megatron runs one micro-batch's forward pass beside another's backward pass
    beside_s = (forward.total_s + backward.total_s) / 2
    found: list[Parts] = []
    # backward: tp gathers the inputs once more for the weights' gradients, cp sends gradients too
    for computed, tensor_times, context_times in ((forward, 2, 1), (backward, 3, 2)):
        over_tp = num_pairs * tensor_times * tensor_s
        if workload.overlap_tensor_parallel:
            over_tp = exchanges.visible_s(over_tp, beside_s=computed.products_s, hardware=hardware)
        over_cp = exchanges.visible_s(
            context_times * context_s, beside_s=computed.attention_s, hardware=hardware
        )
        over_ep = expert_s
        if workload.overlap_experts:
            over_ep = exchanges.visible_s(expert_s, beside_s=beside_s, hardware=hardware)
        found.append(
            computed.plus(
                Parts(
                    tensor_exchange_s=over_tp,
                    context_exchange_s=over_cp,
                    expert_exchange_s=over_ep,
                )
            )
        )
    return found[0], found[1]


def _recomputed(workload: Workload, forward: Parts, *, is_moe: bool, hardware: Hardware) -> Parts:
    """Return what of the forward pass is done again before the backward one."""
    recompute = workload.recompute
    if recompute.kind == "none":
        return Parts()
    if recompute.kind == "full":
        # megatron and torch stop at the last saved input: the whole layer runs again
        return forward
    if recompute.kind == "every_second_product":
        half = Parts(products_s=forward.products_s / 2, memory_s=forward.memory_s)
        return half.plus(Parts(tensor_exchange_s=forward.tensor_exchange_s / 2))
    return _modules_again(workload, forward, is_moe=is_moe, hardware=hardware)


def _modules_again(
    workload: Workload, forward: Parts, *, is_moe: bool, hardware: Hardware
) -> Parts:
    architecture, modules = workload.architecture, workload.recompute.modules
    speed = hardware.gpu.memory_bytes_per_s * hardware.constants.memory
    product_s = moved = exchanged_s = attention_s = 0.0

    def seconds(products: tuple[Product, ...]) -> float:
        return total_s(products, workload=workload, hardware=hardware)

    if "layernorm" in modules:
        moved += counted.norm_bytes(workload)[0] / 2
    if "core_attn" in modules:
        attention_s += forward.attention_s
    if "mla_up_proj" in modules and len(architecture.attention.matrices(1)) > 2:
        product_s += seconds(tuple(attention_products(workload)[i] for i in (1, 3)))
        moved += counted.rotary_bytes(workload)[0]
    if "mlp" in modules and not is_moe:
        product_s += seconds(ffn_products(workload, inner_size=architecture.dense_ffn_size))
        moved += forward.memory_s * speed / 3
    if is_moe and "moe" in modules:
        product_s += seconds(expert_products(workload))
        if architecture.shared_ffn_size:
            product_s += seconds(ffn_products(workload, inner_size=architecture.shared_ffn_size))
        exchanged_s += forward.expert_exchange_s
        moved += counted.routing_bytes(workload)[0]
    if is_moe and ("moe_act" in modules or "moe" in modules):
        inner = architecture.expert_ffn_size / workload.layout.etp
        rows = expert_tokens(workload)
        moved += counted.activation_bytes(workload, rows=rows, inner_size=inner)[0]
    if is_moe and "shared_experts" in modules:
        product_s += seconds(ffn_products(workload, inner_size=architecture.shared_ffn_size))
    return Parts(
        products_s=product_s,
        attention_s=attention_s,
        memory_s=moved / speed,
        expert_exchange_s=exchanged_s,
    )


def _with_weights(
    workload: Workload, hardware: Hardware, computed: Parts, *, is_moe: bool
) -> Parts:
    """Return a pass with what stays visible of FSDP's gather of the layer's weights."""
    if workload.fsdp_shards == 1:
        return computed
    parameters, experts = layer_parameters(workload, is_moe=is_moe)
    gather_s = exchanges.gather_s(workload, hardware, parameters=parameters, experts=experts)
    seen = exchanges.visible_s(gather_s, beside_s=computed.total_s, hardware=hardware)
    return computed.plus(Parts(weight_exchange_s=seen))


def layer_parameters(workload: Workload, *, is_moe: bool) -> tuple[float, float]:
    """Return a layer's parameters on a rank before FSDP: all but routed experts, and these."""
    architecture, layout = workload.architecture, workload.layout
    if not is_moe:
        return architecture.dense_layer_parameters / layout.tp, 0.0
    routed = architecture.num_routed_experts * architecture.expert_parameters
    return architecture.around_experts_parameters / layout.tp, routed / (layout.ep * layout.etp)


def _with_host(
    workload: Workload, hardware: Hardware, computed: Parts, *, is_moe: bool, is_backward: bool
) -> Parts:
    """Return a pass that takes no less than its kernels' launches, and an MoE layer's stalls.

    On a CPU, which does both, launches come on top.
    """
    num_launches = counted.launches(workload, is_moe=is_moe)[int(is_backward)]
    if hardware.is_host:
        return computed.plus(Parts(host_s=num_launches * hardware.constants.launch_s))
    excess = max(0.0, num_launches * hardware.constants.launch_s - computed.total_s)
    stall = hardware.constants.expert_stall_s if is_moe else 0.0
    return computed.plus(Parts(host_s=max(excess, stall)))


def head_slot(workload: Workload, hardware: Hardware) -> Slot:
    """Return the time of the head and the loss."""
    speed = hardware.gpu.memory_bytes_per_s * hardware.constants.memory
    product_s = total_s((head_product(workload),), workload=workload, hardware=hardware)
    forward, backward = (moved / speed for moved in counted.loss_bytes(workload))
    over_tp = exchanges.tensor_s(workload, hardware)
    again = product_s if workload.recompute.loss_chunk_tokens else 0.0
    return Slot(
        forward=Parts(products_s=product_s, memory_s=forward, tensor_exchange_s=over_tp),
        backward=Parts(
            products_s=2 * product_s + again, memory_s=backward, tensor_exchange_s=over_tp
        ),
    )


def embedding_slot(workload: Workload, hardware: Hardware) -> Slot:
    """Return the time of the embedding: rows read and written; backward in fp32."""
    speed = hardware.gpu.memory_bytes_per_s * hardware.constants.memory
    values = workload.micro_batch_tokens * workload.architecture.hidden_size / workload.layout.tp
    over_tp = exchanges.tensor_s(workload, hardware)
    return Slot(
        forward=Parts(memory_s=4 * values / speed, tensor_exchange_s=over_tp),
        backward=Parts(memory_s=10 * values / speed, tensor_exchange_s=over_tp),
    )


def slots_of(workload: Workload, hardware: Hardware) -> Mapping[str, Slot]:
    """Return the time of each kind of slot that the model has.

    Keys: E, L and m as in parallel/stages.py; `dense`, `moe` and, with windows, `dense windowed`
    and `moe windowed` for the letter t.
    """
    architecture = workload.architecture
    slots = {EMBEDDING: embedding_slot(workload, hardware), LOSS: head_slot(workload, hardware)}
    for is_moe, layers in (
        (False, architecture.num_dense_layers),
        (True, architecture.num_moe_layers),
    ):
        for windowed in (False, True):
            if layers and (not windowed or architecture.num_windowed_layers):
                slots[kind_of(is_moe=is_moe, windowed=windowed)] = layer_slot(
                    workload, hardware, is_moe=is_moe, windowed=windowed
                )
    if architecture.num_mtp_layers:
        slots[MTP] = mtp_slot(workload, hardware, slots)
    return slots


def mtp_slot(workload: Workload, hardware: Hardware, slots: Mapping[str, Slot]) -> Slot:
    """Return the time of an MTP module: projection of two streams, a layer, head and loss."""
    hidden = workload.architecture.hidden_size
    layer = slots[kind_of(is_moe=workload.architecture.mtp_is_moe, windowed=False)]
    projection = Product(
        rows=workload.micro_batch_tokens,
        columns=hidden / workload.layout.tp,
        inner=2 * hidden,
    )
    product_s = total_s((projection,), workload=workload, hardware=hardware)
    head = slots[LOSS]
    return Slot(
        forward=layer.forward.plus(head.forward).plus(Parts(products_s=product_s)),
        backward=layer.backward.plus(head.backward).plus(Parts(products_s=2 * product_s)),
    )


def kind_of(*, is_moe: bool, windowed: bool) -> str:
    """Return the key of a decoder layer in `slots_of`."""
    return ("moe" if is_moe else "dense") + (" windowed" if windowed else "")


def stage_slot(workload: Workload, slots: Mapping[str, Slot], *, stage: int) -> Slot:
    """Return the time of a whole stage: all its slots.

    Windowed layers alternate with the others, as in GPT-OSS; the first `num_dense_layers` are
    dense.
    """
    architecture = workload.architecture
    letters = workload.stages[stage]
    num_layers = letters.count(LAYER)
    dense_left = architecture.num_dense_layers - workload.first_layer(stage)
    num_dense = max(0, min(num_layers, dense_left))
    share = architecture.num_windowed_layers / architecture.num_layers
    counts: dict[str, float] = {
        letter: letters.count(letter) for letter in (EMBEDDING, MTP, LOSS) if letter in letters
    }
    for is_moe, layers in ((False, num_dense), (True, num_layers - num_dense)):
        if layers:
            counts[kind_of(is_moe=is_moe, windowed=False)] = (1 - share) * layers
            if share:
                counts[kind_of(is_moe=is_moe, windowed=True)] = share * layers
    forward, backward = Parts(), Parts()
    for kind, times in counts.items():
        forward = forward.plus(slots[kind].forward, times=times)
        backward = backward.plus(slots[kind].backward, times=times)
    return Slot(forward=forward, backward=backward)
