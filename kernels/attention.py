"""How is causal attention computed when values are narrower than queries and keys, as in MLA?

In A.X K1 a query and a key have 128 + 64 = 192 components and a value 128. torch's fused attention
takes heads of one size only and otherwise falls back, without a word, to materialised [S, S]
scores: memory grows with S^2. Padding the values with zeros to 192 keeps the fused path, memory
linear in S; its extra columns are zeros and are cut off. Time on two CPU cores, fused and padded
against the fall-back, forward and backward: 23 to 27 ms for heads of 48 and 32 (8 x 8 heads, 256
tokens), 65 to 60 ms for 192 and 128 (2 x 8 heads, 512 tokens).

In fp32 on a CPU it is compiled (kernels/attention.c): nothing is padded, hardly anything above the
diagonal is computed, tensors are read where they lie, and what is kept for the backward pass is
two numbers a row beside queries, keys and values.

Where a rank holds only a part of the sequence (parallel/context.py), its queries stand at other
positions than the first keys, and torch's fused attention knows no such mask. Here tiles of rows
attend one after the other, each to the keys it can see, with a mask that is a window on one small
buffer: memory stays linear in S. What is compiled is told the position.

B batch, S sequence (of queries), K sequence of keys, N heads, H head size of q and k, W head size
of v.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from kernels import native

TILE_TOKENS = 256
"""Queries that share one mask; their surplus is at most so many keys a query."""
_SCORE_ROWS = 64
"""Queries whose scores stand in memory together where only the largest is wanted."""


def causal_attention(q_BNSH: Tensor, k_BNSH: Tensor, v_BNSW: Tensor, *, scale: float) -> Tensor:
    """Return softmax(q k^T scale + causal mask) v.

    Args:
        q_BNSH: `[B, N, S, H]` fp32 or bf16.
        k_BNSH: `[B, N, S, H]`.
        v_BNSW: `[B, N, S, W]` with W <= H.
        scale: factor on the scores; A.X K1: 192 ** -0.5.

    Returns:
        `[B, N, S, W]`.

    Raises:
        ValueError: if W > H.

    Source: transformers 5.23 AXK1Attention; the padding is our choice, docs/decisions/0006.
    """
    return causal_attention_from(q_BNSH, k_BNSH, v_BNSW, first=0, scale=scale)


def causal_attention_from(
    q_BNSH: Tensor, k_BNKH: Tensor, v_BNKW: Tensor, *, first: int, scale: float
) -> Tensor:
    """Return the attention of queries that stand later in the sequence than its first key.

    Args:
        q_BNSH: `[B, N, S, H]` fp32 or bf16, at positions first to first + S - 1.
        k_BNKH: `[B, N, K, H]`, at positions 0 to K - 1; those after the queries are not read.
        v_BNKW: `[B, N, K, W]` with W <= H.
        first: position of the first query, 0 <= first <= K - S.
        scale: factor on the scores; A.X K1: 192 ** -0.5.

    Returns:
        `[B, N, S, W]`.

    Raises:
        ValueError: if W > H, or if the keys end before the queries.

    Source: docs/decisions/0014.
    """
    num_queries, num_keys = q_BNSH.shape[-2], k_BNKH.shape[-2]
    if not 0 <= first <= num_keys - num_queries:
        raise ValueError(
            f"{num_queries} queries from position {first} and {num_keys} keys given; 0 to"
            f" {num_keys - num_queries} is allowed for the first position"
        )
    _check_value_size(v_BNKW, head_size=q_BNSH.shape[-1])
    if native.computes(q_BNSH):
        return _Compiled.apply(q_BNSH, k_BNKH, v_BNKW, first, scale)  # type: ignore[no-any-return]  apply is untyped
    if first == 0:
        k_BNSH, v_BNSH = k_BNKH[..., :num_queries, :], _padded(v_BNKW[..., :num_queries, :], q_BNSH)
        out = F.scaled_dot_product_attention(q_BNSH, k_BNSH, v_BNSH, is_causal=True, scale=scale)
        return out[..., : v_BNKW.shape[-1]]
    v_BNKH = _padded(v_BNKW, q_BNSH)
    bias_TK = _bias(q_BNSH, num_rows=min(num_queries, TILE_TOKENS), num_keys=first + num_queries)
    tiles_BNTH: list[Tensor] = []
    for row in range(0, num_queries, TILE_TOKENS):
        q_BNTH = q_BNSH[..., row : row + TILE_TOKENS, :]
        num_seen = first + row + q_BNTH.shape[-2]
        k, v = k_BNKH[..., :num_seen, :], v_BNKH[..., :num_seen, :]
        bias = bias_TK[-q_BNTH.shape[-2] :, -num_seen:]
        tiles_BNTH.append(F.scaled_dot_product_attention(q_BNTH, k, v, bias, scale=scale))
    return torch.cat(tiles_BNTH, dim=-2)[..., : v_BNKW.shape[-1]]


def largest_score(
    q_BNSH: Tensor,
    k_BNKH: Tensor,
    *,
    documents_BK: Tensor | None = None,
    first: int = 0,
    scale: float,
) -> Tensor:
    """Return the largest score that the softmax of causal attention sees, 0-dimensional fp32.

    Args:
        q_BNSH: `[B, N, S, H]` fp32 or bf16, at positions first to first + S - 1.
        k_BNKH: `[B, N, K, H]`, at positions 0 to K - 1.
        documents_BK: `[B, K]`, the document of each key; None: one.
        first: position of the first query, 0 <= first <= K - S.
        scale: factor on the scores, > 0.

    Costs half a matrix product as large as that of the scores; memory is linear in S.
    """
    batch, num_queries = q_BNSH.shape[0], q_BNSH.shape[-2]
    q_MSH, k_MHK = q_BNSH.flatten(0, 1), k_BNKH.flatten(0, 1).transpose(1, 2)
    rows, num_keys = min(_SCORE_ROWS, num_queries), first + num_queries
    # the mask goes into the product, which is twice as fast as to write it over the scores
    bias_TK = _bias(q_BNSH, num_rows=rows, num_keys=num_keys)
    largest: list[Tensor] = []
    for row in range(0, num_queries, rows):
        q_MTH = q_MSH[:, row : row + rows]
        begin, num_seen = first + row, first + row + q_MTH.shape[1]
        bias = bias_TK[-q_MTH.shape[1] :, -num_seen:]
        scores_MTK = torch.baddbmm(bias, q_MTH, k_MHK[..., :num_seen])
        if documents_BK is not None:
            own_BT1 = documents_BK[:, begin:num_seen, None]
            other_BTK = own_BT1 != documents_BK[:, None, :num_seen]
            scores_BNTK = scores_MTK.view(batch, -1, *scores_MTK.shape[1:])
            scores_BNTK.masked_fill_(other_BTK[:, None], float("-inf"))
        largest.append(scores_MTK.amax())
    return torch.stack(largest).amax().float() * scale


def _bias(like: Tensor, *, num_rows: int, num_keys: int) -> Tensor:
    """Return `[T, K]`, 0 or minus infinity, in which the last row sees every key.

    Its bottom right corner is the same for fewer rows and keys: all tiles share one buffer.
    """
    bias_TK = torch.full((num_rows, num_keys), float("-inf"), dtype=like.dtype, device=like.device)
    return bias_TK.triu_(num_keys - num_rows + 1)


def _padded(v_BNSW: Tensor, like_BNSH: Tensor) -> Tensor:
    """Return values with zeros up to the head size of the queries."""
    surplus = like_BNSH.shape[-1] - v_BNSW.shape[-1]
    return F.pad(v_BNSW, (0, surplus)) if surplus else v_BNSW


def _check_value_size(v_BNSW: Tensor, *, head_size: int) -> None:
    value_size = v_BNSW.shape[-1]
    if value_size > head_size:
        raise ValueError(
            f"value heads of {value_size} given, at most the query head size {head_size} is"
            " allowed: lower model.v_head_size or raise model.qk_nope_head_size"
        )


class _Compiled(torch.autograd.Function):
    """Attention and its gradient by kernels/attention.c.

    What comes out lies in memory in the order [S, B, N, ...], in which MLA makes its inputs and
    wants its outputs.
    """

    @staticmethod
    def forward(
        ctx: Any, q_BNSH: Tensor, k_BNKH: Tensor, v_BNKW: Tensor, first: int, scale: float
    ) -> Tensor:
        qkv = [t if t.stride(-1) == 1 else t.contiguous() for t in (q_BNSH, k_BNKH, v_BNKW)]
        (b, n, s, h), w = q_BNSH.shape, v_BNKW.shape[-1]
        sizes = (b, n, s, first, h, w)
        out_SBNW, kept = q_BNSH.new_empty(s, b, n, w), q_BNSH.new_empty(b, n, s, 2)
        native.call("attention", *qkv, _strides(qkv), out_SBNW, kept, *sizes, scale)
        ctx.sizes, ctx.scale = sizes, scale
        ctx.save_for_backward(*qkv, kept)
        return out_SBNW.permute(1, 2, 0, 3)

    @staticmethod
    @once_differentiable  # an untyped decorator, hence the silenced rule
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, None, None]:
        *qkv, kept = ctx.saved_tensors
        _, _, s, first, _, _ = ctx.sizes
        dout_SBNW = grad_outputs[0].permute(2, 0, 1, 3).contiguous()
        gradients = [t.new_empty(t.permute(2, 0, 1, 3).shape) for t in qkv]
        for gradient in gradients[1:]:
            gradient[first + s :] = 0  # keys that nobody sees
        native.call(
            *("attention_backward", *qkv, _strides(qkv), dout_SBNW, kept, *gradients),
            *(*ctx.sizes, ctx.scale),
        )
        dq, dk, dv = (gradient.permute(1, 2, 0, 3) for gradient in gradients)
        return dq, dk, dv, None, None


def _strides(qkv: Sequence[Tensor]) -> Tensor:
    """Return `[3, 3]` int64: steps between positions, sequences and heads of each."""
    return torch.tensor([(t.stride(2), t.stride(0), t.stride(1)) for t in qkv])


def causal_attention_reference(
    q_BNSH: Tensor, k_BNSH: Tensor, v_BNSW: Tensor, *, scale: float
) -> Tensor:
    """Return the same as `causal_attention`, scores written out and the softmax in fp32."""
    sequence = q_BNSH.shape[-2]
    scores_BNSS = (q_BNSH @ k_BNSH.transpose(-1, -2)).float() * scale
    future_SS = torch.ones(sequence, sequence, dtype=torch.bool, device=q_BNSH.device).triu(1)
    weights_BNSS = scores_BNSS.masked_fill(future_SS, float("-inf")).softmax(-1).to(v_BNSW.dtype)
    return weights_BNSS @ v_BNSW


def causal_attention_from_reference(
    q_BNSH: Tensor, k_BNKH: Tensor, v_BNKW: Tensor, *, first: int, scale: float
) -> Tensor:
    """Return the same as `causal_attention_from`, scores written out and the softmax in fp32."""
    num_queries, num_keys = q_BNSH.shape[-2], k_BNKH.shape[-2]
    scores_BNSK = (q_BNSH @ k_BNKH.transpose(-1, -2)).float() * scale
    future_SK = torch.ones(num_queries, num_keys, dtype=torch.bool, device=q_BNSH.device)
    scores_BNSK = scores_BNSK.masked_fill(future_SK.triu(first + 1), float("-inf"))
    return scores_BNSK.softmax(-1).to(v_BNKW.dtype) @ v_BNKW
