# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
"""The combined dual norm on a GPU (kernels/combine_dual_norm.py says what).

Forward is the dual norm's own kernel, which gathers its row instead of loading it: one program for
each token, the only one that writes there.

Backward: first the dual norm's, which leaves the gradient of the sum; then one program for each
token, which writes the gradients of this token's K rows and of its K factors. No row belongs to two
tokens, so no two programs write one place, and there are no atomics.

T tokens, K chosen, R rows of the experts, D model.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.combine_dual_norm import CombineGradients
from kernels.dual_norm import Forward, Fp8Output
from kernels.dual_norm_triton import OPTIONS, launch_forward, load_part, store_part

COMBINE_BACKWARD_WARPS = 8


def combine_forward(
    rows: tuple[Tensor, Tensor, Tensor | None],
    shared_TD: Tensor | None,
    h_TD: Tensor,
    weights: tuple[Tensor | None, Tensor | None],
    fp8: Fp8Output | None,
    eps: float,
) -> Forward:
    """Return the sum, h', y; see `CombineSide` in kernels/combine_dual_norm.py."""
    x_RD, row_id_TK, prob_TK = rows
    prob_TK = None if prob_TK is None else prob_TK.contiguous()
    ids_and_factors = (row_id_TK.contiguous(), prob_TK)
    return launch_forward(x_RD, ids_and_factors, shared_TD, h_TD, weights, fp8, eps)


def combine_backward(dx_TD: Tensor, rows: tuple[Tensor, Tensor, Tensor | None]) -> CombineGradients:
    """Return the gradients; see `CombineSide` in kernels/combine_dual_norm.py."""
    x_RD, row_id_TK, prob_TK = rows
    num_tokens, num_chosen = row_id_TK.shape
    num_rows, size = x_RD.shape
    make = torch.empty if num_rows == row_id_TK.numel() else torch.zeros
    drows_RD = make(num_rows, size, dtype=dx_TD.dtype, device=dx_TD.device)
    dprob_TK = (
        None
        if prob_TK is None
        else torch.empty_like(prob_TK, memory_format=torch.contiguous_format)
    )
    if num_tokens:
        _combine_backward_kernel[(num_tokens,)](
            dx_TD, None if prob_TK is None else x_RD.contiguous(), row_id_TK.contiguous(),
            None if prob_TK is None else prob_TK.contiguous(), drows_RD, dprob_TK, D=size,
            K=num_chosen, BLOCK=triton.next_power_of_2(size), num_warps=COMBINE_BACKWARD_WARPS,
            **OPTIONS,
        )  # fmt: skip
    return CombineGradients(drows_RD, dprob_TK)


@triton.jit
def _combine_backward_kernel(
    dx, x, row_id, prob, drows, dprob, D: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    dx_row = load_part(dx + token * D, cols, D, BLOCK)
    for k in tl.static_range(K):
        row = tl.load(row_id + token * K + k).to(tl.int64) * D
        if prob is not None:
            scaled = dx_row * tl.load(prob + token * K + k)
            store_part(drows + row, cols, scaled, D, BLOCK)
            product = tl.sum(dx_row * load_part(x + row, cols, D, BLOCK))
            tl.store(dprob + token * K + k, product)
        else:
            store_part(drows + row, cols, dx_row, D, BLOCK)
