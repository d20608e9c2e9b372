"""How many bytes do a rank's weights, gradients and optimizer state take?

What a run holds from its first step to its last. megatron-core lays the parameters of a chunk,
experts apart, into one buffer of weights and one of gradients, last parameter first. A parameter
starts at a multiple of 64 values, a bucket ends at a multiple of its replicas and of 128. Each
replica has an even part of every bucket, and the optimizer's masters and moments for the values of
parameters in it, not for the padding. The largest replica's part is what counts here.

Source: megatron-core 0.16.1, distributed/param_and_grad_buffer.py:600-760 and
optimizer/distrib_optimizer.py:340-460.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from pretrain.planner.weights import Weight, chunk_weights
from pretrain.planner.workload import OptimizerState, Workload

PARAMETER_START, BUCKET_END = 64, 128
"""Values that starts of parameters, and ends of buckets, are multiples of."""
BYTES = {"fp32": 4, "bf16": 2, "fp8": 2, "nvfp4": 2}
"""Bytes of a value outside the products, by number format."""
_FP8 = 1
FP8_COPIES = 2
"""An FP8 weight is stored as it is and transposed: Hopper multiplies in one orientation only."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RankBytes:
    """Bytes that a rank holds between two steps."""

    weights: int
    """In the format of the model, padding included; FP8 copies of bf16 weights beside them."""
    gradients: int
    """Of every weight, padding included."""
    optimizer: int
    """The largest replica's masters (under bf16 weights) and two moments."""

    @property
    def total(self) -> int:
        """All three."""
        return self.weights + self.gradients + self.optimizer


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """A parameter as its buffer sees it."""

    num_values: int
    has_own_bucket: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Buffer:
    """Values of a buffer, and the most of its parameters' values that one replica steps."""

    num_values: int
    shard_values: int


def lay_out(
    pieces: Sequence[Piece], *, num_replicas: int, bucket_parameters: int | None = None
) -> Buffer:
    """Return the size of the buffer of `pieces` and of its largest replica's part.

    Args:
        pieces: parameters in the order of the modules.
        num_replicas: ranks that each step an even part.
        bucket_parameters: values after which a bucket ends; None: only shared embeddings end one.
    """
    divisor = math.lcm(num_replicas, BUCKET_END)
    shards = [0] * num_replicas
    end = 0
    for bucket in _buckets(pieces, bucket_parameters):
        start, ranges = end, list[tuple[int, int]]()
        for piece in bucket:
            at = _up(end, PARAMETER_START)
            end = at + piece.num_values
            ranges.append((at, end))
        end = _up(end, divisor)
        part = (end - start) // num_replicas
        for first, last in ranges:
            for replica in range((first - start) // part, (last - 1 - start) // part + 1):
                low = start + replica * part
                shards[replica] += min(last, low + part) - max(first, low)
    return Buffer(num_values=end, shard_values=max(shards))


def _buckets(pieces: Sequence[Piece], bucket_parameters: int | None) -> Iterator[list[Piece]]:
    """Yield what shares a bucket, last parameter first."""
    bucket: list[Piece] = []
    filled = 0
    for piece in reversed(pieces):
        if piece.has_own_bucket and bucket:
            yield bucket
            bucket, filled = [], 0
        filled = _up(filled, PARAMETER_START) + piece.num_values
        bucket.append(piece)
        is_full = bucket_parameters is not None and filled >= bucket_parameters
        if piece.has_own_bucket or is_full:
            yield bucket
            bucket, filled = [], 0
    if bucket:
        yield bucket


def _up(number: int, divisor: int) -> int:
    return -(-number // divisor) * divisor


def chunk_bytes(
    dense: Sequence[Piece],
    experts: Sequence[Piece],
    *,
    dense_replicas: int,
    expert_replicas: int,
    weight_bytes: int,
    optimizer: OptimizerState,
    bucket_parameters: int | None = None,
) -> RankBytes:
    """Return what one model chunk costs.

    Args:
        dense: parameters whose gradients are summed over dp and cp, in order.
        experts: those summed over expert_dp.
        dense_replicas: dp * cp.
        expert_replicas: expert_dp.
        weight_bytes: of a weight, 2 in bf16, 1 in FP8.
        optimizer: formats of the rest; undistributed, every replica steps all values.
        bucket_parameters: as `lay_out`.
    """
    values = stepped = 0
    for pieces, replicas in ((dense, dense_replicas), (experts, expert_replicas)):
        if not pieces:
            continue
        if optimizer.distributed:
            buffer = lay_out(pieces, num_replicas=replicas, bucket_parameters=bucket_parameters)
            values += buffer.num_values
            stepped += buffer.shard_values
        else:
            values += sum(piece.num_values for piece in pieces)
            stepped += sum(piece.num_values for piece in pieces)
    return RankBytes(
        weights=values * weight_bytes,
        gradients=values * optimizer.gradient_bytes,
        optimizer=stepped * (optimizer.master_bytes + optimizer.moment_bytes),
    )


def state_bytes(workload: Workload, pipeline_rank: int) -> RankBytes:
    """Return what a pipeline rank holds between two steps, all its chunks together.

    Worked: A.X K1 on PP 16, EP 8, 1,536 ranks, a middle stage of four MoE layers, in bf16: 4.82
    billion values; 9.6 GB of weights, 19.3 of gradients, 4.3 of optimizer, 33.2 GB.

    Args:
        workload: architecture, layout and formats.
        pipeline_rank: 0 <= rank < pp.

    Raises:
        ValueError: if weights are cut over data ranks (FSDP), which is not counted here.
    """
    _check_sharding(workload)
    layout = workload.layout
    parts = [
        part
        for stage in range(pipeline_rank, len(workload.stages), layout.pp)
        for part in _chunk(workload, stage)
    ]
    return RankBytes(
        weights=sum(part.weights for part in parts),
        gradients=sum(part.gradients for part in parts),
        optimizer=sum(part.optimizer for part in parts),
    )


def _check_sharding(workload: Workload) -> None:
    if workload.fsdp_shards > 1:
        raise ValueError(
            f"fsdp_shards={workload.fsdp_shards} given; only 1, megatron-core's distributed"
            " optimizer, is counted"
        )


def parameter_bytes(workload: Workload) -> int:
    """Return the bytes of a parameter in a checkpoint: weight, master where it has one, moments.

    bf16 and FP8: 2 + 4 + 8 = 14; fp32: 4 + 8 = 12.
    """
    optimizer = workload.optimizer
    return BYTES[workload.number_format] + optimizer.master_bytes + optimizer.moment_bytes


def held_bytes(workload: Workload, pipeline_rank: int) -> int:
    """Return what a rank of a stage needs to go on by itself, as it keeps it on its node's disk.

    All its weights and its part of masters and moments; FP8 copies are made anew. The padding of
    buffers counts, a few values a parameter.

    Args:
        workload: as `state_bytes`.
        pipeline_rank: 0 <= rank < pp.

    Raises:
        ValueError: as `state_bytes`.
    """
    state = state_bytes(_without_copies(workload), pipeline_rank)
    return state.weights + state.optimizer


def saved_bytes(workload: Workload, pipeline_rank: int) -> int:
    """Return the most that a rank of a stage writes into a checkpoint on shared storage.

    Of a value's replicas the first writes it (pretrain/checkpoint/boxes.py): one rank of each
    stage, tensor and expert part all its weights, and each its part of masters and moments. A
    second copy of the embedding on a later stage is not written. In the mean it is far less:
    `parameter_bytes` times parameters over ranks.

    Args:
        workload: as `state_bytes`.
        pipeline_rank: 0 <= rank < pp.

    Raises:
        ValueError: as `state_bytes`.
    """
    _check_sharding(workload)
    plain = _without_copies(workload)
    saved = 0
    for stage in range(pipeline_rank, len(plain.stages), plain.layout.pp):
        weights = [w for w in chunk_weights(plain, stage) if stage == 0 or not w.has_own_bucket]
        part = _of(plain, weights, weight_bytes=BYTES[plain.number_format])
        saved += part.weights + part.optimizer
    return saved


def _without_copies(workload: Workload) -> Workload:
    """Return the step in bf16 if it is in FP8 or FP4."""
    is_fp32 = workload.number_format == "fp32"
    return replace(workload, number_format="fp32" if is_fp32 else "bf16", recipe="none")


def _chunk(workload: Workload, stage: int) -> Iterator[RankBytes]:
    """Yield the bytes of a stage, of its FP8 buffers and of the others."""
    weights = chunk_weights(workload, stage)
    high = BYTES[workload.number_format]
    is_low = workload.number_format in ("fp8", "nvfp4")
    if not (is_low and workload.low_precision_weights):
        yield _of(workload, weights, weight_bytes=high)
        if is_low:  # Transformer Engine keeps the cast weights from micro-batch to micro-batch
            values = sum(weight.num_values for weight in weights if weight.is_linear)
            yield RankBytes(weights=values * _FP8 * FP8_COPIES, gradients=0, optimizer=0)
        return
    yield _of(workload, [w for w in weights if not w.is_linear], weight_bytes=high)
    linear = [weight for weight in weights if weight.is_linear]
    yield _of(workload, linear, weight_bytes=_FP8)
    values = sum(weight.num_values for weight in linear)
    yield RankBytes(weights=values * _FP8 * (FP8_COPIES - 1), gradients=0, optimizer=0)


def _of(workload: Workload, weights: Sequence[Weight], *, weight_bytes: int) -> RankBytes:
    layout = workload.layout
    replicas = (layout.dp * layout.cp, layout.expert_dp)
    return _of_weights(tuple(weights), replicas, weight_bytes, workload.optimizer)


@lru_cache(maxsize=4096)  # stages are alike, and a search asks for the same ones again
def _of_weights(
    weights: tuple[Weight, ...],
    replicas: tuple[int, int],
    weight_bytes: int,
    optimizer: OptimizerState,
) -> RankBytes:
    def pieces(is_expert: bool) -> list[Piece]:
        return [
            Piece(num_values=w.num_values, has_own_bucket=w.has_own_bucket)
            for w in weights
            if w.is_expert == is_expert
        ]

    return chunk_bytes(
        pieces(False),
        pieces(True),
        dense_replicas=replicas[0],
        expert_replicas=replicas[1],
        weight_bytes=weight_bytes,
        optimizer=optimizer,
    )
