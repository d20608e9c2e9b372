# pyright: basic
# (megatron-core and torch.distributed are loosely typed; strict mode would check them, not us)
"""How does one global batch run through the pipeline?

megatron-core's schedules do it: no pipeline, 1F1B, or interleaved. This file only says what one of
our micro-batches
is and how its loss is counted: as a sum over tokens, divided once by all tokens of the global batch
(`calculate_per_token_loss`), so that the number of micro-batches and replicas never changes the
loss. It is also where context ranks take their part of each sequence; whoever makes micro-batches
makes whole ones.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from parallel.context import cut
from parallel.groups import context_group


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """What one forward pass reads."""

    tokens: Tensor
    """`[B, S]` int64, ids."""
    labels: Tensor
    """`[B, S]` int64, the next token at each position."""
    loss_mask: Tensor
    """`[B, S]` fp32, 1 where the token counts."""
    domain_idx: Tensor
    """`[B]` int64, which domain each sequence is from."""


ReadLoss = Callable[[MicroBatch, Tensor], Tensor]
"""(micro-batch, per-token loss `[B, S]`) -> what the caller wants to keep of it, a small tensor.
With context ranks both hold this rank's tokens only."""


def forward_backward(
    chunks: Sequence[torch.nn.Module],
    batches: Sequence[Iterator[MicroBatch]],
    *,
    num_microbatches: int,
    micro_batch_size: int,
    sequence_length: int,
    read_loss: ReadLoss,
    forward_only: bool = False,
) -> list[Tensor]:
    """Run one global batch through this rank's model chunks.

    Args:
        chunks: the model chunks of this rank (vp of them), in order.
        batches: one iterator over this replica's micro-batches, sequences whole, for each chunk.
        num_microbatches: micro-batches of this replica in the batch.
        micro_batch_size: sequences in each.
        sequence_length: tokens in each whole sequence.
        read_loss: what to keep of each micro-batch's token losses.
        forward_only: True for validation: no gradients.

    Returns:
        What `read_loss` returned for every micro-batch on the last stage, an empty list on the
        others.

    Collective: every rank calls it; gradients are reduced inside (finalize_model_grads).
    """
    results: Any = get_forward_backward_func()(
        forward_step_func=partial(_forward_step, read_loss=read_loss),
        data_iterator=list(batches) if len(chunks) > 1 else batches[0],
        model=list(chunks) if len(chunks) > 1 else chunks[0],
        num_microbatches=num_microbatches,
        seq_length=sequence_length,
        micro_batch_size=micro_batch_size,
        forward_only=forward_only,
    )
    return [result["kept"] for result in results]


def _forward_step(
    batches: Iterator[MicroBatch], chunk: torch.nn.Module, *, read_loss: ReadLoss
) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, dict[str, Tensor]]]]:
    batch, position_ids = _own_tokens(next(batches))
    output = chunk(batch.tokens, position_ids, None, labels=batch.labels, loss_mask=batch.loss_mask)

    def sum_loss(token_loss: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        total = (token_loss.float() * batch.loss_mask).sum()
        num_tokens = batch.loss_mask.sum().to(torch.int)
        return total, num_tokens, {"kept": read_loss(batch, token_loss.detach())}

    return output, sum_loss


def _own_tokens(whole: MicroBatch) -> tuple[MicroBatch, Tensor]:
    """Return this context rank's part of a micro-batch, and the positions of its tokens."""
    positions = torch.arange(whole.tokens.shape[1], device=whole.tokens.device)
    rank, num_ranks = context_group().rank(), context_group().size()
    tokens, labels, loss_mask, position_ids = (
        cut(tensor, rank=rank, num_ranks=num_ranks)
        for tensor in (
            whole.tokens,
            whole.labels,
            whole.loss_mask,
            positions.expand_as(whole.tokens),
        )
    )
    own = replace(whole, tokens=tokens, labels=labels, loss_mask=loss_mask)
    return own, position_ids
