"""Core attention in megatron's order of dimensions, on one rank and on context ranks."""

from types import SimpleNamespace

import pytest
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


@pytest.mark.parametrize("context_ranks", [1, 2])
def test_a_mask_in_place_of_documents_is_not_taken_for_them(context_ranks: int) -> None:
    mask = torch.ones(1, 1, S, S, dtype=torch.bool).triu(1)
    with pytest.raises(AssertionError, match="documents, not a mask"):
        core(context_ranks=context_ranks)(*drawn(), mask)


def on_context_rank(documents: Tensor | None) -> Tensor:
    """On a rank: the output for its tokens of one drawn sequence."""
    groups.start_groups(Layout(num_ranks=2, cp=2))
    rank = groups.context_group().rank()
    own = [t[positions(S, rank=rank, num_ranks=2)] for t in drawn()]
    return core(context_ranks=2)(*own, documents)


def test_each_context_rank_gives_its_tokens_of_the_whole(two_ranks: RankPool) -> None:
    assert_parts_of(core()(*drawn(), None), two_ranks.run(on_context_rank, None))


def test_each_context_rank_sees_documents_that_begin_on_the_other(two_ranks: RankPool) -> None:
    """Rank 0 holds tokens 0 to 2 and 9 to 11; the sequences of the batch are cut elsewhere."""
    documents = torch.tensor([[0] * 4 + [1] * 7 + [2], [0, 1] + [2] * 10]).int()
    q, k, v = drawn()
    expected = core()(q, k, v, documents)
    alone = core()(q[4:11, :1], k[4:11, :1], v[4:11, :1], None)
    torch.testing.assert_close(expected[4:11, :1], alone)
    assert_parts_of(expected, two_ranks.run(on_context_rank, documents))


def assert_parts_of(whole: Tensor, outs: list[Tensor]) -> None:
    for rank, out in enumerate(outs):
        own = positions(S, rank=rank, num_ranks=2)
        torch.testing.assert_close(out, whole[own], rtol=1e-5, atol=1e-6)
