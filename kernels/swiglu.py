"""How is an expert's activation computed, with the router's weight in it?

a = weight * silu(gate) * up, between the two products of a feed-forward layer. The weight is put
here, not on what the second product returns: it is a number for each row, so the product carries it
along, and its gradient needs only what stands here. Otherwise the output of every expert would have
to be kept for it.

Nothing but the input is kept for the backward pass; activations are computed again from it, which
is a few operations on numbers that have to be read anyway. All arithmetic is fp32 and each result
is rounded once.

T tokens sorted by expert, F FFN width.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from kernels import native
from kernels.backend import triton_side
from kernels.fp8 import BLOCK_SIZE, Quantised, quantise_by_blocks


def swiglu(hidden_T2F: Tensor, *, weight_T: Tensor | None) -> Tensor:
    """Return weight * silu(gate) * up for each token.

    Args:
        hidden_T2F: `[T, 2F]` fp32 or bf16, the first product: gate before up.
        weight_T: `[T]` fp32, the router's weight of each; None: 1, of a layer without router.

    Returns:
        `[T, F]` in the dtype of `hidden_T2F`. The gradient of the weight is fp32, that of
        `hidden_T2F` has its dtype.

    Raises:
        ValueError: if shapes or dtypes do not fit; on a GPU, where triton is not installed.

    Source: Shazeer, arXiv 2002.05202, equation 6; the weight's place is megatron-core 0.16.1's,
        moe_apply_probs_on_input being off.
    """
    _check(hidden_T2F, weight_T)
    return _SwiGLU.apply(hidden_T2F.contiguous(), weight_T)  # type: ignore[no-any-return]  apply is untyped


def swiglu_quantised(
    hidden_T2F: Tensor, *, weight_T: Tensor, dtype: torch.dtype, power_of_two_scales: bool
) -> Quantised:
    """Return what `swiglu` returns in FP8, by blocks of 1 x 128, for the second product.

    It is rounded to the dtype of `hidden_T2F` first, so that bytes and scales are those of the two
    steps one after the other. Not differentiable: what takes it calls `swiglu_backward`.

    Args:
        hidden_T2F: `[T, 2F]` fp32 or bf16.
        weight_T: `[T]` fp32.
        dtype: float8_e4m3fn or float8_e5m2.
        power_of_two_scales: round scales down to powers of two.

    Raises:
        ValueError: as `swiglu`.

    Source: kernels/fp8.py for scales and bytes.
    """
    _check(hidden_T2F, weight_T)
    if hidden_T2F.device.type == "cpu":
        a_TF = _forward(hidden_T2F, weight_T)
        return quantise_by_blocks(
            a_TF, (1, BLOCK_SIZE), dtype=dtype, power_of_two_scales=power_of_two_scales
        )
    return triton_side("swiglu").quantised(
        hidden_T2F.contiguous(), weight_T, dtype=dtype, power_of_two_scales=power_of_two_scales
    )


def swiglu_quantised_both(
    hidden_T2F: Tensor, *, weight_T: Tensor, dtype: torch.dtype, power_of_two_scales: bool
) -> tuple[Quantised, Quantised]:
    """Return what `swiglu_quantised` returns, and the copy for the second product's dW.

    That product sums over tokens, so it wants blocks of 128 tokens and a column, quantised from the
    original values, and lying along the tokens: the transpose of `quantise_by_blocks(a, (128, 1))`.
    Blocks begin at the first row: the rows of each expert must be a multiple of 128
    (kernels/permute.py), or values of two experts share a scale.

    Args:
        hidden_T2F: `[T, 2F]` fp32 or bf16.
        weight_T: `[T]` fp32.
        dtype: float8_e4m3fn or float8_e5m2.
        power_of_two_scales: round scales down to powers of two.

    Returns:
        `[T, F]` by blocks of 1 x 128 columns, and `[F, T]` by blocks of 1 x 128 tokens.

    Raises:
        ValueError: as `swiglu`.

    Source: kernels/fp8.py for scales and bytes.
    """
    _check(hidden_T2F, weight_T)
    how: dict[str, Any] = {"dtype": dtype, "power_of_two_scales": power_of_two_scales}
    if hidden_T2F.device.type != "cpu":
        return triton_side("swiglu").quantised_both(hidden_T2F.contiguous(), weight_T, **how)
    a_TF = _forward(hidden_T2F, weight_T)
    return (
        quantise_by_blocks(a_TF, (1, BLOCK_SIZE), **how),
        quantise_by_blocks(a_TF.t().contiguous(), (1, BLOCK_SIZE), **how),
    )


def swiglu_backward(
    grad_TF: Tensor, hidden_T2F: Tensor, *, weight_T: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of `hidden_T2F` in its dtype and of `weight_T`, if any, in fp32.

    Args:
        grad_TF: `[T, F]` fp32 or bf16, the gradient of the result.
        hidden_T2F: `[T, 2F]`, as it was given.
        weight_T: `[T]` fp32, or None, as it was given.
    """
    if hidden_T2F.device.type != "cpu":
        side, given_T = triton_side("swiglu"), _weights(hidden_T2F, weight_T)
        grad, dweight_T = side.backward(grad_TF.contiguous(), hidden_T2F.contiguous(), given_T)
        return grad, None if weight_T is None else dweight_T
    if native.computes(hidden_T2F) and grad_TF.dtype == torch.float32:
        a_TF, grad_T2F = torch.empty_like(grad_TF), torch.empty_like(hidden_T2F)
        dweight_T = None if weight_T is None else torch.empty_like(weight_T)
        arrays = (hidden_T2F, weight_T, grad_TF.contiguous(), a_TF, grad_T2F, dweight_T)
        native.call("swiglu_backward", *arrays, *a_TF.shape)
        return grad_T2F, dweight_T
    given_T = _weights(hidden_T2F, weight_T)
    grad_TF = grad_TF.float()
    gate_TF, up_TF = hidden_T2F.float().chunk(2, dim=-1)
    grad_T2F = torch.empty_like(hidden_T2F, dtype=torch.float32)
    dgate_TF, dup_TF = grad_T2F.chunk(2, dim=-1)
    dsilu_up_TF = grad_TF * F.silu(gate_TF)
    dweight_T = torch.empty_like(given_T)
    torch.linalg.vecdot(dsilu_up_TF, up_TF, out=dweight_T)  # pyright: ignore[reportUnknownMemberType]  no stub
    torch.mul(dsilu_up_TF, given_T[:, None], out=dup_TF)
    torch.ops.aten.silu_backward.grad_input(
        (grad_TF * up_TF).mul_(given_T[:, None]), gate_TF, grad_input=dgate_TF
    )
    return grad_T2F.to(hidden_T2F.dtype), None if weight_T is None else dweight_T


def swiglu_reference(hidden_T2F: Tensor, *, weight_T: Tensor) -> Tensor:
    """Return the same as `swiglu`, written as the definition."""
    gate_TF, up_TF = hidden_T2F.float().chunk(2, dim=-1)
    return (weight_T[:, None] * (gate_TF * gate_TF.sigmoid()) * up_TF).to(hidden_T2F.dtype)


class _SwiGLU(torch.autograd.Function):
    """With s = silu(gate): dweight = da . (s u), dup = da s w, dgate = da u w s'(gate)."""

    @staticmethod
    def forward(ctx: Any, hidden_T2F: Tensor, weight_T: Tensor | None) -> Tensor:
        ctx.save_for_backward(hidden_T2F, weight_T)
        if hidden_T2F.device.type != "cpu":
            return triton_side("swiglu").forward(hidden_T2F, _weights(hidden_T2F, weight_T))
        return _forward(hidden_T2F, weight_T)

    @staticmethod
    @once_differentiable  # an untyped decorator, hence the silenced rule
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        hidden_T2F, weight_T = ctx.saved_tensors
        return swiglu_backward(grad_outputs[0], hidden_T2F, weight_T=weight_T)


def _weights(hidden_T2F: Tensor, weight_T: Tensor | None) -> Tensor:
    """Return the weights, or as many ones: made anew where they are needed, not kept."""
    if weight_T is not None:
        return weight_T
    return hidden_T2F.new_ones(len(hidden_T2F), dtype=torch.float32)


def _forward(hidden_T2F: Tensor, weight_T: Tensor | None) -> Tensor:
    if native.computes(hidden_T2F):
        a_TF = hidden_T2F.new_empty(len(hidden_T2F), hidden_T2F.shape[1] // 2)
        given_T = None if weight_T is None else weight_T.contiguous()
        native.call("swiglu", hidden_T2F.contiguous(), given_T, a_TF, *a_TF.shape)
        return a_TF
    gate_TF, up_TF = hidden_T2F.float().chunk(2, dim=-1)
    a_TF = F.silu(gate_TF).mul_(up_TF)
    return (a_TF if weight_T is None else a_TF.mul_(weight_T[:, None])).to(hidden_T2F.dtype)


def _check(hidden_T2F: Tensor, weight_T: Tensor | None) -> None:
    if hidden_T2F.dim() != 2 or hidden_T2F.shape[1] % 2:
        raise ValueError(
            f"hidden states of shape {tuple(hidden_T2F.shape)} given, [T, 2F] is allowed"
        )
    if weight_T is not None and (
        weight_T.shape != hidden_T2F.shape[:1] or weight_T.dtype != torch.float32
    ):
        raise ValueError(
            f"weights of shape {tuple(weight_T.shape)} and {weight_T.dtype} given,"
            f" {tuple(hidden_T2F.shape[:1])} torch.float32 is allowed"
        )
    if hidden_T2F.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(
            f"hidden states of {hidden_T2F.dtype} given, torch.float32 and torch.bfloat16 are"
            " allowed"
        )
