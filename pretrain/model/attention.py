"""Core attention for MLA on machines without Transformer Engine.

megatron's local DotProductAttention does not take MLA's head sizes (`k_channels`, `v_channels`) and
asserts against context parallelism. The projections, the latents, the rotary embedding and the
tensor-parallel cuts stay megatron's MLASelfAttention.

Windows of several documents: what megatron passes as `attention_mask` from the model through every
block and layer, MTP's too, is here the document of each token. megatron keeps it with the other
inputs of whatever is computed twice, so a layer that is computed again sees the documents of its
own micro-batch, not of the last. Rotary positions stay those of the window: scores depend on the
difference of two positions, which is the same in a document alone.

S sequence (this rank's tokens of it), K all keys of the sequence, B batch, N local heads, H query
and key head, W value head.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels.attention import causal_attention_from
from kernels.document_attention import document_attention
from parallel import groups
from parallel.context import chunk_starts, gather_sequence


class CoreAttention(torch.nn.Module):
    """softmax(q k^T scale) v with a causal mask, inside documents, on this rank's heads.

    Source: transformers 5.23 AXK1Attention; documents: docs/decisions/0018.
    """

    def __init__(self, config: Any, softmax_scale: float, **_megatron: object) -> None:
        """Keep the scale and the context ranks; the rest of what megatron passes is not needed.

        Args:
            config: megatron's transformer config.
            softmax_scale: factor on the scores, YaRN's mscale included.
            _megatron: layer number, mask type and the like.
        """
        super().__init__()
        self.num_context_ranks = int(config.context_parallel_size)
        self.scale = softmax_scale
        self.watch: Callable[[Tensor, Tensor, Tensor | None, int], None] | None = None
        """Shown queries, keys, documents and first position of each pass (gauges.py)."""

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
            attention_mask: the document of each token of the whole sequence, `[B, K]` int32, rising
                from 0; None: one document. The mask is causal in both cases.
            _megatron: mask type and packing, fixed here.

        Returns:
            `[S, B, N * W]`.

        Raises:
            ValueError: see document_attention.

        Collective over the context axis, forward and backward, if it has several ranks.
        """
        documents_BK = attention_mask
        assert documents_BK is None or documents_BK.dtype == torch.int32, "documents, not a mask"
        if self.num_context_ranks > 1:
            out_BNSW = self._over_context_ranks(query, key, value, documents_BK)
        else:
            q_BNSH, k_BNSH, v_BNSW = (t.permute(1, 2, 0, 3) for t in (query, key, value))
            out_BNSW = self._attend(q_BNSH, k_BNSH, v_BNSW, documents_BK, first=0)
        return out_BNSW.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1)

    def _attend(
        self,
        q_BNSH: Tensor,
        k_BNKH: Tensor,
        v_BNKW: Tensor,
        documents_BK: Tensor | None,
        *,
        first: int,
    ) -> Tensor:
        """Return `[B, N, S, W]` of queries from position `first` on."""
        if self.watch is not None:
            self.watch(q_BNSH, k_BNKH, documents_BK, first)
        if documents_BK is None:
            return causal_attention_from(q_BNSH, k_BNKH, v_BNKW, first=first, scale=self.scale)
        return document_attention(
            q_BNSH, k_BNKH, v_BNKW, documents_BK=documents_BK, first=first, scale=self.scale
        )

    def _over_context_ranks(
        self, query: Tensor, key: Tensor, value: Tensor, documents_BK: Tensor | None
    ) -> Tensor:
        """Return `[B, N, S, W]`: each of this rank's two chunks against the keys before its end."""
        group = groups.context_group()
        own_SBNF = torch.cat([key, value], dim=-1)  # one exchange for both
        k_KBNH, v_KBNW = gather_sequence(own_SBNF, group=group).split(
            [key.shape[-1], value.shape[-1]], dim=-1
        )
        k_BNKH, v_BNKW = k_KBNH.permute(1, 2, 0, 3), v_KBNW.permute(1, 2, 0, 3)
        starts = chunk_starts(len(k_KBNH), rank=group.rank(), num_ranks=group.size())
        outs_BNSW = [
            self._attend(q_BNSH, k_BNKH, v_BNKW, documents_BK, first=first)
            for q_BNSH, first in zip(query.permute(1, 2, 0, 3).chunk(2, dim=2), starts, strict=True)
        ]
        return torch.cat(outs_BNSW, dim=2)
