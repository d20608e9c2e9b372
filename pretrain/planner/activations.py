"""How many bytes does autograd keep on a pipeline rank, with all micro-batches in flight?

The ledger of a chunk (kept.py) under each choice of recomputation, times the micro-batches that
wait for their backward pass in megatron-core's order (schedule_order.py).
"""

from dataclasses import dataclass

from parallel.stages import EMBEDDING, LAYER, LOSS, MTP
from pretrain.planner.kept import (
    Ledger,
    Sizes,
    decoder_layer,
    embedding,
    head_and_loss,
    mtp_module,
    norm,
)
from pretrain.planner.schedule_order import PipelineShape, passes, peak_alive
from pretrain.planner.workload import Workload


@dataclass(frozen=True, kw_only=True, slots=True)
class Activations:
    """What a pipeline rank keeps where it keeps most."""

    by_chunk: tuple[Ledger, ...]
    """Of one micro-batch in each chunk."""
    waiting: tuple[int, ...]
    """Micro-batches of each chunk that are kept at that moment."""

    @property
    def num_bytes(self) -> int:
        """All of it."""
        ledgers = zip(self.by_chunk, self.waiting, strict=True)
        return sum(number * ledger.total() for ledger, number in ledgers)


def activations(sizes: Sizes, pipeline_rank: int) -> Activations:
    """Return what a pipeline rank keeps for the backward pass where it keeps most.

    Args:
        sizes: of a micro-batch on the rank.
        pipeline_rank: 0 <= rank < pp.

    Raises:
        ValueError: if pp does not divide the micro-batches of interleaved chunks, or recomputation
            is not megatron-core's.
    """
    workload = sizes.workload
    stages = range(pipeline_rank, len(workload.stages), workload.layout.pp)
    ledgers = tuple(chunk_ledger(sizes, stage) for stage in stages)
    return Activations(
        by_chunk=ledgers,
        waiting=_waiting(workload, pipeline_rank, [ledger.total() for ledger in ledgers]),
    )


def _waiting(workload: Workload, pipeline_rank: int, weights: list[int]) -> tuple[int, ...]:
    """Return the micro-batches of each chunk that wait where they weigh most."""
    layout = workload.layout
    # later micro-batches repeat the steady state: a few rounds of the pipeline show the peak
    enough = 2 * layout.pp * layout.vp
    count = workload.num_micro_batches
    shape = PipelineShape(
        num_stages=layout.pp,
        num_micro_batches=count if count <= enough else enough + count % layout.pp,
        num_chunks=layout.vp,
    )
    return peak_alive(passes(shape)[pipeline_rank], weights=weights)


def chunk_ledger(sizes: Sizes, stage: int) -> Ledger:
    """Return what one micro-batch leaves in one of the pp * vp stages, by operator.

    Raises:
        ValueError: if recomputation is not megatron-core's.
    """
    workload = sizes.workload
    model, slots = workload.architecture, workload.stages[stage]
    if workload.recompute.kind == "every_second_product":
        raise ValueError(
            "recompute kind=every_second_product given; none, selective and full are counted"
        )
    ledger = Ledger()
    is_first, num_mtp = EMBEDDING in slots, slots.count(MTP)
    if is_first or num_mtp:
        ledger += embedding(sizes, num_lookups=int(is_first) + num_mtp)
    ledger += _layers(sizes, stage)
    is_last_layer = workload.first_layer(stage) + slots.count(LAYER) == model.num_layers
    ends = LOSS in slots
    if (is_last_layer and LAYER in slots) if model.num_mtp_layers else ends:
        again = _num_computed_again(workload, slots.count(LAYER))
        taken = _takes_norm(sizes, model.num_layers) and slots.count(LAYER) > again
        if not taken:
            ledger["final_layernorm"] += norm(sizes, model.hidden_size)
    for _ in range(num_mtp):
        ledger += mtp_module(sizes)
    if ends:
        ledger += head_and_loss(sizes)
    return ledger


def _layers(sizes: Sizes, stage: int) -> Ledger:
    """Return what the decoder layers of a stage keep."""
    workload = sizes.workload
    recompute, slots = workload.recompute, workload.stages[stage]
    first, count = workload.first_layer(stage), slots.count(LAYER)
    num_again = _num_computed_again(workload, count)
    ledger = Ledger()
    if recompute.kind == "full":
        step = recompute.num_layers if recompute.method == "uniform" else 1
        ledger["recomputed layers"] = -(-num_again // step) * sizes.stream
    model = workload.architecture
    for layer in range(first + num_again, first + count):
        is_moe = layer >= model.num_dense_layers
        ledger += decoder_layer(
            sizes,
            is_moe=is_moe,
            takes_norm=layer > first + num_again and _takes_norm(sizes, layer),
            gives_norm=layer + 1 < first + count or layer + 1 == model.num_layers,
        )
    return ledger


def _num_computed_again(workload: Workload, num_layers: int) -> int:
    """Return how many of a stage's layers are computed twice as a whole, its first ones."""
    recompute = workload.recompute
    if recompute.kind != "full":
        return 0
    return num_layers if recompute.method == "uniform" else min(recompute.num_layers, num_layers)


def _takes_norm(sizes: Sizes, layer: int) -> bool:
    """Return whether the layer before `layer` has computed the norm that `layer` starts with."""
    workload = sizes.workload
    is_fused = sizes.operators.dual_norm == "fused" and workload.architecture.post_ffn_norm
    return is_fused and layer - 1 >= workload.architecture.num_dense_layers
