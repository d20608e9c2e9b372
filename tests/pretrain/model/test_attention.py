"""Core attention in megatron's order of dimensions, on one rank and on context ranks."""

from types import SimpleNamespace

import torch
from torch import Tensor

from kernels.attention import causal_attention_reference
from parallel import groups
from parallel.context import positions
from parallel.layout import Layout
from parallel.spawn import RankPool
from pretrain.model.attention import CoreAttention

S, B, N, H, W = 12, 2, 3, 8, 5


def core(*, context_ranks: int = 1) -> CoreAttention:
    config = SimpleNamespace(context_parallel_size=context_ranks)
    return CoreAttention(config, softmax_scale=0.2, layer_number=1, attention_type="self")


def drawn() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(S, B, N, size, generator=generator) for size in (H, H, W)]


def test_sequence_first_tensors_give_heads_side_by_side() -> None:
    q, k, v = drawn()
    out = core()(q, k, v, None, attn_mask_type="causal")
    assert out.shape == (S, B, N * W)
    for b in range(B):
        for n in range(N):
            alone = (t[:, b, n][None, None] for t in (q, k, v))
            expected = causal_attention_reference(*alone, scale=0.2)[0, 0]
            torch.testing.assert_close(out[:, b, n * W : (n + 1) * W], expected)


def on_context_rank() -> Tensor:
    """On a rank: the output for its tokens of one drawn sequence."""
    groups.start_groups(Layout(num_ranks=2, cp=2))
    rank = groups.context_group().rank()
    own = [t[positions(S, rank=rank, num_ranks=2)] for t in drawn()]
    return core(context_ranks=2)(*own, None)


def test_each_context_rank_gives_its_tokens_of_the_whole(two_ranks: RankPool) -> None:
    expected = core()(*drawn(), None)
    for rank, out in enumerate(two_ranks.run(on_context_rank)):
        own = positions(S, rank=rank, num_ranks=2)
        torch.testing.assert_close(out, expected[own], rtol=1e-5, atol=1e-6)
