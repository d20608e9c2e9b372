"""How well did a tensor fit into FP8?

Sums and extremes over a tensor, so that those of layers and ranks can be put together before a
fraction is taken.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from kernels.fp8 import Quantised


@dataclass(frozen=True, slots=True, kw_only=True)
class OperandGauges:
    """What a monitor wants to know of a quantised tensor, or of several.

    Attributes:
        amax: `[]` fp32, the largest magnitude.
        smallest_scale: `[]` fp32, of all scales.
        largest_scale: `[]` fp32, of all scales.
        num_values: `[]` fp64.
        num_overflowed: `[]` fp64, values beyond the format's range once scaled, which saturated.
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
    """Return the gauges of a tensor `[T, D]` and what it was quantised to."""
    raise NotImplementedError


def together(gauges: Sequence[OperandGauges]) -> OperandGauges:
    """Return the gauges of several tensors as if they were one."""
    raise NotImplementedError
