"""How is causal attention computed when values are narrower than queries and keys, as in MLA?

In A.X K1 a query and a key have 128 + 64 = 192 components and a value 128. torch's fused attention
takes heads of one size only and otherwise falls back, without a word, to materialised [S, S]
scores: memory grows with S^2. Padding the values with zeros to 192 keeps the fused path, memory
linear in S; its extra columns are zeros and are cut off. Time on two CPU cores, fused and padded
against the fall-back, forward and backward: 23 to 27 ms for heads of 48 and 32 (8 x 8 heads, 256
tokens), 65 to 60 ms for 192 and 128 (2 x 8 heads, 512 tokens).

B batch, S sequence, N heads, H head size of q and k, W head size of v.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


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
    head_size, value_size = q_BNSH.shape[-1], v_BNSW.shape[-1]
    if value_size > head_size:
        raise ValueError(
            f"value heads of {value_size} given, at most the query head size {head_size} is"
            " allowed: lower model.v_head_size or raise model.qk_nope_head_size"
        )
    if value_size == head_size:
        return F.scaled_dot_product_attention(q_BNSH, k_BNSH, v_BNSW, is_causal=True, scale=scale)
    v_BNSH = F.pad(v_BNSW, (0, head_size - value_size))
    out_BNSH = F.scaled_dot_product_attention(q_BNSH, k_BNSH, v_BNSH, is_causal=True, scale=scale)
    return out_BNSH[..., :value_size]


def causal_attention_reference(
    q_BNSH: Tensor, k_BNSH: Tensor, v_BNSW: Tensor, *, scale: float
) -> Tensor:
    """Return the same as `causal_attention`, scores written out and the softmax in fp32."""
    sequence = q_BNSH.shape[-2]
    scores_BNSS = (q_BNSH @ k_BNSH.transpose(-1, -2)).float() * scale
    future_SS = torch.ones(sequence, sequence, dtype=torch.bool, device=q_BNSH.device).triu(1)
    weights_BNSS = scores_BNSS.masked_fill(future_SS, float("-inf")).softmax(-1).to(v_BNSW.dtype)
    return weights_BNSS @ v_BNSW
