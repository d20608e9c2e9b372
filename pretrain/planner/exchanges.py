"""How long do ranks take to exchange values, and how much of it stays visible?

Ranks stand in megatron's order, tp fastest, then cp, dp, pp, and for experts etp, ep, expert dp,
pp. A group inside a node uses NVLink. A group over several nodes is as fast as its members' network
ports of a node together, or NVLink if that is slower: a ring enters and leaves each node once for
every port. Of an exchange that runs beside a computation a share `exposed` is visible, and all that
outlasts the computation. Sizes in bytes, times in seconds, of one rank.
"""

import math

from pretrain.planner.architecture import Architecture, GroupedAttention
from pretrain.planner.hardware import Hardware
from pretrain.planner.workload import Workload


def group_bytes_per_s(workload: Workload, hardware: Hardware, *, size: int, stride: int) -> float:
    """Return the bandwidth of a collective for each member.

    Args:
        workload: says how many GPUs a node has.
        hardware: links and what they reach.
        size: members of the group.
        stride: ranks from one member to the next.
    """
    gpu, constants = hardware.gpu, hardware.constants
    nvlink = gpu.nvlink_bytes_per_s * constants.nvlink
    if size * stride <= workload.gpus_per_node:
        return nvlink
    members_of_a_node = max(1, min(size, workload.gpus_per_node // stride))
    network = gpu.network_bytes_per_s * constants.network
    return min(nvlink, members_of_a_node * network) if members_of_a_node > 1 else network


def ring_s(size: int, *, moved_bytes: float, bytes_per_s: float) -> float:
    """Return the time to gather or reduce-scatter `moved_bytes` of a whole over a group."""
    return (size - 1) / size * moved_bytes / bytes_per_s


def visible_s(exchange_s: float, *, beside_s: float, hardware: Hardware) -> float:
    """Return what of an exchange a computation of `beside_s` does not hide."""
    return max(exchange_s * hardware.constants.exposed, exchange_s - beside_s)


def tensor_s(workload: Workload, hardware: Hardware) -> float:
    """Return one gather or reduce-scatter of a micro-batch's residual rows over tp."""
    layout = workload.layout
    if layout.tp == 1:
        return 0.0
    row = workload.value_bytes * workload.architecture.hidden_size
    moved = row * workload.micro_batch_tokens
    speed = group_bytes_per_s(workload, hardware, size=layout.tp, stride=1)
    return hardware.exchange_s + ring_s(layout.tp, moved_bytes=moved, bytes_per_s=speed)


def context_s(workload: Workload, hardware: Hardware) -> float:
    """Return the exchange of keys and values over cp in a layer's forward pass (ring)."""
    layout = workload.layout
    if layout.cp == 1:
        return 0.0
    attention = workload.architecture.attention
    if isinstance(attention, GroupedAttention):
        values = 2 * attention.num_kv_heads * attention.head_size
    else:
        values = attention.num_heads * (attention.score_size + attention.v_head_size)
    own = workload.value_bytes * values / layout.tp * workload.micro_batch_tokens
    speed = group_bytes_per_s(workload, hardware, size=layout.cp, stride=layout.tp)
    return hardware.exchange_s + own * (layout.cp - 1) / speed


def expert_s(workload: Workload, hardware: Hardware) -> float:
    """Return one dispatch (or combine) of a micro-batch's tokens over ep.

    alltoall sends every copy on its own; DeepEP and HybridEP send a token once to each node it is
    needed on and copy it there over NVLink. Both links work at the same time.
    """
    layout, architecture = workload.layout, workload.architecture
    if layout.ep == 1:
        return 0.0
    gpu, constants = hardware.gpu, hardware.constants
    tokens = workload.micro_batch_tokens / layout.tp
    row = workload.value_bytes * architecture.hidden_size
    of_a_node = max(1, min(layout.ep, workload.gpus_per_node // layout.etp))
    num_nodes = layout.ep // of_a_node
    copies = architecture.num_experts_per_token * layout.etp
    nvlink = gpu.nvlink_bytes_per_s * constants.nvlink
    network = gpu.network_bytes_per_s * constants.network
    busiest = workload.expert_imbalance
    if workload.dispatcher == "allgather":
        speed = group_bytes_per_s(workload, hardware, size=layout.ep, stride=layout.etp)
        return hardware.exchange_s + tokens * row * (layout.ep - 1) / speed
    if workload.dispatcher == "alltoall":
        over_network = copies * (num_nodes - 1) / num_nodes
        over_nvlink = copies * (of_a_node - 1) / layout.ep
    else:
        over_network = (num_nodes - 1) * node_share(architecture, num_nodes=num_nodes)
        over_nvlink = copies * (of_a_node - 1) / of_a_node
    legs = (tokens * row * over_network / network, tokens * row * over_nvlink / nvlink)
    return hardware.exchange_s + max(legs) * busiest


def node_share(architecture: Architecture, *, num_nodes: int) -> float:
    """Return the share of tokens that need an expert of a given node.

    Chosen experts are spread evenly: over all nodes, or with groups over the nodes of the chosen
    groups. A.X K1 (8 groups, 4 chosen, 8 experts a token) on 8 nodes: 0.45; without groups 0.66.
    """
    groups, chosen = architecture.num_expert_groups, architecture.num_groups_per_token
    experts = architecture.num_experts_per_token
    if groups == 1 or groups == chosen or num_nodes == 1:
        return 1 - (1 - 1 / num_nodes) ** experts
    if num_nodes >= groups:
        nodes_of_a_group = num_nodes / groups
        return chosen / groups * (1 - (1 - 1 / (chosen * nodes_of_a_group)) ** experts)
    own = groups // num_nodes
    missed = 0.0
    for taken in range(min(own, chosen) + 1):
        if chosen - taken > groups - own:
            continue
        ways = math.comb(own, taken) * math.comb(groups - own, chosen - taken)
        missed += ways / math.comb(groups, chosen) * (1 - taken / chosen) ** experts
    return 1 - missed


def hop_s(workload: Workload, hardware: Hardware) -> float:
    """Return the time a micro-batch's residual rows take from a stage to the next."""
    layout = workload.layout
    if layout.pp == 1:
        return 0.0
    tokens = workload.micro_batch_tokens / layout.tp
    moved = workload.value_bytes * workload.architecture.hidden_size * tokens
    stride = layout.num_ranks // layout.pp
    return hardware.exchange_s + moved / group_bytes_per_s(
        workload, hardware, size=2, stride=stride
    )


def gather_s(workload: Workload, hardware: Hardware, *, parameters: float, experts: float) -> float:
    """Return the time FSDP takes to gather a layer's weights in bf16.

    Args:
        workload: the step.
        hardware: links.
        parameters: of the layer on this rank's tp share, experts left out.
        experts: of the routed experts of this rank's ep share.
    """
    layout, shards = workload.layout, workload.fsdp_shards
    if shards == 1:
        return 0.0
    speed = group_bytes_per_s(workload, hardware, size=shards, stride=layout.tp)
    weight = 1 if workload.low_precision_weights else 2
    whole = ring_s(shards, moved_bytes=weight * parameters, bytes_per_s=speed)
    expert_shards = max(1, shards // (layout.ep * layout.etp))
    if expert_shards == 1:
        return whole
    speed = group_bytes_per_s(workload, hardware, size=expert_shards, stride=layout.ep * layout.etp)
    return whole + ring_s(expert_shards, moved_bytes=weight * experts, bytes_per_s=speed)


def replica_s(
    workload: Workload, hardware: Hardware, *, parameters: float, experts: float
) -> tuple[float, float]:
    """Return the times to reduce-scatter a rank's gradients and to gather its weights in a step.

    Args:
        workload: the step.
        hardware: links.
        parameters: resident on the rank, experts left out.
        experts: resident routed experts.
    """
    layout = workload.layout
    size, expert_size = layout.dp * layout.cp, layout.expert_dp
    parts = ((parameters, size, layout.tp), (experts, expert_size, layout.ep * layout.etp))
    reduced = gathered = 0.0
    weight = 1 if workload.low_precision_weights else workload.value_bytes
    for values, members, stride in parts:
        if members > 1 and values:
            speed = group_bytes_per_s(workload, hardware, size=members, stride=stride)
            grad = workload.optimizer.gradient_bytes * values
            reduced += hardware.exchange_s + ring_s(members, moved_bytes=grad, bytes_per_s=speed)
            gathered += hardware.exchange_s + ring_s(
                members, moved_bytes=weight * values, bytes_per_s=speed
            )
    return reduced, gathered
