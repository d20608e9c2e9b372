"""How is causal attention computed when values are narrower than queries and keys, as in MLA?

In A.X K1 a query and a key have 128 + 64 = 192 components and a value 128. torch's fused attention
takes heads of one size only and otherwise falls back, without a word, to materialised [S, S]
scores: memory grows with S^2. Padding the values with zeros to 192 keeps the fused path, memory
linear in S; its extra columns are zeros and are cut off. Time on two CPU cores, fused and padded
against the fall-back, forward and backward: 23 to 27 ms for heads of 48 and 32 (8 x 8 heads, 256
tokens), 65 to 60 ms for 192 and 128 (2 x 8 heads, 512 tokens).

Short sequences in fp32 on a CPU have a way of their own (`_ShortAttention`): tiles of rows, each
against the keys that it can see, as batched matrix products. Nothing is padded, nothing above the
diagonal is computed but inside a tile, and the weights are kept for the backward pass, which the
fused attention computes again. What is kept grows with S^2, as long as the rows are short hardly
beyond the inputs themselves. Forward and backward, one thread, fused and padded against tiles: 30
to 20 ms for 8 x 8 heads of 48 and 32 and 256 tokens, 52 to 39 ms for half of them and 512 tokens,
205 to 98 ms for 2 x 8 heads of 192 and 128; at 1,024 tokens the fused one is faster.

Where a rank holds only a part of the sequence (parallel/context.py), its queries stand at other
positions than the first keys, and torch's fused attention knows no such mask. Here tiles of rows
attend one after the other, each to the keys it can see, with a mask that is a window on one small
buffer: memory stays linear in S.

B batch, S sequence (of queries), K sequence of keys, N heads, H head size of q and k, W head size
of v.
"""

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
SHORT_TOKENS = 512
"""Longest sequence whose attention weights are kept, in fp32 on a CPU: 0.5 MiB a head."""
SHORT_TILE_TOKENS = 64
"""Its queries that are multiplied with the same keys."""


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
    if _is_short(q_BNSH):
        _check_value_size(v_BNSW, head_size=q_BNSH.shape[-1])
        return _ShortAttention.apply(q_BNSH, k_BNSH, v_BNSW, scale)  # type: ignore[no-any-return]  apply is untyped
    v_BNSH = _padded(v_BNSW, head_size=q_BNSH.shape[-1])
    out_BNSH = F.scaled_dot_product_attention(q_BNSH, k_BNSH, v_BNSH, is_causal=True, scale=scale)
    return out_BNSH[..., : v_BNSW.shape[-1]]


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
    if first == 0:
        k_BNSH, v_BNSW = k_BNKH[..., :num_queries, :], v_BNKW[..., :num_queries, :]
        return causal_attention(q_BNSH, k_BNSH, v_BNSW, scale=scale)
    v_BNKH = _padded(v_BNKW, head_size=q_BNSH.shape[-1])
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


def _padded(v_BNSW: Tensor, *, head_size: int) -> Tensor:
    """Return values with zeros up to the head size of the queries."""
    _check_value_size(v_BNSW, head_size=head_size)
    surplus = head_size - v_BNSW.shape[-1]
    return F.pad(v_BNSW, (0, surplus)) if surplus else v_BNSW


def _check_value_size(v_BNSW: Tensor, *, head_size: int) -> None:
    value_size = v_BNSW.shape[-1]
    if value_size > head_size:
        raise ValueError(
            f"value heads of {value_size} given, at most the query head size {head_size} is"
            " allowed: lower model.v_head_size or raise model.qk_nope_head_size"
        )


def _is_short(q_BNSH: Tensor) -> bool:
    fits = q_BNSH.dtype == torch.float32 and q_BNSH.device.type == "cpu"
    return fits and q_BNSH.shape[-2] <= SHORT_TOKENS


class _ShortAttention(torch.autograd.Function):
    """P v with P = softmax(q k^T scale + causal mask), and its gradient, tile by tile of queries.

    dv = P^T do; with dP = do v^T, dS = P (dP - rowsum(P dP)); dq = dS k scale, dk = dS^T q scale.
    Batch and heads are one dim G. Products read queries, keys and values where they lie; results
    are written in the order [S, G, ...] in which MLA has made its inputs and wants its outputs.
    """

    @staticmethod
    def forward(ctx: Any, q_BNSH: Tensor, k_BNSH: Tensor, v_BNSW: Tensor, scale: float) -> Tensor:
        q, k, v = (tensor.flatten(0, 1) for tensor in (q_BNSH, k_BNSH, v_BNSW))
        num_tokens = q.shape[1]
        out = _sequence_first(v)
        future_TT = q.new_full((SHORT_TILE_TOKENS, SHORT_TILE_TOKENS), float("-inf")).triu_(1)
        tiles: list[Tensor] = []  # weights [G, T, keys up to the tile's last row]
        for start in range(0, num_tokens, SHORT_TILE_TOKENS):
            stop = min(start + SHORT_TILE_TOKENS, num_tokens)
            weights = q.new_empty(len(q), stop - start, stop)
            keys = k[:, :stop].mT
            torch.baddbmm(weights, q[:, start:stop], keys, beta=0, alpha=scale, out=weights)
            _softmax_(weights, future_TT[: stop - start, : stop - start])
            out[:, start:stop] = weights @ v[:, :stop]
            tiles.append(weights)
        ctx.scale = scale
        ctx.shapes = (q_BNSH.shape, k_BNSH.shape, v_BNSW.shape)
        ctx.save_for_backward(q, k, v, *tiles)
        return out.view_as(v_BNSW)

    @staticmethod
    @once_differentiable  # an untyped decorator, hence the silenced rule
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, *tiles = ctx.saved_tensors
        dout = grad_outputs[0].flatten(0, 1)
        dq, dk, dv = (_sequence_first(tensor) for tensor in (q, k, v))
        stop = q.shape[1]
        for weights in reversed(tiles):  # the last tile sees every key: it writes, others add
            start = stop - weights.shape[1]
            d = dout[:, start:stop]
            dscores = d @ v[:, :stop].mT
            _softmax_backward_(dscores, weights, scale=ctx.scale)
            dq[:, start:stop] = dscores @ k[:, :stop]
            for whole, part in ((dk, dscores.mT @ q[:, start:stop]), (dv, weights.mT @ d)):
                if stop == whole.shape[1]:
                    whole.copy_(part)
                else:
                    whole[:, :stop] += part
            stop = start
        shape_q, shape_k, shape_v = ctx.shapes
        return dq.view(shape_q), dk.view(shape_k), dv.view(shape_v), None


def _softmax_(scores_GTK: Tensor, future_TT: Tensor) -> None:
    """Make scores of a causal attention's last rows weights, in place."""
    if native.computes(scores_GTK):
        native.call("causal_softmax", scores_GTK, *scores_GTK.shape)
        return
    scores_GTK[:, :, -len(future_TT) :] += future_TT
    torch.softmax(scores_GTK, -1, out=scores_GTK)


def _softmax_backward_(dweights_GTK: Tensor, weights_GTK: Tensor, *, scale: float) -> None:
    """Make the gradient of weights that of the products that became scores, in place."""
    if native.computes(weights_GTK):
        shape = weights_GTK.shape
        native.call("causal_softmax_backward", weights_GTK, dweights_GTK, *shape, scale)
        return
    torch.ops.aten._softmax_backward_data.out(
        dweights_GTK, weights_GTK, -1, dweights_GTK.dtype, grad_input=dweights_GTK
    )
    dweights_GTK *= scale


def _sequence_first(like_GSH: Tensor) -> Tensor:
    """Return an empty `[G, S, H]` that lies in memory as `[S, G, H]`."""
    return like_GSH.new_empty(like_GSH.transpose(0, 1).shape).transpose(0, 1)


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
