"""Gauges of a tensor in FP8: against numbers by hand and sums in numpy."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels.fp8 import E4M3, E5M2, Quantised, dequantise, quantise_by_blocks, quantise_tensor
from kernels.fp8_gauges import measure, together


def in_blocks(x: Tensor) -> Quantised:
    return quantise_by_blocks(x, (1, 128), dtype=E4M3, power_of_two_scales=True)


def draw(rows: int, columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(rows)
    values = torch.randn(rows, columns, generator=generator)
    return values * torch.randn(rows, columns, generator=generator).mul(4).exp()


def test_a_worked_example() -> None:
    # scaled by 4: 2,000 saturates, 464 is a tie that rounds back to 448, 2^-11 vanishes, 0 does not
    x = torch.tensor([[500.0, 116.0, 2.0**-13, 0.0, 1.0]])
    gauges = measure(x, quantise_tensor(x, scale=torch.tensor(4.0), dtype=E4M3))
    assert gauges.amax == 500
    assert gauges.smallest_scale == gauges.largest_scale == 4
    assert gauges.num_values == 5
    assert gauges.num_overflowed == 1
    assert gauges.num_underflowed == 1
    assert gauges.overflow_fraction == gauges.underflow_fraction == 0.2
    signal = 500**2 + 116**2 + 2.0**-26 + 1
    noise = (500 - 112) ** 2 + (116 - 112) ** 2 + 2.0**-26
    assert gauges.signal == signal
    assert gauges.noise == noise
    assert float(gauges.sqnr_db) == pytest.approx(10 * math.log10(signal / noise))


@pytest.mark.parametrize(("dtype", "last"), [(E4M3, 464.0), (E5M2, 61439.0)])
def test_rounding_to_the_largest_value_is_no_overflow(dtype: torch.dtype, last: float) -> None:
    x = torch.tensor([[last, last * 1.001, -last, -last * 1.001, torch.inf]])
    gauges = measure(x, quantise_tensor(x, scale=torch.tensor(1.0), dtype=dtype))
    assert gauges.num_overflowed == 3


def test_blocks_are_measured_with_their_own_scales() -> None:
    x = draw(5, 300)
    quantised = in_blocks(x)
    gauges = measure(x, quantised)
    values, stored = x.double().numpy(), dequantise(quantised, dtype=torch.float32).double().numpy()
    assert float(gauges.signal) == pytest.approx(np.square(values).sum())
    assert float(gauges.noise) == pytest.approx(np.square(values - stored).sum())
    assert float(gauges.num_underflowed) == ((values != 0) & (stored == 0)).sum() > 0
    assert gauges.num_overflowed == 0
    assert float(gauges.amax) == np.abs(values).max().astype(np.float32)
    assert gauges.smallest_scale == quantised.scale.min()
    assert gauges.largest_scale == quantised.scale.max()


def test_tensors_together_are_as_one() -> None:
    x = draw(8, 256)
    whole = measure(x, in_blocks(x))
    parts = together([measure(part, in_blocks(part)) for part in x.split_with_sizes([1, 5, 2])])
    for name in ("amax", "smallest_scale", "largest_scale", "num_values", "num_underflowed"):
        assert getattr(parts, name) == getattr(whole, name)
    for name in ("signal", "noise", "sqnr_db", "underflow_fraction", "overflow_fraction"):
        assert float(getattr(parts, name)) == pytest.approx(float(getattr(whole, name)))


def test_a_tensor_is_not_changed_by_being_measured() -> None:
    x = draw(4, 130)
    quantised = in_blocks(x)
    before = x.clone(), quantised.data.clone(), quantised.scale.clone()
    measure(x, quantised)
    assert torch.equal(x, before[0])
    assert torch.equal(quantised.data.view(torch.uint8), before[1].view(torch.uint8))
    assert torch.equal(quantised.scale, before[2])
