"""How is RMSNorm computed, and in which order are the roundings?

transformers' AXK1 takes the statistics in fp32, casts x * rsqrt(mean(x^2) + eps) back to the
input's dtype and only then multiplies by the weight. In bf16 the order shows in the last bit, so it
is kept.

B batch, S sequence, D model.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


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
    if x.dtype == torch.float32:
        return F.rms_norm(x, (x.shape[-1],), weight, eps)
    return weight * F.rms_norm(x.float(), (x.shape[-1],), None, eps).to(x.dtype)


def rms_norm_reference(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """Return the same as `rms_norm`, written as the definition."""
    x_f32 = x.float()
    normalised = x_f32 * torch.rsqrt(x_f32.pow(2).mean(-1, keepdim=True) + eps)
    return weight * normalised.to(x.dtype)
