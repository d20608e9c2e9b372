"""How is attention computed where a window holds several documents, each seen by its own tokens?

One document after the other, by the causal attention of kernels/attention.py: no mask is made, so
memory is linear in S, and a token pays for the keys of its own document only. A window of one
document costs what causal attention costs.

B batch, S sequence (of queries), K sequence of keys, N heads, H head size of q and k, W head size
of v.
"""

from itertools import accumulate

import torch
from torch import Tensor

from kernels.attention import causal_attention_from


def document_attention(
    q_BNSH: Tensor,
    k_BNKH: Tensor,
    v_BNKW: Tensor,
    *,
    documents_BK: Tensor,
    first: int,
    scale: float,
) -> Tensor:
    """Return the attention of queries to the keys of their own document, up to themselves.

    Args:
        q_BNSH: `[B, N, S, H]` fp32 or bf16, at positions first to first + S - 1.
        k_BNKH: `[B, N, K, H]`, at positions 0 to K - 1; those after the queries are not read.
        v_BNKW: `[B, N, K, W]` with W <= H.
        documents_BK: `[B, K]` integers, the document of each key, rising from 0 in steps of 1.
        first: position of the first query, 0 <= first <= K - S; 0 with S = K: whole sequences.
        scale: factor on the scores; A.X K1: 192 ** -0.5.

    Returns:
        `[B, N, S, W]`.

    Raises:
        ValueError: if W > H, if the keys end before the queries, or if the documents are of
            another shape or do not rise from 0 in steps of 1.

    The host waits for the device, to learn where documents begin.

    Source: docs/decisions/0018.
    """
    num_queries, num_keys = q_BNSH.shape[-2], k_BNKH.shape[-2]
    if not 0 <= first <= num_keys - num_queries:
        raise ValueError(
            f"{num_queries} queries from position {first} and {num_keys} keys given; 0 to"
            f" {num_keys - num_queries} is allowed for the first position"
        )
    if documents_BK.shape != (len(k_BNKH), num_keys):
        raise ValueError(
            f"documents of shape {list(documents_BK.shape)} given, [{len(k_BNKH)}, {num_keys}] is"
            " allowed: one number for each key"
        )
    rows_B = zip(
        *(whole.chunk(len(q_BNSH)) for whole in (q_BNSH, k_BNKH, v_BNKW)),
        documents_BK.unbind(),
        strict=True,
    )
    return torch.cat(
        [
            _one_sequence(q, k, v, lengths=_lengths(numbers), first=first, scale=scale)
            for q, k, v, numbers in rows_B
        ]
    )


def _one_sequence(
    q_1NSH: Tensor, k_1NKH: Tensor, v_1NKW: Tensor, *, lengths: list[int], first: int, scale: float
) -> Tensor:
    """Return `[1, N, S, W]`; `lengths` are those of the documents of the keys, in order."""
    stop = first + q_1NSH.shape[-2]
    ends = list(accumulate(lengths))
    inside = [(end - size, min(end, stop)) for end, size in zip(ends, lengths, strict=True)]
    inside = [(begin, end) for begin, end in inside if end > first and begin < stop]
    # One split for all documents: the backward pass of a slice fills the whole sequence with zeros.
    sizes_q = [end - max(begin, first) for begin, end in inside]
    sizes_k = [end - begin for begin, end in inside]
    seen = slice(inside[0][0], stop)
    parts = zip(
        q_1NSH.split_with_sizes(sizes_q, dim=-2),
        k_1NKH[..., seen, :].split_with_sizes(sizes_k, dim=-2),
        v_1NKW[..., seen, :].split_with_sizes(sizes_k, dim=-2),
        strict=True,
    )
    outs_1NTW = [
        causal_attention_from(q, k, v, first=k.shape[-2] - q.shape[-2], scale=scale)
        for q, k, v in parts
    ]
    return torch.cat(outs_1NTW, dim=-2)


def _lengths(documents_K: Tensor) -> list[int]:
    """Return the tokens of each document of a sequence, in order."""
    steps = documents_K.diff()
    rises = (documents_K[0] == 0) & ((steps == 0) | (steps == 1)).all()
    if not bool(rises):  # the host waits for the device
        raise ValueError(
            f"documents {documents_K} given; numbers that rise from 0 in steps of 1 are allowed"
        )
    return [int(size) for size in torch.bincount(documents_K).cpu()]


def document_attention_reference(
    q_BNSH: Tensor,
    k_BNKH: Tensor,
    v_BNKW: Tensor,
    *,
    documents_BK: Tensor,
    first: int,
    scale: float,
) -> Tensor:
    """Return the same as `document_attention`, scores written out and the softmax in fp32."""
    num_queries, num_keys = q_BNSH.shape[-2], k_BNKH.shape[-2]
    keys_K = torch.arange(num_keys, device=q_BNSH.device)
    own_S = keys_K[first : first + num_queries]
    foreign_BSK = documents_BK[:, own_S, None] != documents_BK[:, None, :]
    hidden_BSK = foreign_BSK | (keys_K > own_S[:, None])
    scores_BNSK = (q_BNSH @ k_BNKH.transpose(-1, -2)).float() * scale
    scores_BNSK = scores_BNSK.masked_fill(hidden_BSK[:, None], float("-inf"))
    return scores_BNSK.softmax(-1).to(v_BNKW.dtype) @ v_BNKW
