"""How long does a training step take, and what takes the time?

The passes of a micro-batch through every stage (layer_time.py) run in megatron's order
(pipeline.py); then gradients and weights travel between replicas as far as the passes do not hide
them, and the optimizer steps. The parts of the slowest stage add up to the step.
"""

from dataclasses import dataclass, fields

from parallel.stages import EMBEDDING, LAYER, LOSS, MTP
from pretrain.planner import exchanges
from pretrain.planner.hardware import Hardware
from pretrain.planner.layer_time import Parts, Slot, layer_parameters, slots_of, stage_slot
from pretrain.planner.pipeline import PassTimes, pipeline_seconds
from pretrain.planner.schedule_order import PipelineShape
from pretrain.planner.workload import Workload

STEP_LAUNCH_S = 0.02
"""Seconds of a step outside passes and optimizer: data, the norm's and the loss's reductions; our
choice, of no weight beside steps of seconds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTime:
    """Seconds of a step and their parts."""

    workload: Workload
    """What is timed."""
    passes: Parts
    """All micro-batches' passes through the slowest stage."""
    bubble_s: float
    """Waiting for other stages, hops included."""
    replica_s: float
    """Visible exchange of gradients and weights between replicas."""
    optimizer_s: float
    """Norm, clipping and the optimizer's step."""
    step_host_s: float
    """What a step costs once, whatever its size."""
    outside: tuple[str, ...]
    """Why the prediction is outside of what the constants were fitted on; none: it is inside."""

    @property
    def total_s(self) -> float:
        """The step."""
        rest = self.bubble_s + self.replica_s + self.optimizer_s + self.step_host_s
        return self.passes.total_s + rest

    @property
    def tokens_per_s(self) -> float:
        """Tokens of a second on each GPU."""
        return self.workload.step_tokens / self.total_s / self.workload.layout.num_ranks

    @property
    def model_flop_per_s(self) -> float:
        """FLOP of a second on each GPU: causal, MTP counted, recomputation not."""
        architecture = self.workload.architecture
        sequence = self.workload.sequence_tokens
        return self.tokens_per_s * architecture.flop_per_token(sequence_tokens=sequence)

    def named_parts(self) -> dict[str, float]:
        """Return seconds by name; their sum is `total_s`."""
        named = {field.name[:-2]: getattr(self.passes, field.name) for field in fields(Parts)}
        return {
            **named,
            "bubble": self.bubble_s,
            "replicas": self.replica_s,
            "optimizer": self.optimizer_s,
            "step_host": self.step_host_s,
        }


def predict_step(
    workload: Workload, hardware: Hardware, *, bubble_share: float | None = None
) -> StepTime:
    """Return how long a step takes.

    Args:
        workload: the step.
        hardware: the GPU and its constants.
        bubble_share: waiting for other stages over the slowest stage's passes, if it is known from
            a prediction with nearly the same times; None: the pipeline is simulated.

    Raises:
        ValueError: if megatron-core could not run the pipeline, such as too few micro-batches.
    """
    stages = _stage_times(workload, hardware)
    pp, micro_batches = workload.layout.pp, workload.num_micro_batches
    ranks = [_added(stages[rank::pp]) for rank in range(pp)]
    slowest = max(range(pp), key=lambda rank: ranks[rank].total_s)
    busy = Parts().plus(ranks[slowest], times=micro_batches)
    if pp == 1:
        bubble_s = 0.0
    elif bubble_share is None:
        bubble_s = _pipeline_s(workload, hardware, stages) - busy.total_s
    else:
        bubble_s = bubble_share * busy.total_s
    parameters, experts = resident_parameters(workload, slowest)
    return StepTime(
        workload=workload,
        passes=busy,
        bubble_s=max(0.0, bubble_s),
        replica_s=_replica_s(
            workload, hardware, parameters, experts, beside_s=ranks[slowest].total_s
        ),
        optimizer_s=_optimizer_s(workload, hardware, parameters, experts),
        step_host_s=STEP_LAUNCH_S if hardware.step_s is None else hardware.step_s,
        outside=outside_range(workload, hardware),
    )


def _stage_times(workload: Workload, hardware: Hardware) -> list[Slot]:
    slots = slots_of(workload, hardware)
    same: dict[tuple[str, int], Slot] = {}
    found: list[Slot] = []
    dense_left = workload.architecture.num_dense_layers
    for stage, letters in enumerate(workload.stages):
        num_dense = min(letters.count(LAYER), dense_left)
        dense_left -= num_dense
        key = (letters, num_dense)
        if key not in same:
            same[key] = stage_slot(workload, slots, stage=stage)
        found.append(same[key])
    return found


def _added(slots: list[Slot]) -> Parts:
    total = Parts()
    for slot in set(slots):
        times = slots.count(slot)
        total = total.plus(slot.forward, times=times).plus(slot.backward, times=times)
    return total


def pipeline_shape(workload: Workload) -> PipelineShape:
    """Return the pipeline of a step.

    Raises:
        ValueError: if megatron-core would refuse it.
    """
    return PipelineShape(
        num_stages=workload.layout.pp,
        num_micro_batches=workload.num_micro_batches,
        num_chunks=workload.layout.vp,
        overlaps_hops=workload.layout.overlaps_hops,
    )


def pass_times(workload: Workload, hardware: Hardware) -> PassTimes:
    """Return the seconds of each stage's and chunk's passes and of a hop, to be simulated."""
    return _pass_times(workload, hardware, _stage_times(workload, hardware))


def _pass_times(workload: Workload, hardware: Hardware, stages: list[Slot]) -> PassTimes:
    pp = workload.layout.pp
    return PassTimes(
        forward_s=tuple(
            tuple(slot.forward.total_s for slot in stages[rank::pp]) for rank in range(pp)
        ),
        backward_s=tuple(
            tuple(slot.backward.total_s for slot in stages[rank::pp]) for rank in range(pp)
        ),
        hop_s=exchanges.hop_s(workload, hardware),
    )


def _pipeline_s(workload: Workload, hardware: Hardware, stages: list[Slot]) -> float:
    times = _pass_times(workload, hardware, stages)
    return pipeline_seconds(pipeline_shape(workload), times=times)


def resident_parameters(workload: Workload, pipeline_rank: int) -> tuple[float, float]:
    """Return a rank's parameters before FSDP cuts them: all but routed experts, and these."""
    architecture, pp = workload.architecture, workload.layout.pp
    parameters = experts = 0.0
    embedding = architecture.embedding_parameters / workload.layout.tp
    for stage in range(pipeline_rank, len(workload.stages), pp):
        layer = workload.first_layer(stage)
        for letter in workload.stages[stage]:
            if letter in (EMBEDDING, LOSS):
                parameters += embedding
                continue
            is_moe = layer >= architecture.num_dense_layers
            if letter == MTP:
                is_moe = architecture.mtp_is_moe
                parameters += 2 * architecture.hidden_size**2 / workload.layout.tp
            own, routed = layer_parameters(workload, is_moe=is_moe)
            parameters, experts = parameters + own, experts + routed
            layer += letter == LAYER
    return parameters, experts


def _replica_s(
    workload: Workload, hardware: Hardware, parameters: float, experts: float, *, beside_s: float
) -> float:
    """Return what of the exchange of gradients and weights between replicas is visible.

    With FSDP weights are gathered in the passes (layer_time.py); gradients are reduced beside the
    last micro-batch's backward pass.
    """
    reduced_s, gathered_s = exchanges.replica_s(
        workload, hardware, parameters=parameters, experts=experts
    )
    if workload.fsdp_shards > 1:
        gathered_s = 0.0
    exchanged_s = reduced_s + gathered_s
    if not workload.overlap_data_parallel:
        return exchanged_s
    return exchanges.visible_s(exchanged_s, beside_s=beside_s, hardware=hardware)


def _optimizer_s(
    workload: Workload, hardware: Hardware, parameters: float, experts: float
) -> float:
    """Return the time of norm and step: gradients are zeroed and read, states read and written."""
    layout, state = workload.layout, workload.optimizer
    shards, expert_shards = layout.dp * layout.cp, layout.expert_dp
    if not state.distributed:
        shards = expert_shards = 1
    own = parameters / shards + experts / expert_shards
    resident = own if workload.fsdp_shards > 1 else parameters + experts
    stepped = state.gradient_bytes + 2 * (state.master_bytes + state.moment_bytes) + 2
    moved = own * stepped + 2 * resident * state.gradient_bytes
    return moved / (hardware.gpu.memory_bytes_per_s * hardware.constants.memory)


RANGE_WORDS = {
    "num_ranks": "GPUs",
    "tp": "tp",
    "cp": "cp",
    "pp": "pp",
    "vp": "vp",
    "ep": "ep",
    "micro_batch_tokens": "tokens of a micro-batch on a rank",
    "sequence_tokens": "tokens of a sequence",
    "hidden_size": "hidden size",
    "score_size": "size of an attention head",
}
"""Quantities whose range is kept with the constants, and their words."""


def ranged(workload: Workload) -> dict[str, float]:
    """Return the quantities of a workload whose fitted range is kept."""
    layout = workload.layout
    return {
        "num_ranks": layout.num_ranks,
        "tp": layout.tp,
        "cp": layout.cp,
        "pp": layout.pp,
        "vp": layout.vp,
        "ep": layout.ep,
        "micro_batch_tokens": workload.micro_batch_tokens,
        "sequence_tokens": workload.sequence_tokens,
        "hidden_size": workload.architecture.hidden_size,
        "score_size": workload.architecture.attention.score_size,
    }


def outside_range(workload: Workload, hardware: Hardware) -> tuple[str, ...]:
    """Return, one line each, which quantities lie outside of what was fitted."""
    if not hardware.fitted_range:
        return (f"{hardware.gpu.name}: no constants were fitted, these are prior values",)
    found: list[str] = []
    for key, value in ranged(workload).items():
        if key not in hardware.fitted_range:  # a CPU's probe varies few
            continue
        low, high = hardware.fitted_range[key]
        if not low <= value <= high:
            found.append(f"{RANGE_WORDS[key]} = {value:,g}, fitted on {low:,g} to {high:,g}")
    return tuple(found)
