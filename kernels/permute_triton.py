# pyright: basic
"""Tokens to the rows of their experts and back on a GPU, each value read and written once.

`copy_kernel`: a program owns a token (and some columns): it reads them once and writes them to all
the token's rows. No row belongs to two tokens. Programs after the last token own an expert each and
write zeros to its padding, which belongs to no token. `add_kernel`: a program owns a token, reads
its rows and writes their sum. So every place has one writer, nobody reads what is written in the
same launch, and the order of programs changes nothing; sums run by rising row inside a program.

Bytes a token in bf16, D model, K chosen: copying 2 D (1 + K), where a gather that is driven by rows
reads 2 D K; adding up 2 D (K + 1). In FP8 copying is D (2 + K). Along tokens a program owns 128
rows and 128 columns, alone as well: it gathers, 3 D K bytes a token.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.fp8 import Quantised
from kernels.fp8_triton import constants, empty_quantised, quantise_blocks, quantise_row
from kernels.permute import RowMap

BLOCK_SIZE = 1024
"""Columns of a program: 8 numbers a thread in 4 warps, 128 bits in bf16; 7168 = 7 x 1024."""


@triton.jit
def copy_kernel(
    x, row, end, num_padding, out, num_tokens, size, K: tl.constexpr, BLOCK: tl.constexpr
):
    """Write out `[R, size]` from x `[T, size]`: row `[T, K]`, end, num_padding `[E]` say where."""
    program = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if program < num_tokens:
        value = tl.load(x + program * size + columns, mask=columns < size)
        for k in tl.static_range(K):  # pyright: ignore[reportGeneralTypeIssues]
            to = tl.load(row + program * K + k)
            if to >= 0:
                tl.store(out + to * size + columns, value, mask=columns < size)
    else:
        last = tl.load(end + program - num_tokens)
        zeros = tl.zeros((BLOCK,), out.dtype.element_ty)
        for back in range(1, tl.load(num_padding + program - num_tokens) + 1):
            tl.store(out + (last - back) * size + columns, zeros, mask=columns < size)


@triton.jit
def copy_quantised_kernel(
    x, row, end, num_padding, out, scale, inverse, num_tokens, size,
    K: tl.constexpr, BLOCK: tl.constexpr,
    LARGEST: tl.constexpr, LARGEST_SCALE: tl.constexpr, POWER_OF_TWO: tl.constexpr,
):  # fmt: skip
    """Write out `[R, size]` in FP8, scale and inverse `[R, ceil(size / 128)]`; as copy_kernel."""
    program = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    block = tl.program_id(1) * (BLOCK // 128) + tl.arange(0, BLOCK // 128)
    num_blocks = tl.cdiv(size, 128)
    if program < num_tokens:
        value = tl.load(x + program * size + columns, mask=columns < size, other=0.0)
        value, s, i = quantise_row(value.to(tl.float32), LARGEST, LARGEST_SCALE, POWER_OF_TWO)
        value = value.to(out.dtype.element_ty)
        for k in tl.static_range(K):  # pyright: ignore[reportGeneralTypeIssues]
            to = tl.load(row + program * K + k)
            if to >= 0:
                tl.store(out + to * size + columns, value, mask=columns < size)
                tl.store(scale + to * num_blocks + block, s, mask=block < num_blocks)
                tl.store(inverse + to * num_blocks + block, i, mask=block < num_blocks)
    else:
        last = tl.load(end + program - num_tokens)
        zeros = tl.zeros((BLOCK,), tl.float32).to(out.dtype.element_ty)
        ones = tl.full((BLOCK // 128,), 1.0, tl.float32)
        for back in range(1, tl.load(num_padding + program - num_tokens) + 1):
            tl.store(out + (last - back) * size + columns, zeros, mask=columns < size)
            to_block = (last - back) * num_blocks + block
            tl.store(scale + to_block, ones, mask=block < num_blocks)
            tl.store(inverse + to_block, ones, mask=block < num_blocks)


@triton.jit
def columns_quantised_kernel(
    x, token_of_row, out, scale, inverse, num_rows, size,
    LARGEST: tl.constexpr, LARGEST_SCALE: tl.constexpr, POWER_OF_TWO: tl.constexpr,
):  # fmt: skip
    """Write out `[size, R]` in FP8, scale, inverse `[size, R / 128]`; R is a multiple of 128."""
    rows = tl.program_id(0).to(tl.int64) * 128 + tl.arange(0, 128)
    columns = tl.program_id(1) * 128 + tl.arange(0, 128)
    token = tl.load(token_of_row + rows)[:, None]
    there = (token >= 0) & (columns[None, :] < size)
    value = tl.load(x + token * size + columns[None, :], mask=there, other=0.0)
    turned = tl.trans(value.to(tl.float32))
    quantised = quantise_blocks(turned, LARGEST, LARGEST_SCALE, POWER_OF_TWO)
    turned, s, i = quantised  # pyright: ignore[reportGeneralTypeIssues]
    column = columns[:, None]
    at = column.to(tl.int64) * num_rows + rows[None, :]
    there = (column < size) & (rows[None, :] < num_rows)
    tl.store(out + at, turned.to(out.dtype.element_ty), mask=there)
    at = columns * (num_rows // 128) + tl.program_id(0)
    tl.store(scale + at, s, mask=columns < size)
    tl.store(inverse + at, i, mask=columns < size)


@triton.jit
def add_kernel(x, row, out, size, K: tl.constexpr, BLOCK: tl.constexpr):
    """Write out `[T, size]`, the sums of x `[R, size]` over row `[T, K]`."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(K):  # pyright: ignore[reportGeneralTypeIssues]
        at = tl.load(row + token * K + k)
        # one mask of a vector: & with a scalar is refused by the interpreter
        there = columns < tl.where(at >= 0, size, 0)
        total += tl.load(x + at * size + columns, mask=there, other=0.0).to(tl.float32)
    tl.store(out + token * size + columns, total.to(out.dtype.element_ty), mask=columns < size)


def copied(x_TD: Tensor, rows: RowMap) -> Tensor:
    """Return the tokens in their rows, `[R, D]`, zeros as padding."""
    num_tokens, size = x_TD.shape
    out_RD = x_TD.new_empty(len(rows.token_of_row), size)
    programs = num_tokens + len(rows.num_rows)
    copy_kernel[(programs, triton.cdiv(size, BLOCK_SIZE))](
        x_TD, rows.rows_of_token, rows.num_rows.cumsum(0), rows.num_rows - rows.num_tokens, out_RD,
        num_tokens, size, **_options(rows),
    )  # fmt: skip
    return out_RD


def quantised(
    x_TD: Tensor, rows: RowMap, *, dtype: torch.dtype, power_of_two_scales: bool
) -> Quantised:
    """Return the tokens in their rows, `[R, D]` in FP8 by blocks of 1 x 128."""
    num_tokens, size = x_TD.shape
    out = empty_quantised(x_TD, (len(rows.token_of_row), size), dtype)
    options = _options(rows) | constants(x_TD, dtype, power_of_two_scales=power_of_two_scales)
    options["num_warps"] = 2  # 16 numbers a thread, 128 bits in FP8
    programs = num_tokens + len(rows.num_rows)
    copy_quantised_kernel[(programs, triton.cdiv(size, BLOCK_SIZE))](
        x_TD, rows.rows_of_token, rows.num_rows.cumsum(0), rows.num_rows - rows.num_tokens,
        out.data, out.scale, out.scale_inv, num_tokens, size,
        **options,
    )  # fmt: skip
    return out


def quantised_along_tokens(
    x_TD: Tensor, rows: RowMap, *, dtype: torch.dtype, power_of_two_scales: bool
) -> Quantised:
    """Return the tokens in their rows, turned, `[D, R]` in FP8 by blocks of 1 x 128 rows."""
    num_rows, size = len(rows.token_of_row), x_TD.shape[1]
    out = empty_quantised(x_TD, (size, num_rows), dtype)
    options = constants(x_TD, dtype, power_of_two_scales=power_of_two_scales)
    options |= {"num_warps": 8, "enable_fp_fusion": False}
    if num_rows:
        columns_quantised_kernel[(num_rows // 128, triton.cdiv(size, 128))](
            x_TD, rows.token_of_row, *out[:3], num_rows, size, **options
        )
    return out


def added_up(x_RD: Tensor, rows: RowMap) -> Tensor:
    """Return the sum of each token's rows, `[T, D]`."""
    num_tokens, size = len(rows.rows_of_token), x_RD.shape[1]
    out_TD = x_RD.new_empty(num_tokens, size)
    if num_tokens:
        add_kernel[(num_tokens, triton.cdiv(size, BLOCK_SIZE))](
            x_RD, rows.rows_of_token, out_TD, size, **_options(rows)
        )
    return out_TD


def _options(rows: RowMap) -> dict[str, Any]:
    return {
        "K": rows.rows_of_token.shape[1],
        "BLOCK": BLOCK_SIZE,
        "num_warps": 4,
        "enable_fp_fusion": False,
    }
