"""How is RMSNorm computed, and in which order are the roundings?

transformers' AXK1 takes the statistics in fp32, casts x * rsqrt(mean(x^2) + eps) back to the
input's dtype and only then multiplies by the weight. In bf16 the order shows in the last bit, so it
is kept.

torch has no fused RMSNorm on the CPU: F.rms_norm is elementary operators, and autograd walks back
through each. In fp32 the gradient is therefore written out, with its two sums as matrix-vector
products: forward equal to the bit, forward and backward together in about half the time. Where a
machine compiles (native.py), each is one pass, in less than half of that again.

B batch, S sequence, D model.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from kernels import native


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """Return `x` normalised over its last dimension and scaled.

    Args:
        x: `[..., D]`, fp32 or bf16.
        weight: `[D]`, the scale.
        eps: added to the mean square; 1e-6 in A.X K1.

    Returns:
        `[..., D]` in the dtype of `x` (of the product, if the weight is wider).

    Source: transformers 5.23 AXK1RMSNorm; Zhang and Sennrich, arXiv 1910.07467, equation 4.
    """
    if x.dtype == weight.dtype == torch.float32:
        return _RMSNorm.apply(x, weight, eps)  # type: ignore[no-any-return]  apply is untyped
    return weight * F.rms_norm(x.float(), (x.shape[-1],), None, eps).to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    """y = x r w with r = rsqrt(mean(x^2) + eps), and its gradient.

    With h = dy x: dw = sum over tokens of h r, and dx = r w dy - x r^3 (h . w) / D.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        inverse = torch.empty_like(x[..., 0], memory_format=torch.contiguous_format)
        x = x.contiguous()  # of a slice a copy is kept, not the whole
        if native.computes(x):
            y = torch.empty_like(x)
            native.call("rms_norm", x, weight, y, inverse, inverse.numel(), x.shape[-1], eps)
            ctx.save_for_backward(x, weight, inverse.unsqueeze(-1))
            return y
        torch.linalg.vecdot(x, x, out=inverse)  # pyright: ignore[reportUnknownMemberType]  no stub
        inverse = inverse.unsqueeze(-1)
        inverse.div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight)

    @staticmethod
    @once_differentiable  # an untyped decorator, hence the silenced rule
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor, Tensor, None]:
        (grad,) = grad_outputs
        x, weight, inverse = ctx.saved_tensors
        size = x.shape[-1]
        if native.computes(x):
            num_tokens, grad_x = inverse.numel(), torch.empty_like(x)
            parts = x.new_empty(-(-num_tokens // native.BLOCK_ROWS), size)
            arrays = (grad.contiguous(), x, weight, inverse, grad_x, parts)
            native.call("rms_norm_backward", *arrays, num_tokens, size)
            return grad_x, parts.sum(0), None
        product_TD = (grad * x).reshape(-1, size)
        grad_weight = product_TD.t() @ inverse.reshape(-1)
        along_x = (product_TD @ weight).view_as(inverse).mul_(inverse.pow(3)).div_(-size)
        grad_x = (grad * weight).mul_(inverse).addcmul_(x, along_x)
        return grad_x, grad_weight, None


def rms_norm_reference(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """Return the same as `rms_norm`, written as the definition."""
    x_f32 = x.float()
    normalised = x_f32 * torch.rsqrt(x_f32.pow(2).mean(-1, keepdim=True) + eps)
    return weight * normalised.to(x.dtype)
