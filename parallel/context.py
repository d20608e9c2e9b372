# pyright: basic
# (megatron-core and torch.distributed are loosely typed; strict mode would check them, not us)
"""Which tokens of a sequence does a context rank hold, and how does it see the others?

The zigzag of megatron and Transformer Engine: a sequence is cut into 2 R chunks, and rank r of R
holds chunks r and 2R - 1 - r, so that causal attention costs every rank the same. Whatever is
computed token by token needs nothing else; attention gathers the keys and values of the other
ranks, and MTP, which looks one token ahead, the first token of each chunk.

S tokens of a whole sequence, R context ranks, C tokens of a chunk (S / 2R), B batch.
"""

from typing import Any

import torch
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import YarnRotaryEmbedding
from megatron.core.models.gpt import gpt_model
from megatron.core.transformer import multi_token_prediction
from torch import Tensor

_megatrons_roll = multi_token_prediction.roll_tensor
_megatrons_cos_sin = YarnRotaryEmbedding.get_cached_cos_sin


def chunk_starts(num_tokens: int, *, rank: int, num_ranks: int) -> tuple[int, int]:
    """Return the first positions of a rank's two chunks.

    Args:
        num_tokens: S, of the whole sequence.
        rank: r, 0 <= r < num_ranks.
        num_ranks: R.

    Raises:
        ValueError: if 2 R does not divide S.
    """
    if num_tokens % (2 * num_ranks):
        raise ValueError(
            f"a sequence of {num_tokens} tokens given, but 2 * layout.cp = {2 * num_ranks} must"
            " divide it: change window_tokens of the stage or layout.cp"
        )
    chunk = num_tokens // (2 * num_ranks)
    return rank * chunk, (2 * num_ranks - 1 - rank) * chunk


def positions(num_tokens: int, *, rank: int, num_ranks: int) -> Tensor:
    """Return where in the sequence a rank's tokens stand, `[S / R]` int64, ascending.

    Args:
        num_tokens: S, of the whole sequence.
        rank: r, 0 <= r < num_ranks.
        num_ranks: R.

    Raises:
        ValueError: if 2 R does not divide S.
    """
    return cut(torch.arange(num_tokens)[None], rank=rank, num_ranks=num_ranks)[0]


def cut(whole_BS: Tensor, *, rank: int, num_ranks: int) -> Tensor:
    """Return a rank's tokens of whole sequences, `[B, S / R]`; of one rank, the same tensor.

    Args:
        whole_BS: `[B, S]`.
        rank: r, 0 <= r < num_ranks.
        num_ranks: R.

    Raises:
        ValueError: if 2 R does not divide S.
    """
    if num_ranks == 1:
        return whole_BS
    chunk = whole_BS.shape[1] // (2 * num_ranks)
    starts = chunk_starts(whole_BS.shape[1], rank=rank, num_ranks=num_ranks)
    return torch.cat([whole_BS[:, start : start + chunk] for start in starts], dim=1)


def join(parts_RS: Tensor) -> Tensor:
    """Return whole sequences `[S, ...]` from all ranks' tokens, the inverse of the zigzag.

    Args:
        parts_RS: `[R, S / R, ...]`, by rank.
    """
    first_RC, second_RC = parts_RS.chunk(2, dim=1)
    return torch.cat([first_RC, second_RC.flip(0)]).flatten(0, 1)


def split(whole_S: Tensor, *, num_ranks: int) -> Tensor:
    """Return all ranks' tokens `[R, S / R, ...]` of a sequence `[S, ...]`, by rank."""
    first_RC, second_RC = whole_S.unflatten(0, (2 * num_ranks, -1)).chunk(2)
    return torch.cat([first_RC, second_RC.flip(0)], dim=1)


class _Gather(torch.autograd.Function):
    """All ranks' tokens in order; the gradient of each comes back as a sum over the ranks."""

    @staticmethod
    def forward(ctx: Any, own_S: Tensor, group: Any) -> Tensor:
        ctx.group = group
        parts_RS = own_S.new_empty(group.size(), *own_S.shape)
        torch.distributed.all_gather_into_tensor(
            parts_RS.flatten(0, 1), own_S.contiguous(), group=group
        )
        return join(parts_RS)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        (whole_S,) = gradients
        parts_RS = split(whole_S, num_ranks=ctx.group.size())
        own_S = torch.empty_like(parts_RS[0])
        torch.distributed.reduce_scatter_tensor(own_S, parts_RS.flatten(0, 1), group=ctx.group)
        return own_S, None


def gather_sequence(own_S: Tensor, *, group: Any) -> Tensor:
    """Return the whole sequence of which each rank holds its zigzag part.

    Args:
        own_S: `[S / R, ...]`, this rank's tokens.
        group: the context group.

    Returns:
        `[S, ...]`, the same on every rank. In the backward pass each rank gets the sum over all
        ranks of the gradients of its tokens.

    Collective: every rank of the context group calls it, forward and backward.
    """
    return _Gather.apply(own_S, group)


def roll_left(
    own: Tensor,
    shifts: int = -1,
    dims: int = -1,
    cp_group: Any = None,
    packed_seq_params: Any = None,
) -> tuple[Tensor, Tensor]:
    """Return each token's successor in the sequence (0 after the last), and the sum of all.

    In place of megatron's roll_tensor, whose words it takes. That one sums this rank's tokens
    only, although rank 0 has one successor less than the others: the mean MTP loss of the ranks,
    and without `calculate_per_token_loss` its gradient, is then no mean over tokens. It also sends
    on the group of all ranks instead of the context group (Megatron-LM #6746).

    Args:
        own: `[..., S / R]`, this rank's tokens.
        shifts: -1.
        dims: -1.
        cp_group: the context group; None or of one rank: megatron's own function.
        packed_seq_params: None; several sequences in one are not ours.

    Returns:
        The successors, `[..., S / R]`, and their sum over all context ranks divided by R, so that
        a sum on this rank divided by it is this rank's share of the mean times R.

    Collective: every rank of the context group calls it.

    Source: docs/decisions/0014.
    """
    if cp_group is None or cp_group.size() == 1:
        return _megatrons_roll(own, shifts, dims, cp_group, packed_seq_params)
    assert packed_seq_params is None, "sequences are not packed"
    assert shifts == -1
    assert dims in (-1, own.dim() - 1)
    rank, num_ranks = cp_group.rank(), cp_group.size()
    chunks = [chunk.movedim(-1, 0) for chunk in own.chunk(2, dim=-1)]
    message = torch.cat([*(chunk[0].flatten() for chunk in chunks), own.sum(dtype=own.dtype)[None]])
    sent_R = message.new_empty(num_ranks, message.numel())
    torch.distributed.all_gather_into_tensor(sent_R.flatten(), message, group=cp_group)
    heads = join(sent_R[:, :-1].unflatten(1, (2, -1)))  # by chunk of the sequence
    heads = torch.cat([heads, torch.zeros_like(heads[:1])])
    rolled = [
        torch.cat([chunk[1:], heads[number + 1].view_as(chunk[:1])])
        for chunk, number in zip(chunks, (rank, 2 * num_ranks - 1 - rank), strict=True)
    ]
    total = sent_R[:, -1].sum() - heads[0].sum()
    return torch.cat(rolled).movedim(0, -1).contiguous(), total / num_ranks


def yarn_cos_sin(
    rotary: Any,
    seq_len: int,
    offset: int = 0,
    dtype: torch.dtype = torch.float32,
    packed_seq: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return YaRN's cosines and sines at the positions of this rank's tokens.

    In place of the method of megatron's class, which serves the fused rotation on a GPU. That one
    keeps this rank's zigzag part of the longest sequence so far, the original context at first,
    and takes the beginning of it for a shorter one: wrong positions for every context rank.

    Args:
        rotary: megatron's module.
        seq_len: S, of the whole sequence.
        offset: 0.
        dtype: of what is returned.
        packed_seq: False; several sequences in one are not ours.

    Returns:
        `[S / R, 1, 1, H]` each.

    Source: docs/decisions/0014.
    """
    in_parts = rotary.cp_group is not None and rotary.cp_group.size() > 1
    if in_parts and seq_len != rotary.max_seq_len_cached:
        rotary._set_cos_sin_cache(seq_len, offset, dtype, packed_seq)
    return _megatrons_cos_sin(rotary, seq_len, offset, dtype, packed_seq)


def put_right_megatron() -> None:
    """Let megatron use `roll_left` and `yarn_cos_sin`, on any device; doing it again is nothing.

    gpt_model.py:626 and multi_token_prediction.py:705 know the roll by name;
    multi_latent_attention.py asks the YaRN module.
    """
    gpt_model.roll_tensor = roll_left
    multi_token_prediction.roll_tensor = roll_left
    YarnRotaryEmbedding.get_cached_cos_sin = yarn_cos_sin  # type: ignore[method-assign,assignment]  see the docstring
