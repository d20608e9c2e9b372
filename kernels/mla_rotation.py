"""How do MLA's queries and keys get their positions, and stand side by side with the rest?

Each query head ends in a part that is rotated; keys of all heads share one such part, which comes
with the latent. Written with torch's operators each part is cut out, its pairs are reordered,
turned, and joined to the rest again, once more for the gradient. Here it is one pass over queries,
one over keys and values, and nothing but cosines and sines is kept for the backward pass.

S sequence (this rank's tokens of it), B batch, N heads, P size of what is not rotated, R of what
is, W value head.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import native


def rotate_queries(q_SBNH: Tensor, cos_SR: Tensor, sin_SR: Tensor) -> Tensor:
    """Return queries whose last R columns are rotated by their position.

    Args:
        q_SBNH: `[S, B, N, P + R]` fp32 or bf16.
        cos_SR: `[S, R]` fp32, cosines of each position's angles, YaRN's factor included.
        sin_SR: `[S, R]` fp32, sines.

    Returns:
        `[S, B, N, P + R]`: pairs (2i, 2i + 1) stand at i and R / 2 + i of the rotated part.

    Source: megatron-core 0.16.1, rope_utils.py (multi_latent_attention); transformers 5.23 AXK1.
    """
    return _Queries.apply(q_SBNH, cos_SR, sin_SR)  # type: ignore[no-any-return]  apply is untyped


def rotate_keys(
    kv_SBNF: Tensor, shared_SB1R: Tensor, cos_SR: Tensor, sin_SR: Tensor, *, value_size: int
) -> tuple[Tensor, Tensor]:
    """Return keys and values.

    Args:
        kv_SBNF: `[S, B, N, P + W]`, a key's part without position before the value, of each head.
        shared_SB1R: `[S, B, 1, R]`, the part with position, of all heads.
        cos_SR: as of `rotate_queries`.
        sin_SR: likewise.
        value_size: W.

    Returns:
        `[S, B, N, P + R]` and `[S, B, N, W]`.
    """
    return _Keys.apply(kv_SBNF, shared_SB1R, cos_SR, sin_SR, value_size)  # type: ignore[no-any-return]  apply is untyped


class _Queries(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_SBNH: Tensor, cos_SR: Tensor, sin_SR: Tensor) -> Tensor:
        ctx.save_for_backward(cos_SR, sin_SR)
        return _rotated_queries(q_SBNH, cos_SR, sin_SR, is_backward=False)

    @staticmethod
    @once_differentiable  # an untyped decorator, hence the silenced rule
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor, None, None]:
        return _rotated_queries(grad_outputs[0], *ctx.saved_tensors, is_backward=True), None, None


class _Keys(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        kv_SBNF: Tensor,
        shared_SB1R: Tensor,
        cos_SR: Tensor,
        sin_SR: Tensor,
        value_size: int,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos_SR, sin_SR)
        (s, b, n, f), r = kv_SBNF.shape, cos_SR.shape[-1]
        sizes = [f - value_size, value_size]
        if native.computes(kv_SBNF):
            key, value = (
                kv_SBNF.new_empty(s, b, n, sizes[0] + r),
                kv_SBNF.new_empty(s, b, n, sizes[1]),
            )
            arrays = (kv_SBNF.contiguous(), shared_SB1R.contiguous(), cos_SR, sin_SR, key, value)
            native.call("rotate_keys", *arrays, s * b, b, n, sizes[0], r // 2, value_size)
            return key, value
        plain, value = kv_SBNF.split_with_sizes(sizes, dim=-1)
        rotated = _rotated(shared_SB1R, cos_SR, sin_SR).expand(-1, -1, n, -1)
        return torch.cat([plain, rotated], dim=-1), value.contiguous()

    @staticmethod
    @once_differentiable  # an untyped decorator, hence the silenced rule
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor, Tensor, None, None, None]:
        dkey, dvalue = grad_outputs
        cos_SR, sin_SR = ctx.saved_tensors
        (s, b, n, _), r, w = dkey.shape, cos_SR.shape[-1], dvalue.shape[-1]
        p = dkey.shape[-1] - r
        if native.computes(dkey):
            dkv, dshared = dkey.new_empty(s, b, n, p + w), dkey.new_empty(s, b, 1, r)
            arrays = (dkey.contiguous(), dvalue.contiguous(), cos_SR, sin_SR, dkv, dshared)
            native.call("rotate_keys_backward", *arrays, s * b, b, n, p, r // 2, w)
            return dkv, dshared, None, None, None
        plain, rotated = dkey.split_with_sizes([p, r], dim=-1)
        dshared = _rotated_back(rotated.sum(2, keepdim=True), cos_SR, sin_SR)
        return torch.cat([plain, dvalue], dim=-1), dshared, None, None, None


def _rotated_queries(
    x_SBNH: Tensor, cos_SR: Tensor, sin_SR: Tensor, *, is_backward: bool
) -> Tensor:
    (s, b, n, h), r = x_SBNH.shape, cos_SR.shape[-1]
    if native.computes(x_SBNH):
        x_SBNH = x_SBNH.contiguous()
        y_SBNH = torch.empty_like(x_SBNH)
        sizes = (s * b, b, n, h - r, r // 2, int(is_backward))
        native.call("rotate_queries", x_SBNH, cos_SR, sin_SR, y_SBNH, *sizes)
        return y_SBNH
    plain, turned = x_SBNH.split_with_sizes([h - r, r], dim=-1)
    turn = _rotated_back if is_backward else _rotated
    return torch.cat([plain, turn(turned, cos_SR, sin_SR)], dim=-1)


def _rotated(x_SBNR: Tensor, cos_SR: Tensor, sin_SR: Tensor) -> Tensor:
    """Return x turned, even columns in the first half and odd ones in the second."""
    (cos_1, cos_2), (sin_1, sin_2) = _halves(cos_SR, x_SBNR), _halves(sin_SR, x_SBNR)
    x_1, x_2 = x_SBNR[..., 0::2], x_SBNR[..., 1::2]
    return torch.cat([x_1 * cos_1 - x_2 * sin_1, x_2 * cos_2 + x_1 * sin_2], dim=-1)


def _rotated_back(dy_SBNR: Tensor, cos_SR: Tensor, sin_SR: Tensor) -> Tensor:
    """Return the gradient of what `_rotated` was given."""
    (cos_1, cos_2), (sin_1, sin_2) = _halves(cos_SR, dy_SBNR), _halves(sin_SR, dy_SBNR)
    dy_1, dy_2 = dy_SBNR.chunk(2, dim=-1)
    pairs = (dy_1 * cos_1 + dy_2 * sin_2, dy_2 * cos_2 - dy_1 * sin_1)
    return torch.stack(pairs, dim=-1).flatten(-2)


def _halves(table_SR: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    first, second = table_SR.to(like.dtype)[:, None, None].chunk(2, dim=-1)
    return first, second
