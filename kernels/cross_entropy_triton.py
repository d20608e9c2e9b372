# pyright: basic, reportOperatorIssue=false
"""What the loss does with a chunk's logits on a GPU: two passes, beside the head's products.

`sums_kernel`: a program owns a row, walks through it and keeps the largest logit so far and the sum
of exp(logit - largest); it alone writes that row's two numbers. `gradient_kernel`: a program owns a
piece of a row and turns each logit into its gradient where it stands; it reads nothing of the
logits but what it overwrites. So no two programs touch one place, and their order changes nothing.
Between the two lie the reductions over ranks.

Bytes a logit in bf16: 2 in, then 2 in and 2 out, besides what the products write and read.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_SIZE = 4096
"""Logits at a time: 16 numbers a thread in 8 warps; 163,840 = 40 x 4,096."""
_OPTIONS: dict[str, Any] = {"BLOCK": BLOCK_SIZE, "num_warps": 8, "enable_fp_fusion": False}


@triton.jit
def sums_kernel(logits, largest, total, size, BLOCK: tl.constexpr):
    """Write a row's maximum and its sum of exp(logit - maximum); logits `[C, size]`."""
    row = tl.program_id(0).to(tl.int64)
    high, exps = float("-inf"), 0.0
    for start in range(0, size, BLOCK):
        place = start + tl.arange(0, BLOCK)
        value = tl.load(logits + row * size + place, mask=place < size, other=float("-inf"))
        value = value.to(tl.float32)
        higher = tl.maximum(high, tl.max(value, 0))
        # a row of -inf so far: its difference to itself would be NaN
        base = tl.where(higher == float("-inf"), 0.0, higher)
        exps = exps * tl.exp(high - base) + tl.sum(tl.exp(value - base), 0)
        high = higher
    tl.store(largest + row, high)
    tl.store(total + row, exps)


@triton.jit
def gradient_kernel(logits, label, log_sum, counts, size, BLOCK: tl.constexpr):
    """Turn logits `[C, size]` into counts * (exp(logit - log_sum) - is_label), `[C]` each."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = logits + row * size + place
    value = tl.load(at, mask=place < size, other=0.0).to(tl.float32)
    softmax = tl.exp(value - tl.load(log_sum + row))
    is_label = place == tl.load(label + row)
    gradient = tl.load(counts + row) * tl.where(is_label, softmax - 1.0, softmax)
    tl.store(at, gradient.to(logits.dtype.element_ty), mask=place < size)


def row_sums(logits_CV: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row's maximum and sum of exp(logit - maximum), `[C]` fp32."""
    num_rows, size = logits_CV.shape
    max_C, sum_C = (logits_CV.new_empty(num_rows, dtype=torch.float32) for _ in range(2))
    sums_kernel[(num_rows,)](logits_CV, max_C, sum_C, size, **_OPTIONS)
    return max_C, sum_C


def gradient_(logits_CV: Tensor, label_C: Tensor, log_sum_C: Tensor, counts_C: Tensor) -> None:
    """Turn logits into the gradient of sum(counts * loss), in their dtype.

    Args:
        logits_CV: `[C, V]`, contiguous.
        label_C: `[C]` int64, counted from the first column; outside of it: another rank's.
        log_sum_C: `[C]` fp32.
        counts_C: `[C]` fp32.
    """
    num_rows, size = logits_CV.shape
    grid = (num_rows, triton.cdiv(size, BLOCK_SIZE))
    gradient_kernel[grid](logits_CV, label_C, log_sum_C, counts_C, size, **_OPTIONS)
