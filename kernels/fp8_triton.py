# pyright: basic, reportOperatorIssue=false, reportAttributeAccessIssue=false
"""How do kernels that end in FP8 quantise what they hold? By blocks of 128 values of a row.

The bytes and scales of kernels/fp8.py, `quantise_by_blocks(x, (1, 128))`, whose steps are repeated
here one by one: divisions are IEEE's, not the GPU's faster ones, and no product is contracted with
a sum. Called by kernels; nothing here is launched by itself.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.fp8 import BLOCK_SIZE, LARGEST, Quantised


@triton.jit
def quantise_blocks(
    blocks, LARGEST: tl.constexpr, LARGEST_SCALE: tl.constexpr, POWER_OF_TWO: tl.constexpr
):
    """Return blocks `[N, 128]` fp32 scaled and clamped, and their scales and reciprocals, `[N]`.

    NaN counts for no scale and stays NaN.
    """
    is_nan = blocks != blocks
    amax = tl.max(tl.where(is_nan, 0.0, tl.abs(blocks)), 1)
    usable = (amax > 0.0) & (amax < float("inf"))
    scale = tl.div_rn(tl.full(amax.shape, LARGEST, tl.float32), tl.where(usable, amax, 1.0))
    scale = tl.where(scale == float("inf"), LARGEST_SCALE, scale)
    scale = tl.where(usable, scale, 1.0)
    if POWER_OF_TWO:
        exponent = scale.to(tl.int32, bitcast=True) & -0x800000
        scale = exponent.to(tl.float32, bitcast=True)
    inverse = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
    clamped = tl.minimum(tl.maximum(blocks * scale[:, None], -LARGEST), LARGEST)
    return tl.where(is_nan, float("nan"), clamped), scale, inverse


@triton.jit
def quantise_row(x, LARGEST: tl.constexpr, LARGEST_SCALE: tl.constexpr, POWER_OF_TWO: tl.constexpr):
    """Return x `[N]` fp32 scaled and clamped, and the scales and their reciprocals, `[N / 128]`.

    N is a multiple of 128; what is beyond the row is 0.
    """
    blocks = tl.reshape(x, (x.shape[0] // 128, 128))
    quantised = quantise_blocks(blocks, LARGEST, LARGEST_SCALE, POWER_OF_TWO)
    blocks, scale, inverse = quantised  # pyright: ignore[reportGeneralTypeIssues]
    return tl.reshape(blocks, x.shape), scale, inverse


def empty_quantised(x: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Quantised:
    """Return a result `[T, D]` by blocks of 1 x 128 without values, where `x` is."""
    scales = (shape[0], -(-shape[1] // BLOCK_SIZE))
    data, scale = x.new_empty(shape, dtype=dtype), x.new_empty(scales, dtype=torch.float32)
    return Quantised(data, scale, torch.empty_like(scale), (1, BLOCK_SIZE))


def constants(x: Tensor, dtype: torch.dtype, *, power_of_two_scales: bool) -> dict[str, Any]:
    """Return what `quantise_row` is to know of values in the dtype of `x`."""
    return {
        "LARGEST": LARGEST[dtype],
        "LARGEST_SCALE": torch.finfo(x.dtype).max,
        "POWER_OF_TWO": power_of_two_scales,
    }
