# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false
"""The dual norm on a GPU: one kernel forward, one backward (kernels/dual_norm.py says what).

Forward: one program for each token, which holds its whole row. It alone reads and writes that row.

Backward: NUM_PROGRAMS programs, each for the rows p, p + NUM_PROGRAMS, ... It alone writes the
gradients of those rows. The gradient of a weight is a sum over all rows: each program keeps its own
in registers and writes it into its own row of `[programs, D]`, which one sum over the programs then
adds up. No two programs write one place, none reads what another writes, and there are no atomics:
there is no race, and the same input gives the same bits, on every GPU, because the number of
programs does not follow the number of its processors.

A row of 7,168 is held as 4096 + 2048 + 1024 columns: as 8,192 with a mask, an eighth would be idle,
and in the backward pass registers would spill (docs/kernels.md).

T tokens, in as many dims as the stream has, D model, K chosen, R rows of experts, P programs.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dual_norm import BLOCK_SIZE, Forward, Fp8Output, Gradients
from kernels.fp8 import E4M3, Quantised
from kernels.fp8_triton import quantise_row

NUM_PROGRAMS = 132  # the processors of an H100 or H200: one program of 255 registers fits on each
FORWARD_WARPS = 16
BACKWARD_WARPS = 8
# Triton's present default, written down because its next version has another.
OPTIONS = {"enable_fp_fusion": True}


def forward(
    x_TD: Tensor,
    shared_TD: Tensor | None,
    h_TD: Tensor,
    weights: tuple[Tensor | None, Tensor | None],
    fp8: Fp8Output | None,
    eps: float,
) -> Forward:
    """Return x, h', y and the inverse root mean squares; see `Side` in kernels/dual_norm.py."""
    return launch_forward(x_TD, None, shared_TD, h_TD, weights, fp8, eps)


def launch_forward(
    x: Tensor,
    rows: tuple[Tensor, Tensor | None] | None,
    shared_TD: Tensor | None,
    h_TD: Tensor,
    weights: tuple[Tensor | None, Tensor | None],
    fp8: Fp8Output | None,
    eps: float,
) -> Forward:
    """Return the same, x being a sum over rows of experts where `rows` are given.

    Args:
        x: `[T, D]`, or `[R, D]` where `rows` says which are added for each token.
        rows: row ids `[T, K]` int32 and the factor of each, `[T, K]` fp32 or None for 1.
        shared_TD: added to x, or None.
        h_TD: the residual stream before.
        weights: of the post norm and of the next norm, or None.
        fp8: how y is wanted in FP8, or None.
        eps: added to each mean square.
    """
    post_weight_D, next_weight_D = weights
    x, h_TD = x.contiguous(), h_TD.contiguous()
    shared_TD = None if shared_TD is None else shared_TD.contiguous()
    num_tokens, size = h_TD[..., 0].numel(), h_TD.shape[-1]
    row_id_TK, prob_TK = (None, None) if rows is None else rows
    post, next_ = post_weight_D is not None, next_weight_D is not None
    is_sum = shared_TD is not None or rows is not None
    sum_TD = torch.empty_like(h_TD) if post and is_sum else None
    new_h_TD = torch.empty_like(h_TD)
    y_TD = torch.empty_like(h_TD) if next_ else None
    inverses = [h_TD.new_empty(h_TD.shape[:-1], dtype=torch.float32) if has else None
                for has in (post, next_)]  # fmt: skip
    constants: dict[str, Any] = {
        "D": size,
        "K": 0 if row_id_TK is None else row_id_TK.shape[1],
        "BLOCK": max(triton.next_power_of_2(size), 1 if fp8 is None else BLOCK_SIZE),
        "POWERS": fp8 is not None and fp8.power_of_two_scales,
        "LARGEST": torch.finfo(h_TD.dtype).max,
    }
    memory = _fp8_memory(h_TD, fp8)
    if num_tokens:
        _forward_kernel[(num_tokens,)](
            x, row_id_TK, prob_TK, shared_TD, h_TD, post_weight_D, next_weight_D, sum_TD, new_h_TD,
            y_TD, *inverses, *memory, eps, **constants, num_warps=FORWARD_WARPS,
            **OPTIONS,
        )  # fmt: skip
    saved_TD = (sum_TD if is_sum else x) if post else None
    return Forward(saved_TD, new_h_TD, y_TD, *inverses, *_fp8_results(memory))


def _fp8_memory(h_TD: Tensor, fp8: Fp8Output | None) -> tuple[Tensor | None, ...]:
    """Return where a launch writes y in FP8: bytes, scales, their reciprocals, an amax per row."""
    if fp8 is None:
        return None, None, None, None
    num_tokens, size = h_TD[..., 0].numel(), h_TD.shape[-1]
    data_TD = h_TD.new_empty(num_tokens, size, dtype=E4M3)
    if fp8.scale is not None:
        return data_TD, fp8.scale, None, h_TD.new_empty(num_tokens, dtype=torch.float32)
    scale = h_TD.new_empty(num_tokens, triton.cdiv(size, BLOCK_SIZE), dtype=torch.float32)
    return data_TD, scale, torch.empty_like(scale), None


def _fp8_results(memory: tuple[Tensor | None, ...]) -> tuple[Quantised | None, Tensor | None]:
    data_TD, scale, scale_inv, amax_T = memory
    if data_TD is None or scale is None:
        return None, None
    if amax_T is None:
        assert scale_inv is not None
        return Quantised(data_TD, scale, scale_inv, (1, BLOCK_SIZE)), None
    amax = amax_T.amax() if len(amax_T) else amax_T.new_zeros(())
    return Quantised(data_TD, scale, scale.reciprocal(), (0, 0)), amax


def backward(
    dh_TD: Tensor | None,
    dy_TD: Tensor | None,
    saved: Forward,
    weights: tuple[Tensor | None, Tensor | None],
) -> Gradients:
    """Return the gradients; see `Side` in kernels/dual_norm.py."""
    post_weight_D, next_weight_D = weights
    num_tokens, size = saved.h[..., 0].numel(), saved.h.shape[-1]
    dh_TD = None if dh_TD is None else dh_TD.contiguous()
    dy_TD = None if dy_TD is None else dy_TD.contiguous()
    num_programs = min(num_tokens, NUM_PROGRAMS)
    dres_TD = torch.empty_like(saved.h)
    dx_TD = dres_TD if post_weight_D is None else torch.empty_like(saved.h)
    partial_PD = [
        None if w is None else w.new_empty(num_programs, size, dtype=torch.float32) for w in weights
    ]
    if dy_TD is None and next_weight_D is not None:
        partial_PD[1] = next_weight_D.new_zeros(1, size, dtype=torch.float32)
    if num_tokens:
        _backward_kernel[(num_programs,)](
            dh_TD, dy_TD, saved.x, saved.h, post_weight_D, next_weight_D,
            saved.post_inverse, saved.next_inverse, dx_TD, dres_TD, *partial_PD, num_tokens,
            **columns(size), num_warps=BACKWARD_WARPS, **OPTIONS,
        )  # fmt: skip
    dweights = [None if partial is None else partial.sum(0) for partial in partial_PD]
    return Gradients(dx_TD, dres_TD, *dweights)


def columns(size: int) -> dict[str, Any]:
    """Return D and three powers of two that hold a row of D columns; 0 is no part.

    The first two are the largest that fit, the third what is left, rounded up and masked.
    """
    first = 1 << (size.bit_length() - 1)
    left = size - first
    second = 1 << (left.bit_length() - 1) if left else 0
    third = triton.next_power_of_2(left - second) if left > second else 0
    return {"D": size, "B0": first, "B1": second, "B2": third}


@triton.jit
def load_part(row, cols, D: tl.constexpr, LAST: tl.constexpr):
    """Return columns of a row in fp32; where LAST > D, some are behind its end, and 0."""
    if LAST > D:  # noqa: SIM108 (Triton has no conditional expression of tensors)
        value = tl.load(row + cols, mask=cols < D, other=0.0)
    else:
        value = tl.load(row + cols)
    return value.to(tl.float32)


@triton.jit
def store_part(row, cols, value, D: tl.constexpr, LAST: tl.constexpr):
    """Store columns of a row, rounded to its dtype; none behind its end."""
    if LAST > D:
        tl.store(row + cols, value.to(row.dtype.element_ty), mask=cols < D)
    else:
        tl.store(row + cols, value.to(row.dtype.element_ty))


@triton.jit
def _forward_kernel(
    x, row_id, prob, shared, h, post_weight, next_weight, sum_, new_h, y, post_inverse,
    next_inverse, data, scale, scale_inv, amax, eps, D: tl.constexpr, K: tl.constexpr,
    BLOCK: tl.constexpr, POWERS: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    if K > 0:
        value = tl.zeros((BLOCK,), tl.float32)
        for k in tl.static_range(K):
            row = load_part(x + tl.load(row_id + token * K + k).to(tl.int64) * D, cols, D, BLOCK)
            if prob is not None:
                row = row * tl.load(prob + token * K + k)
            value += row
    else:
        value = load_part(x + token * D, cols, D, BLOCK)
    if shared is not None:
        value += load_part(shared + token * D, cols, D, BLOCK)
    if K > 0 or shared is not None:  # a sum is rounded to the dtype of the stream, kept or not
        value = value.to(new_h.dtype.element_ty)
        if sum_ is not None:
            store_part(sum_ + token * D, cols, value, D, BLOCK)
        value = value.to(tl.float32)
    if post_weight is not None:
        inverse = tl.rsqrt(tl.sum(value * value) / D + eps)
        tl.store(post_inverse + token, inverse)
        value = value * inverse * load_part(post_weight, cols, D, BLOCK)
    value += load_part(h + token * D, cols, D, BLOCK)
    rounded = value.to(new_h.dtype.element_ty)
    store_part(new_h + token * D, cols, rounded, D, BLOCK)
    if next_weight is not None:
        value = rounded.to(tl.float32)
        inverse = tl.rsqrt(tl.sum(value * value) / D + eps)
        tl.store(next_inverse + token, inverse)
        value = value * inverse * load_part(next_weight, cols, D, BLOCK)
        rounded = value.to(y.dtype.element_ty)
        store_part(y + token * D, cols, rounded, D, BLOCK)
        if amax is not None:
            value = rounded.to(tl.float32)
            tl.store(amax + token, tl.max(tl.abs(value)))
            store_part(data + token * D, cols, value * tl.load(scale), D, BLOCK)
        elif data is not None:
            _store_blocks(
                rounded, data + token * D, scale, scale_inv, token, D, BLOCK, POWERS, LARGEST
            )


@triton.jit
def _store_blocks(
    y, data, scale, scale_inv, token, D: tl.constexpr, BLOCK: tl.constexpr, POWERS: tl.constexpr,
    LARGEST: tl.constexpr,
):  # fmt: skip
    """Store a row in FP8, 128 columns to a scale; as kernels/fp8.py, to the bit."""
    NUM: tl.constexpr = (D + 127) // 128
    scaled, factor, inverse = quantise_row(y.to(tl.float32), 448.0, LARGEST, POWERS)
    block = tl.arange(0, BLOCK // 128)
    tl.store(scale + token * NUM + block, factor, mask=block < NUM)
    tl.store(scale_inv + token * NUM + block, inverse, mask=block < NUM)
    store_part(data, tl.arange(0, BLOCK), scaled, D, BLOCK)


@triton.jit
def _after_next(dh, dy, h, weight, inverse, cols, D: tl.constexpr, LAST: tl.constexpr):
    """Return of a part of a row: dh, w dy, h r, their sum, and the row's share of dw."""
    hat = load_part(h, cols, D, LAST) * inverse
    dy_row = load_part(dy, cols, D, LAST)
    weighted = dy_row * load_part(weight, cols, D, LAST)
    g = tl.zeros_like(hat)
    if dh is not None:
        g = load_part(dh, cols, D, LAST)
    return g, weighted, hat, tl.sum(weighted * hat), dy_row * hat


@triton.jit
def _after_post(g, x, weight, inverse, cols, D: tl.constexpr, LAST: tl.constexpr):
    """Return of a part of a row: w g, x r, their sum, and the row's share of dw."""
    hat = load_part(x, cols, D, LAST) * inverse
    weighted = g * load_part(weight, cols, D, LAST)
    return weighted, hat, tl.sum(weighted * hat), g * hat


@triton.jit
def _backward_kernel(
    dh, dy, x, h, post_weight, next_weight, post_inverse, next_inverse, dx, dres, dpost, dnext, T,
    D: tl.constexpr, B0: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    LAST: tl.constexpr = B0 + B1 + B2
    c0 = tl.arange(0, B0)
    post0 = tl.zeros((B0,), tl.float32)
    next0 = tl.zeros((B0,), tl.float32)
    if B1 > 0:
        c1 = B0 + tl.arange(0, B1)
        post1 = tl.zeros((B1,), tl.float32)
        next1 = tl.zeros((B1,), tl.float32)
    if B2 > 0:
        c2 = B0 + B1 + tl.arange(0, B2)
        post2 = tl.zeros((B2,), tl.float32)
        next2 = tl.zeros((B2,), tl.float32)
    row = program.to(tl.int64) * D
    step = tl.num_programs(0).to(tl.int64) * D
    for token in range(program, T, tl.num_programs(0)):
        if dy is not None:
            inverse = tl.load(next_inverse + token)
            dh_row = dh
            if dh is not None:
                dh_row = dh + row
            g0, w0, n0, total, d0 = _after_next(
                dh_row, dy + row, h + row, next_weight, inverse, c0, D, 0
            )
            next0 += d0
            if B1 > 0:
                g1, w1, n1, part, d1 = _after_next(
                    dh_row, dy + row, h + row, next_weight, inverse, c1, D, 0
                )
                next1 += d1
                total += part
            if B2 > 0:
                g2, w2, n2, part, d2 = _after_next(
                    dh_row, dy + row, h + row, next_weight, inverse, c2, D, LAST
                )
                next2 += d2
                total += part
            mean = total / D
            g0 += inverse * (w0 - n0 * mean)
            if B1 > 0:
                g1 += inverse * (w1 - n1 * mean)
            if B2 > 0:
                g2 += inverse * (w2 - n2 * mean)
        else:
            g0 = load_part(dh + row, c0, D, 0)
            if B1 > 0:
                g1 = load_part(dh + row, c1, D, 0)
            if B2 > 0:
                g2 = load_part(dh + row, c2, D, LAST)
        store_part(dres + row, c0, g0, D, 0)
        if B1 > 0:
            store_part(dres + row, c1, g1, D, 0)
        if B2 > 0:
            store_part(dres + row, c2, g2, D, LAST)
        if post_weight is not None:
            inverse = tl.load(post_inverse + token)
            w0, n0, total, d0 = _after_post(g0, x + row, post_weight, inverse, c0, D, 0)
            post0 += d0
            if B1 > 0:
                w1, n1, part, d1 = _after_post(g1, x + row, post_weight, inverse, c1, D, 0)
                post1 += d1
                total += part
            if B2 > 0:
                w2, n2, part, d2 = _after_post(g2, x + row, post_weight, inverse, c2, D, LAST)
                post2 += d2
                total += part
            mean = total / D
            store_part(dx + row, c0, inverse * (w0 - n0 * mean), D, 0)
            if B1 > 0:
                store_part(dx + row, c1, inverse * (w1 - n1 * mean), D, 0)
            if B2 > 0:
                store_part(dx + row, c2, inverse * (w2 - n2 * mean), D, LAST)
        row += step
    mine = program * D
    if post_weight is not None:
        store_part(dpost + mine, c0, post0, D, 0)
        if B1 > 0:
            store_part(dpost + mine, c1, post1, D, 0)
        if B2 > 0:
            store_part(dpost + mine, c2, post2, D, LAST)
    if dy is not None:
        store_part(dnext + mine, c0, next0, D, 0)
        if B1 > 0:
            store_part(dnext + mine, c1, next1, D, 0)
        if B2 > 0:
            store_part(dnext + mine, c2, next2, D, LAST)
