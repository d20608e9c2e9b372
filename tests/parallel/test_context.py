"""The zigzag split, and what context ranks exchange: against whole sequences in one piece."""

import pytest
import torch
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import YarnRotaryEmbedding
from megatron.core.transformer import multi_token_prediction
from torch import Tensor

from parallel import context, groups
from parallel.context import chunk_starts, cut, gather_sequence, join, positions, split
from parallel.layout import Layout
from parallel.spawn import RankPool

CONTEXT = Layout(num_ranks=2, cp=2)
B, S = 3, 12


def whole_sequences() -> Tensor:
    return torch.arange(1.0, 1 + B * S).view(B, S)


# --- the split ------------------------------------------------------------------------------------


def test_ranks_hold_the_chunks_that_transformer_engine_gives_them() -> None:
    assert chunk_starts(16, rank=0, num_ranks=4) == (0, 14)
    assert chunk_starts(16, rank=3, num_ranks=4) == (6, 8)
    assert positions(16, rank=1, num_ranks=4).tolist() == [2, 3, 12, 13]
    assert positions(5, rank=0, num_ranks=1).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("chunk", [1, 3])
def test_every_token_has_one_rank_and_join_puts_it_back(num_ranks: int, chunk: int) -> None:
    sequence = torch.arange(2 * num_ranks * chunk)
    parts = [
        cut(sequence[None].expand(2, -1), rank=rank, num_ranks=num_ranks)
        for rank in range(num_ranks)
    ]
    assert torch.cat([part[0] for part in parts]).unique().tolist() == sequence.tolist()
    assert join(torch.stack([part[1] for part in parts])).tolist() == sequence.tolist()
    assert split(sequence, num_ranks=num_ranks).tolist() == [part[0].tolist() for part in parts]


def test_every_rank_has_the_same_work() -> None:
    pairs = [(positions(24, rank=rank, num_ranks=3) + 1).sum() for rank in range(3)]
    assert len({int(number) for number in pairs}) == 1


def test_a_sequence_that_cannot_be_cut_is_refused_by_key() -> None:
    with pytest.raises(ValueError, match=r"10 tokens.*layout\.cp = 4.*window_tokens"):
        cut(torch.zeros(1, 10), rank=0, num_ranks=2)


# --- the exchange ---------------------------------------------------------------------------------


def gathered() -> tuple[Tensor, Tensor]:
    """On a rank: the whole sequence, and the gradient of its own tokens."""
    groups.start_groups(CONTEXT)
    group = groups.context_group()
    own_SB = cut(whole_sequences(), rank=group.rank(), num_ranks=2).t().clone().requires_grad_()
    whole_SB = gather_sequence(own_SB, group=group)
    # Each rank weighs tokens its own way; the gradient of a token is the sum of both weights.
    (whole_SB * (group.rank() + 1) * torch.arange(S)[:, None]).sum().backward()
    assert own_SB.grad is not None
    return whole_SB.detach(), own_SB.grad


def test_gathering_gives_the_whole_and_gradients_come_back_as_sums(two_ranks: RankPool) -> None:
    for rank, (whole_SB, gradient_SB) in enumerate(two_ranks.run(gathered)):
        assert whole_SB.tolist() == whole_sequences().t().tolist()
        expected_S = 3 * positions(S, rank=rank, num_ranks=2)
        assert gradient_SB.tolist() == expected_S[:, None].expand(-1, B).tolist()


# --- what megatron gets wrong ---------------------------------------------------------------------


def rolled(*, stock: bool, whole: Tensor) -> tuple[Tensor, float]:
    """On a rank: its tokens' successors, and megatron's number of them."""
    groups.start_groups(CONTEXT)
    group = groups.context_group()
    roll = context._megatrons_roll if stock else context.roll_left
    own = cut(whole, rank=group.rank(), num_ranks=2)
    successors, number = roll(own, shifts=-1, dims=-1, cp_group=group)
    return successors, float(number)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_the_successor_of_a_token_is_found_on_the_other_rank(
    dtype: torch.dtype, two_ranks: RankPool
) -> None:
    whole = whole_sequences().to(dtype)
    expected, total = context.roll_left(whole)
    for rank, (successors, number) in enumerate(two_ranks.run(rolled, stock=False, whole=whole)):
        assert successors.dtype == dtype
        assert successors.tolist() == cut(expected, rank=rank, num_ranks=2).tolist()
        assert number == float(total) / 2


def test_the_mtp_loss_is_a_mean_over_tokens_which_stock_megatron_forgets(
    two_ranks: RankPool,
) -> None:
    """Loss 1 on the first rank's tokens, 2 on the other's; the mean over tokens has no ranks."""
    mask = torch.ones(1, S)
    num_tokens = S - 1  # the last has no successor; rank 0 holds it
    expected = (1.0 * (S / 2 - 1) + 2.0 * S / 2) / num_tokens

    def mean_over_ranks(stock: bool) -> float:
        results = two_ranks.run(rolled, stock=stock, whole=mask)
        return sum((r + 1) * float(own.sum()) / n for r, (own, n) in enumerate(results)) / 2

    assert mean_over_ranks(stock=False) == pytest.approx(expected, rel=1e-6)
    assert mean_over_ranks(stock=True) == pytest.approx(1.5)  # a mean of means
    assert abs(1.5 - expected) > 0.04


def rotary_of(lengths: tuple[int, ...], *, stock: bool) -> list[bool]:
    """On a rank: whether YaRN's cosines for sequences of `lengths` are those of its positions."""
    groups.start_groups(CONTEXT)
    group = groups.context_group()
    rotary = YarnRotaryEmbedding(
        8, scaling_factor=4.0, original_max_position_embeddings=64, cp_group=group
    )
    cos_sin = context._megatrons_cos_sin if stock else context.yarn_cos_sin
    whole, scale = rotary.get_emb(256)
    return [
        torch.equal(
            cos_sin(rotary, length, dtype=torch.float32)[0],
            whole[positions(length, rank=group.rank(), num_ranks=2)].cos() * scale,
        )
        for length in lengths
    ]


def test_cached_rotary_positions_are_those_of_the_sequence_which_stock_megatron_forgets(
    two_ranks: RankPool,
) -> None:
    lengths = (64, 16, 128, 32)
    assert two_ranks.run(rotary_of, lengths, stock=False) == [[True] * 4] * 2
    assert two_ranks.run(rotary_of, lengths, stock=True) == [[True, False, True, False]] * 2


def test_megatron_is_put_right_once() -> None:
    context.put_right_megatron()
    context.put_right_megatron()
    assert multi_token_prediction.roll_tensor is context.roll_left
    assert context._megatrons_roll is not context.roll_left
