# pyright: basic
"""SwiGLU with the router's weight on a GPU: one pass forward, one pass backward.

A program owns a row: it alone reads that row's weight and writes that row's results, and the sum
over the row that the weight's gradient is stays inside it. No two programs write one place and none
reads what another writes, so the order in which they run changes nothing.

Bytes a token in bf16, F FFN width: forward 6 F (gate, up in; a out), backward 10 F (da, gate, up
in; two gradients out); in FP8 forward 5 F, with the copy along tokens 6 F. That copy has a scale
for 128 tokens, so there a program owns a tile of 128 tokens and 128 columns, alone as well.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.fp8 import BLOCK_SIZE as SCALED_SIZE
from kernels.fp8 import Quantised
from kernels.fp8_triton import constants, empty_quantised, quantise_blocks, quantise_row

BLOCK_SIZE = 2048
"""Columns at a time: A.X K1's expert width, 16 numbers a thread in 4 warps."""


@triton.jit
def _silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def forward_kernel(hidden, weight, out, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Write out `[T, SIZE]` from hidden `[T, 2 SIZE]` and weight `[T]`; a program owns a row."""
    row = tl.program_id(0).to(tl.int64)
    w = tl.load(weight + row)
    for start in range(0, SIZE, BLOCK):
        place = start + tl.arange(0, BLOCK)
        gate = tl.load(hidden + row * 2 * SIZE + place, mask=place < SIZE, other=0.0)
        up = tl.load(hidden + row * 2 * SIZE + SIZE + place, mask=place < SIZE, other=0.0)
        a = _silu(gate.to(tl.float32)) * up.to(tl.float32) * w
        tl.store(out + row * SIZE + place, a.to(out.dtype.element_ty), mask=place < SIZE)


@triton.jit
def quantised_kernel(
    hidden, weight, out, scale, inverse, SIZE: tl.constexpr, BLOCK: tl.constexpr,
    LARGEST: tl.constexpr, LARGEST_SCALE: tl.constexpr, POWER_OF_TWO: tl.constexpr,
):  # fmt: skip
    """Write out `[T, SIZE]` in FP8 and scale, inverse `[T, ceil(SIZE / 128)]`; a row a program."""
    row = tl.program_id(0).to(tl.int64)
    w = tl.load(weight + row)
    for start in range(0, SIZE, BLOCK):
        place = start + tl.arange(0, BLOCK)
        gate = tl.load(hidden + row * 2 * SIZE + place, mask=place < SIZE, other=0.0)
        up = tl.load(hidden + row * 2 * SIZE + SIZE + place, mask=place < SIZE, other=0.0)
        a = _silu(gate.to(tl.float32)) * up.to(tl.float32) * w
        a = a.to(hidden.dtype.element_ty).to(tl.float32)
        quantised, s, i = quantise_row(a, LARGEST, LARGEST_SCALE, POWER_OF_TWO)
        tl.store(out + row * SIZE + place, quantised.to(out.dtype.element_ty), mask=place < SIZE)
        block = start // 128 + tl.arange(0, BLOCK // 128)
        num_blocks: tl.constexpr = (SIZE + 127) // 128
        tl.store(scale + row * num_blocks + block, s, mask=block < num_blocks)
        tl.store(inverse + row * num_blocks + block, i, mask=block < num_blocks)


@triton.jit
def quantised_both_kernel(
    hidden, weight, out, scale, inverse, out_t, scale_t, inverse_t, num_tokens, SIZE: tl.constexpr,
    LARGEST: tl.constexpr, LARGEST_SCALE: tl.constexpr, POWER_OF_TWO: tl.constexpr,
):  # fmt: skip
    """As quantised_kernel, and out_t `[SIZE, T]`, scale_t, inverse_t `[SIZE, ceil(T / 128)]`."""
    tokens = tl.program_id(0).to(tl.int64) * 128 + tl.arange(0, 128)
    columns = tl.program_id(1) * 128 + tl.arange(0, 128)
    token, column = tokens[:, None], columns[None, :]
    there = (token < num_tokens) & (column < SIZE)
    gate = tl.load(hidden + token * 2 * SIZE + column, mask=there, other=0.0)
    up = tl.load(hidden + token * 2 * SIZE + SIZE + column, mask=there, other=0.0)
    w = tl.load(weight + tokens, mask=tokens < num_tokens, other=0.0)
    a = _silu(gate.to(tl.float32)) * up.to(tl.float32) * w[:, None]
    a = a.to(hidden.dtype.element_ty).to(tl.float32)
    kind = out.dtype.element_ty
    quantised, s, i = quantise_blocks(a, LARGEST, LARGEST_SCALE, POWER_OF_TWO)
    tl.store(out + token * SIZE + column, quantised.to(kind), mask=there)
    at = tokens * ((SIZE + 127) // 128) + tl.program_id(1)
    tl.store(scale + at, s, mask=tokens < num_tokens)
    tl.store(inverse + at, i, mask=tokens < num_tokens)
    turned, s, i = quantise_blocks(tl.trans(a), LARGEST, LARGEST_SCALE, POWER_OF_TWO)
    token, column = tokens[None, :], columns[:, None]
    there = (token < num_tokens) & (column < SIZE)
    tl.store(out_t + column.to(tl.int64) * num_tokens + token, turned.to(kind), mask=there)
    at = columns * tl.cdiv(num_tokens, 128) + tl.program_id(0)
    tl.store(scale_t + at, s, mask=columns < SIZE)
    tl.store(inverse_t + at, i, mask=columns < SIZE)


@triton.jit
def backward_kernel(
    grad, hidden, weight, grad_hidden, grad_weight, SIZE: tl.constexpr, BLOCK: tl.constexpr
):
    """Write both gradients of a row; grad `[T, SIZE]`, the others as they came in."""
    row = tl.program_id(0).to(tl.int64)
    w = tl.load(weight + row)
    products = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, SIZE, BLOCK):
        place = start + tl.arange(0, BLOCK)
        gate_at, up_at = hidden + row * 2 * SIZE + place, hidden + row * 2 * SIZE + SIZE + place
        gate = tl.load(gate_at, mask=place < SIZE, other=0.0).to(tl.float32)
        up = tl.load(up_at, mask=place < SIZE, other=0.0).to(tl.float32)
        da = tl.load(grad + row * SIZE + place, mask=place < SIZE, other=0.0).to(tl.float32)
        sigmoid = 1.0 / (1.0 + tl.exp(-gate))
        silu = gate * sigmoid
        products += da * silu * up
        dgate = da * up * w * sigmoid * (1.0 + gate * (1.0 - sigmoid))
        dup = da * silu * w
        kind = grad_hidden.dtype.element_ty
        at = grad_hidden + row * 2 * SIZE + place
        tl.store(at, dgate.to(kind), mask=place < SIZE)
        tl.store(at + SIZE, dup.to(kind), mask=place < SIZE)
    tl.store(grad_weight + row, tl.sum(products))


def forward(hidden_T2F: Tensor, weight_T: Tensor) -> Tensor:
    """Return weight * silu(gate) * up, `[T, F]` in the dtype of `hidden_T2F`."""
    num_tokens, size = hidden_T2F.shape[0], hidden_T2F.shape[1] // 2
    out_TF = hidden_T2F.new_empty(num_tokens, size)
    if num_tokens:
        forward_kernel[(num_tokens,)](hidden_T2F, weight_T, out_TF, **_options(size))
    return out_TF


def quantised(
    hidden_T2F: Tensor, weight_T: Tensor, *, dtype: torch.dtype, power_of_two_scales: bool
) -> Quantised:
    """Return weight * silu(gate) * up, `[T, F]` in FP8 by blocks of 1 x 128."""
    num_tokens, size = hidden_T2F.shape[0], hidden_T2F.shape[1] // 2
    out = empty_quantised(hidden_T2F, (num_tokens, size), dtype)
    options = _options(size) | constants(hidden_T2F, dtype, power_of_two_scales=power_of_two_scales)
    options["BLOCK"] = max(options["BLOCK"], SCALED_SIZE)
    if num_tokens:
        quantised_kernel[(num_tokens,)](
            hidden_T2F, weight_T, out.data, out.scale, out.scale_inv, **options
        )
    return out


def quantised_both(
    hidden_T2F: Tensor, weight_T: Tensor, *, dtype: torch.dtype, power_of_two_scales: bool
) -> tuple[Quantised, Quantised]:
    """Return the same as `quantised`, and the transpose `[F, T]` by blocks of 1 x 128 tokens."""
    num_tokens, size = hidden_T2F.shape[0], hidden_T2F.shape[1] // 2
    out = empty_quantised(hidden_T2F, (num_tokens, size), dtype)
    turned = empty_quantised(hidden_T2F, (size, num_tokens), dtype)
    options = constants(hidden_T2F, dtype, power_of_two_scales=power_of_two_scales)
    options |= {"SIZE": size, "num_warps": 16, "enable_fp_fusion": False}
    if num_tokens:
        quantised_both_kernel[(triton.cdiv(num_tokens, 128), triton.cdiv(size, 128))](
            hidden_T2F, weight_T, *out[:3], *turned[:3], num_tokens, **options
        )
    return out, turned


def backward(grad_TF: Tensor, hidden_T2F: Tensor, weight_T: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of `hidden_T2F` in its dtype and of `weight_T` in fp32."""
    num_tokens, size = grad_TF.shape
    grad_T2F, grad_T = torch.empty_like(hidden_T2F), torch.empty_like(weight_T)
    if num_tokens:
        backward_kernel[(num_tokens,)](
            grad_TF, hidden_T2F, weight_T, grad_T2F, grad_T, **_options(size)
        )
    return grad_T2F, grad_T


def _options(size: int) -> dict[str, Any]:
    block = min(BLOCK_SIZE, triton.next_power_of_2(size))
    return {"SIZE": size, "BLOCK": block, "num_warps": 4, "enable_fp_fusion": False}
