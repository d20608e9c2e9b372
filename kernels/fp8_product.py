"""How are the products of two FP8 operands summed?

A product of two FP8 values has at most 8 significant bits and is exact in fp32; what differs is
the sum. "fp32" adds in fp32. "hopper" is a model of Hopper's tensor cores as DeepSeek-V3 describes
them, for studies of the error, not a claim about bits: 32 products at a time are aligned to the
largest, of each the 14 highest bits of that alignment are kept and the rest cut off, and the sum
goes into an accumulator that keeps 14 bits too. With split accumulation, which Transformer Engine
asks for in the backward products (and blockwise in all three), each 128 of K have an accumulator of
their own and these are added up in fp32; without it, one goes along the whole of K.

M, N rows of the operands and of the result, K what is summed over.

Source: DeepSeek-V3, arXiv 2412.19437, sections 3.3.2 and 3.5.2; Transformer Engine 2.20,
common/recipe/__init__.py and pytorch/module/base.py (use_split_accumulator).
"""

import math
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor

from kernels.fp8 import BLOCK_SIZE, Quantised

Accumulation = Literal["fp32", "hopper"]
Sum = Callable[[Tensor, Tensor], Tensor]  # [M, K], [N, K] fp32 with values of FP8 -> [M, N] fp32

_NUM_PRODUCTS = 32  # that one instruction adds at once
_NUM_BITS = 14
_CHUNK = 1 << 22  # products held at once, 16 MiB


def product(a_MK: Quantised, b_NK: Quantised, *, summed: Sum) -> Tensor:
    """Return a b^T in fp32, scales applied.

    With one scale each, the sum over K is scaled at the end, otherwise after each 128 of K.

    Args:
        a_MK: one scale, or blocks of 1 x 128.
        b_NK: one scale, or blocks of 1 x 128 or 128 x 128.
        summed: takes values without scales, `[M, K]` and `[N, K]` fp32, to `[M, N]` fp32.

    Source: Transformer Engine 2.20, tests/pytorch/references/blockwise_fp8_gemm_reference.py.
    """
    a, b = a_MK.data.to(torch.float32), b_NK.data.to(torch.float32)
    if not a_MK.block[0]:
        return summed(a, b).mul_(a_MK.scale_inv).mul_(b_NK.scale_inv)
    out_MN = a.new_zeros(a.shape[0], b.shape[0])
    for k, (a_k, b_k) in enumerate(_blocks_along(a, b, BLOCK_SIZE)):
        scale_N = b_NK.scale_inv[:, k].repeat_interleave(b_NK.block[0])[: b.shape[0]]
        out_MN.addcmul_(summed(a_k, b_k).mul_(a_MK.scale_inv[:, k, None]), scale_N)
    return out_MN


def fp32_sum(a_MK: Tensor, b_NK: Tensor) -> Tensor:
    """Return a b^T summed in fp32."""
    return a_MK @ b_NK.t()


def hopper_sum(a_MK: Tensor, b_NK: Tensor) -> Tensor:
    """Return a b^T summed in one accumulator of 14 bits; see the file's docstring."""
    num_rows = max(1, _CHUNK // max(1, b_NK.shape[0] * _NUM_PRODUCTS))
    out_MN = a_MK.new_empty(a_MK.shape[0], b_NK.shape[0])
    for start in range(0, a_MK.shape[0], num_rows):
        out_MN[start : start + num_rows] = _hopper_rows(a_MK[start : start + num_rows], b_NK)
    return out_MN


def hopper_split_sum(a_MK: Tensor, b_NK: Tensor) -> Tensor:
    """Return a b^T, each 128 of K in an accumulator of 14 bits, these added up in fp32."""
    out_MN = a_MK.new_zeros(a_MK.shape[0], b_NK.shape[0])
    for a, b in _blocks_along(a_MK, b_NK, BLOCK_SIZE):
        out_MN += hopper_sum(a, b)
    return out_MN


# Of the forward and of the backward products. Blockwise sums 128 at a time, where both are one.
SUMS: dict[Accumulation, tuple[Sum, Sum]] = {
    "fp32": (fp32_sum, fp32_sum),
    "hopper": (hopper_sum, hopper_split_sum),
}


def hopper_sum_reference(a: list[float], b: list[float]) -> float:
    """Return the same as `hopper_sum` for one row of each, number by number."""
    accumulator = 0.0
    for start in range(0, len(a), _NUM_PRODUCTS):
        stop = start + _NUM_PRODUCTS
        products = [x * y for x, y in zip(a[start:stop], b[start:stop], strict=True)]
        exponent = math.frexp(max(abs(value) for value in products))[1]
        unit = math.ldexp(1.0, exponent - _NUM_BITS)
        total = accumulator + sum(math.trunc(value / unit) for value in products) * unit
        unit = math.ldexp(1.0, math.frexp(total)[1] - _NUM_BITS)
        accumulator = math.trunc(total / unit) * unit
    return accumulator


def _hopper_rows(a_MK: Tensor, b_NK: Tensor) -> Tensor:
    accumulator_MN = a_MK.new_zeros(a_MK.shape[0], b_NK.shape[0], dtype=torch.float64)
    for a, b in _blocks_along(a_MK, b_NK, _NUM_PRODUCTS):
        products = (a[:, None] * b[None]).double()
        cut = _cut_off(products, products.abs().amax(-1, keepdim=True))
        total = accumulator_MN + cut.sum(-1)
        accumulator_MN = _cut_off(total, total)
    return accumulator_MN.float()


def _blocks_along(a_MK: Tensor, b_NK: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, a_MK.shape[1], size):
        yield a_MK[:, start : start + size], b_NK[:, start : start + size]


def _cut_off(values: Tensor, largest: Tensor) -> Tensor:
    """Return values without the bits below the 14th that `largest` has; exact in fp64."""
    unit = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent - _NUM_BITS)
    return values.div(unit).trunc_().mul_(unit)
