"""How many bytes do a rank's weights, gradients and optimizer state take?

What a run holds from its first step to its last; activations come on top. Weights stay whole,
gradients are summed in fp32, and the distributed optimizer gives each replica its part of the
masters and moments. No torch.
"""

from dataclasses import dataclass

from parallel.layout import Layout
from pretrain.model.precision import Precision
from pretrain.model.shares import Share

_BF16, _FP32 = 2, 4


@dataclass(frozen=True, kw_only=True, slots=True)
class RankBytes:
    """Bytes that a rank holds between two steps."""

    weights: int
    """bf16, or fp32 with precision=fp32."""
    gradients: int
    """fp32, of every weight."""
    optimizer: int
    """This rank's part of two fp32 moments and, under bf16 weights, of the fp32 masters."""

    @property
    def total(self) -> int:
        """All three."""
        return self.weights + self.gradients + self.optimizer


def rank_bytes(share: Share, *, layout: Layout, precision: Precision) -> RankBytes:
    """Return what a rank's share costs on `layout`.

    The optimizer's parts are rounded up to whole values; megatron pads its buffers by less than
    1,024 values more for each replica.

    Args:
        share: what the rank holds.
        layout: dense weights are divided over dp * cp replicas, experts over expert_dp.
        precision: number formats.
    """
    dense = share.num_parameters - share.num_expert_parameters
    part = -(-dense // (layout.dp * layout.cp)) + -(
        -share.num_expert_parameters // layout.expert_dp
    )
    states = 3 if precision.is_low else 2
    return RankBytes(
        weights=share.num_parameters * (_BF16 if precision.is_low else _FP32),
        gradients=share.num_parameters * _FP32,
        optimizer=part * states * _FP32,
    )
