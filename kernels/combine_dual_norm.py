"""How do the experts' rows come back to their tokens, straight into the dual norm?

The exchange brings each token's K rows back somewhere in `[R, D]`. Their weighted sum is what the
dual norm reads:

    x = sum over k of prob[t, k] * rows[row_id[t, k]] [+ shared]

in fp32, k by k, rounded once to the dtype of the stream; then as kernels/dual_norm.py says.
Gathered in the same pass, the sum is written once, for the gradient, and not read back in between.

The gradient of a row is prob times the gradient of x at its token (rounded, as x is), and each row
belongs to one token at most: it is written once, in no order that matters. The gradient of a prob
is the product of two rows of D, summed in fp32. Rows of no token (padding of experts) get zeros.

T tokens, K chosen, R rows of the experts, D model.
"""

from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import dual_norm
from kernels.backend import triton_side
from kernels.dual_norm import DualNorm, Forward, Fp8Output, dual_norm_reference


class CombineGradients(NamedTuple):
    """Gradients of the rows, `[R, D]` in their dtype, and of the factors, `[T, K]` fp32 or None."""

    rows: Tensor
    prob: Tensor | None


class CombineSide(Protocol):
    """A way to compute the sum: this file's or kernels/combine_dual_norm_triton.py's."""

    def combine_forward(
        self,
        rows: tuple[Tensor, Tensor, Tensor | None],
        shared_TD: Tensor | None,
        h_TD: Tensor,
        weights: tuple[Tensor | None, Tensor | None],
        fp8: Fp8Output | None,
        eps: float,
    ) -> Forward:
        """Return what `Side.forward` returns, x being the sum."""
        ...

    def combine_backward(
        self, dx_TD: Tensor, rows: tuple[Tensor, Tensor, Tensor | None]
    ) -> CombineGradients:
        """Return the gradients of the rows and of their factors."""
        ...


def combine_dual_norm(
    x: Tensor,
    residual: Tensor,
    *,
    row_id: Tensor,
    prob: Tensor | None = None,
    shared: Tensor | None = None,
    post_weight_D: Tensor,
    next_weight_D: Tensor | None = None,
    fp8: Fp8Output | None = None,
    eps: float,
) -> DualNorm:
    """Return the residual stream after an MoE layer, and its norm for the next one.

    More words than the habit allows: they are those of `dual_norm`, the map and the factors.

    Args:
        x: `[R, D]` bf16 or fp32, the rows that the experts computed.
        residual: `[T, D]` as `x`, the stream before the MoE block.
        row_id: `[T, K]` int32, the row of each choice of each token, no row twice. The caller's
            promise: on a GPU it is not looked at, for that would make the host wait.
        prob: `[T, K]` fp32, the factor of each. None: it is in the rows already.
        shared: `[T, D]` as `x`, the output of the shared experts. None: there is none.
        post_weight_D: `[D]`, the norm after the MoE block.
        next_weight_D: `[D]`, the norm that reads the stream next. None: as `dual_norm`.
        fp8: as `dual_norm`.
        eps: added to each mean square; 1e-6 in A.X K1.

    Returns:
        As `dual_norm`; h' and y are both `[T, D]` as `x`; y is None without `next_weight_D`.

    Raises:
        ValueError: as `dual_norm`; if the map or the factors are of another shape or dtype; on a
            CPU also if a row is named twice or is not there.
    """
    _check(x, residual, row_id, prob)
    dual_norm.check(residual, residual, shared, (post_weight_D, next_weight_D), fp8)
    words = (x, row_id, prob, shared, residual, post_weight_D, next_weight_D, fp8, eps)
    return dual_norm.named(_CombineDualNorm.apply(*words))  # type: ignore[arg-type]  apply is untyped


def combine_dual_norm_reference(
    x: Tensor,
    residual: Tensor,
    *,
    row_id: Tensor,
    prob: Tensor | None = None,
    shared: Tensor | None = None,
    post_weight_D: Tensor,
    next_weight_D: Tensor | None = None,
    eps: float,
) -> tuple[Tensor, Tensor | None]:
    """Return the same as `combine_dual_norm`, written as the definition, for any device."""
    chosen_TKD = x[row_id.long()].float()
    total_TD = (chosen_TKD if prob is None else chosen_TKD * prob[..., None]).sum(1)
    if shared is not None:
        total_TD = total_TD + shared.float()
    weights = {"post_weight_D": post_weight_D, "next_weight_D": next_weight_D}
    return dual_norm_reference(total_TD.to(x.dtype), residual, **weights, eps=eps)


def side_of(x: Tensor) -> CombineSide:
    """Return what computes the sum where `x` is: this file on a CPU, else Triton.

    Raises:
        ValueError: if `x` is on a GPU and triton is not installed.
    """
    return _PLAIN if x.device.type == "cpu" else cast(CombineSide, triton_side("combine_dual_norm"))


class _CombineDualNorm(torch.autograd.Function):
    """h' and y; the rows are kept for the gradient of their factors, if there are factors."""

    @staticmethod
    def forward(
        ctx: Any,
        x_RD: Tensor,
        row_id_TK: Tensor,
        prob_TK: Tensor | None,
        shared_TD: Tensor | None,
        residual_TD: Tensor,
        post_weight_D: Tensor,
        next_weight_D: Tensor | None,
        fp8: Fp8Output | None,
        eps: float,
    ) -> tuple[Tensor | None, ...]:
        weights = (post_weight_D, next_weight_D)
        rows = (x_RD, row_id_TK, prob_TK)
        made = side_of(x_RD).combine_forward(rows, shared_TD, residual_TD, weights, fp8, eps)
        ctx.set_materialize_grads(False)
        ctx.has_shared, ctx.num_rows = shared_TD is not None, x_RD.shape[0]
        kept_RD = None if prob_TK is None else x_RD
        inverses = (made.post_inverse, made.next_inverse)
        ctx.save_for_backward(kept_RD, row_id_TK, prob_TK, made.x, made.h, *inverses, *weights)
        _, _, *rest = dual_norm.flat(made)
        ctx.mark_non_differentiable(*(tensor for tensor in rest if tensor is not None))
        return made.h, made.y, *rest

    @staticmethod
    @once_differentiable  # an untyped decorator, hence the silenced rule
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x_RD, row_id_TK, prob_TK, x_TD, h_TD, *rest = ctx.saved_tensors
        post_inverse_T, next_inverse_T, post_weight_D, next_weight_D = rest
        weights = (post_weight_D, next_weight_D)
        saved = Forward(x_TD, h_TD, None, post_inverse_T, next_inverse_T)
        dh_TD, dy_TD = grad_outputs[:2]
        made = dual_norm.side_of(h_TD).backward(dh_TD, dy_TD, saved, weights)
        if x_RD is None:  # only its size is wanted
            x_RD = h_TD.new_empty(1, 1).expand(ctx.num_rows, h_TD.shape[1])
        combined = side_of(h_TD).combine_backward(made.x, (x_RD, row_id_TK, prob_TK))
        dpost, dnext = (
            None if gradient is None else gradient.to(weight.dtype)
            for gradient, weight in zip(made[2:], weights, strict=True)
        )
        dshared = made.x if ctx.has_shared else None
        return combined.rows, None, combined.prob, dshared, made.h, dpost, dnext, None, None


class _Plain:
    """The sum in torch, choice by choice, so that no `[T, K, D]` is made; the twin of Triton's."""

    def combine_forward(
        self,
        rows: tuple[Tensor, Tensor, Tensor | None],
        shared_TD: Tensor | None,
        h_TD: Tensor,
        weights: tuple[Tensor | None, Tensor | None],
        fp8: Fp8Output | None,
        eps: float,
    ) -> Forward:
        x_RD, row_id_TK, prob_TK = rows
        total_TD = torch.zeros_like(h_TD, dtype=torch.float32)
        for k in range(row_id_TK.shape[1]):
            row_TD = x_RD.index_select(0, row_id_TK[:, k]).float()
            total_TD += row_TD if prob_TK is None else row_TD * prob_TK[:, k, None]
        if shared_TD is not None:
            total_TD += shared_TD.float()
        plain = dual_norm.side_of(h_TD)
        return plain.forward(total_TD.to(h_TD.dtype), None, h_TD, weights, fp8, eps)

    def combine_backward(
        self, dx_TD: Tensor, rows: tuple[Tensor, Tensor, Tensor | None]
    ) -> CombineGradients:
        x_RD, row_id_TK, prob_TK = rows
        drows_RD = dx_TD.new_zeros(x_RD.shape)
        dprob_TK = None if prob_TK is None else torch.empty_like(prob_TK)
        dx_f32 = dx_TD.float()
        for k in range(row_id_TK.shape[1]):
            ids_T = row_id_TK[:, k]
            if prob_TK is None or dprob_TK is None:
                drows_RD.index_copy_(0, ids_T.long(), dx_TD)
                continue
            scaled_TD = (dx_f32 * prob_TK[:, k, None]).to(dx_TD.dtype)
            drows_RD.index_copy_(0, ids_T.long(), scaled_TD)
            dprob_TK[:, k] = (dx_f32 * x_RD.index_select(0, ids_T).float()).sum(-1)
        return CombineGradients(drows_RD, dprob_TK)


_PLAIN = _Plain()


def _check(x: Tensor, residual: Tensor, row_id: Tensor, prob: Tensor | None) -> None:
    num_tokens, size = residual.shape
    if x.dtype != residual.dtype or x.dim() != 2 or x.shape[1] != size:
        raise ValueError(
            f"rows of {x.dtype} {tuple(x.shape)} given, {residual.dtype} [R, {size}] is allowed,"
            " as the residual"
        )
    if row_id.dtype != torch.int32 or row_id.dim() != 2 or len(row_id) != num_tokens:
        raise ValueError(
            f"row_id of {row_id.dtype} {tuple(row_id.shape)} given, torch.int32"
            f" [{num_tokens}, K] is allowed"
        )
    if prob is not None and (prob.dtype != torch.float32 or prob.shape != row_id.shape):
        raise ValueError(
            f"prob of {prob.dtype} {tuple(prob.shape)} given, torch.float32"
            f" {tuple(row_id.shape)} as row_id is allowed"
        )
    if x.device.type == "cpu" and row_id.numel():
        counts = torch.bincount(row_id.flatten().clamp(min=0), minlength=len(x))
        if int(row_id.min()) < 0 or len(counts) > len(x) or int(counts.max()) > 1:
            raise ValueError(
                f"row_id from {int(row_id.min())} to {int(row_id.max())} with"
                f" {int((counts > 1).sum())} rows named twice given, each of 0 to {len(x) - 1}"
                " once is allowed"
            )
