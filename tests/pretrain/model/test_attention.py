"""Core attention in megatron's order of dimensions, and what it refuses."""

from types import SimpleNamespace

import pytest
import torch

from kernels.attention import causal_attention_reference
from pretrain.model.attention import CoreAttention


def core(*, context_ranks: int = 1) -> CoreAttention:
    config = SimpleNamespace(context_parallel_size=context_ranks)
    return CoreAttention(config, softmax_scale=0.2, layer_number=1, attention_type="self")


def test_sequence_first_tensors_give_heads_side_by_side() -> None:
    S, B, N, H, W = 7, 2, 3, 8, 5
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(S, B, N, size, generator=generator) for size in (H, H, W))
    out = core()(q, k, v, None, attn_mask_type="causal")
    assert out.shape == (S, B, N * W)
    for b in range(B):
        for n in range(N):
            alone = (t[:, b, n][None, None] for t in (q, k, v))
            expected = causal_attention_reference(*alone, scale=0.2)[0, 0]
            torch.testing.assert_close(out[:, b, n * W : (n + 1) * W], expected)


def test_context_ranks_are_refused_by_key() -> None:
    with pytest.raises(ValueError, match=r"layout\.cp=2 given.*only layout\.cp=1"):
        core(context_ranks=2)
