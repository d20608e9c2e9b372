"""How well did a tensor fit into FP8?

Sums and extremes over a tensor, so that those of layers and ranks can be put together before a
fraction is taken.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.fp8 import E4M3, E5M2, Quantised, dequantise, tensor_amax, times_scales_

# Half a step above the largest value: what rounding alone would bring back to it.
_SATURATES = {E4M3: 464.0, E5M2: 61440.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class OperandGauges:
    """What a monitor wants to know of a quantised tensor, or of several.

    Attributes:
        amax: `[]` fp32, the largest magnitude.
        smallest_scale: `[]` fp32, of all scales.
        largest_scale: `[]` fp32, of all scales.
        num_values: `[]` fp64.
        num_overflowed: `[]` fp64, values that saturated: scaled, they are beyond the largest of the
            format by more than half a step, from where rounding alone would not bring them back.
        num_underflowed: `[]` fp64, values that were not 0 and became 0.
        signal: `[]` fp64, the sum of squares.
        noise: `[]` fp64, the sum of squared differences to what FP8 stands for.
    """

    amax: Tensor
    smallest_scale: Tensor
    largest_scale: Tensor
    num_values: Tensor
    num_overflowed: Tensor
    num_underflowed: Tensor
    signal: Tensor
    noise: Tensor

    @property
    def overflow_fraction(self) -> Tensor:
        """The share of values that saturated, 0 to 1."""
        return self.num_overflowed / self.num_values.clamp(min=1)

    @property
    def underflow_fraction(self) -> Tensor:
        """The share of values that were not 0 and became 0, 0 to 1."""
        return self.num_underflowed / self.num_values.clamp(min=1)

    @property
    def sqnr_db(self) -> Tensor:
        """The ratio of signal to quantisation noise in dB; inf without noise."""
        return 10 * (self.signal / self.noise).log10()


def measure(x_TD: Tensor, quantised: Quantised) -> OperandGauges:
    """Return the gauges of a tensor `[T, D]`, not empty, and what it was quantised to."""
    values = x_TD.double()
    stored = dequantise(quantised, dtype=torch.float32).double()
    scaled = times_scales_(x_TD.float().clone(), quantised.scale, quantised.block)
    vanished = (values != 0) & (quantised.data.float() == 0)
    return OperandGauges(
        amax=tensor_amax(x_TD),
        smallest_scale=quantised.scale.amin(),
        largest_scale=quantised.scale.amax(),
        num_values=values.new_tensor(values.numel()),
        num_overflowed=(scaled.abs() > _SATURATES[quantised.data.dtype]).sum().double(),
        num_underflowed=vanished.sum().double(),
        signal=values.square().sum(),
        noise=(values - stored).square_().sum(),
    )


def together(gauges: Sequence[OperandGauges]) -> OperandGauges:
    """Return the gauges of several tensors, at least one, as if they were one."""
    return OperandGauges(
        amax=torch.stack([one.amax for one in gauges]).amax(),
        smallest_scale=torch.stack([one.smallest_scale for one in gauges]).amin(),
        largest_scale=torch.stack([one.largest_scale for one in gauges]).amax(),
        num_values=torch.stack([one.num_values for one in gauges]).sum(),
        num_overflowed=torch.stack([one.num_overflowed for one in gauges]).sum(),
        num_underflowed=torch.stack([one.num_underflowed for one in gauges]).sum(),
        signal=torch.stack([one.signal for one in gauges]).sum(),
        noise=torch.stack([one.noise for one in gauges]).sum(),
    )
