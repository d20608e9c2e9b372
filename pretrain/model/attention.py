"""Core attention for MLA on machines without Transformer Engine.

megatron's local DotProductAttention does not take MLA's head sizes (`k_channels`, `v_channels`) and
asserts against context parallelism. The projections, the latents, the rotary embedding and the
tensor-parallel cuts stay megatron's MLASelfAttention.

S sequence, B batch, N local heads, H query and key head, W value head.
"""

from typing import Any

import torch
from torch import Tensor

from kernels.attention import causal_attention


class CoreAttention(torch.nn.Module):
    """softmax(q k^T scale) v with a causal mask, on this rank's heads.

    Source: transformers 5.23 AXK1Attention.
    """

    def __init__(self, config: Any, softmax_scale: float, **_megatron: object) -> None:
        """Keep the scale; everything else megatron passes is not needed here.

        Args:
            config: megatron's transformer config.
            softmax_scale: factor on the scores, YaRN's mscale included.
            _megatron: layer number, mask type and the like.

        Raises:
            ValueError: with context parallelism, which needs Transformer Engine.
        """
        super().__init__()
        if config.context_parallel_size > 1:
            raise ValueError(
                f"layout.cp={config.context_parallel_size} given, but without Transformer Engine"
                f" only layout.cp=1 is"
                " allowed: the K/V exchange between context ranks is not built for the CPU yet"
            )
        self.scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **_megatron: object,
    ) -> Tensor:
        """Return the attention output.

        Args:
            query: `[S, B, N, H]`.
            key: `[S, B, N, H]`.
            value: `[S, B, N, W]`.
            attention_mask: must be None; the mask is causal.
            _megatron: mask type and packing, fixed here.

        Returns:
            `[S, B, N * W]`.
        """
        assert attention_mask is None, "the mask is causal by construction"
        q_BNSH, k_BNSH, v_BNSW = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        out_BNSW = causal_attention(q_BNSH, k_BNSH, v_BNSW, scale=self.scale)
        return out_BNSW.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1)
