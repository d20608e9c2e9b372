"""How many bytes do a rank's weights, gradients and optimizer state take, by its modules?

What the modules of a dry run hold, laid into buffers as megatron-core lays them
(pretrain/planner/state_bytes.py, which counts the same from the sizes alone). Activations come on
top. No torch.
"""

from parallel.layout import Layout
from pretrain.model.precision import Precision
from pretrain.model.shares import HeldWeight, Share
from pretrain.planner.state_bytes import Piece, RankBytes, chunk_bytes
from pretrain.planner.workload import OptimizerState

_BF16, _FP32 = 2, 4


def rank_bytes(share: Share, *, layout: Layout, precision: Precision) -> RankBytes:
    """Return what a rank's share costs on `layout`, its largest replica's part of the optimizer.

    Without `optimizer.overlap`, which ends buckets earlier and pads each of them.

    Args:
        share: what the rank holds.
        layout: dense weights are divided over dp * cp replicas, experts over expert_dp.
        precision: number formats; FP8 keeps bf16 weights, its copies are not counted here.
    """
    optimizer = OptimizerState(master_bytes=_FP32 if precision.is_low else 0)
    chunks = [
        chunk_bytes(
            [_piece(weight) for weight in chunk if not weight.is_expert],
            [_piece(weight) for weight in chunk if weight.is_expert],
            dense_replicas=layout.dp * layout.cp,
            expert_replicas=layout.expert_dp,
            weight_bytes=_BF16 if precision.is_low else _FP32,
            optimizer=optimizer,
        )
        for chunk in share.chunks
    ]
    return RankBytes(
        weights=sum(chunk.weights for chunk in chunks),
        gradients=sum(chunk.gradients for chunk in chunks),
        optimizer=sum(chunk.optimizer for chunk in chunks),
    )


def _piece(weight: HeldWeight) -> Piece:
    return Piece(num_values=weight.num_values, has_own_bucket=weight.has_own_bucket)
