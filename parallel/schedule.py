# pyright: basic
# (megatron-core and torch.distributed are loosely typed; strict mode would check them, not us)
"""How does one global batch run through the pipeline?

megatron-core's schedules do it: no pipeline, 1F1B, or interleaved. This file only says what one of
our micro-batches is and how its loss is counted: as a sum over tokens, divided once by all tokens
of the global batch (`calculate_per_token_loss`), so that the number of micro-batches and replicas
never changes the loss. It is also where context ranks take their part of each sequence; whoever
makes micro-batches makes whole ones.

Every stage of a pipeline reads the micro-batches itself, so each has the documents of the one that
it computes; they reach attention as megatron's `attention_mask` (pretrain/model/attention.py).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor
from torch.nn import functional as F

from parallel.context import cut
from parallel.device import prepare
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
    documents: Tensor | None = None
    """`[B, S]` int32, which document of its window each token is from, rising from 0 in steps of 1:
    tokens attend inside their own. None: each window is one document. Whoever gives them clears
    the loss mask at the last token of each document, whose label is from another."""


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

    Raises:
        ValueError: if documents are given where attention is Transformer Engine's.

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
    whole = next(batches)
    if whole.documents is not None and prepare().uses_transformer_engine:
        # It would read no mask and no documents, and attend to the whole window without a word.
        raise ValueError(
            "documents given, but attention inside documents is not available with Transformer"
            " Engine yet: set data.document_attention=false"
        )
    batch, position_ids, mtp_mask = _own_tokens(whole)
    output = chunk(
        batch.tokens,
        position_ids,
        whole.documents,  # of all keys, also of those that other context ranks hold
        labels=batch.labels,
        loss_mask=mtp_mask,  # megatron reads it for MTP alone
    )

    def sum_loss(token_loss: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        total = (token_loss.float() * batch.loss_mask).sum()
        num_tokens = batch.loss_mask.sum().to(torch.int)
        return total, num_tokens, {"kept": read_loss(batch, token_loss.detach())}

    return output, sum_loss


def _own_tokens(whole: MicroBatch) -> tuple[MicroBatch, Tensor, Tensor]:
    """Return this context rank's part of a micro-batch, its tokens' positions and MTP's mask."""
    positions = torch.arange(whole.tokens.shape[1], device=whole.tokens.device)
    rank, num_ranks = context_group().rank(), context_group().size()
    own = partial(cut, rank=rank, num_ranks=num_ranks)
    batch = replace(
        whole,
        tokens=own(whole.tokens),
        labels=own(whole.labels),
        loss_mask=own(whole.loss_mask),
        documents=None if whole.documents is None else own(whole.documents),
    )
    mtp_mask = mtp_loss_mask(whole.loss_mask, whole.documents)
    return batch, own(positions.expand_as(whole.tokens)), own(mtp_mask)


def mtp_loss_mask(loss_mask_BS: Tensor, documents_BS: Tensor | None) -> Tensor:
    """Return the loss mask that megatron is to roll once for MTP.

    At position i MTP reads the token i + 1 and predicts the token i + 2, which is the label of
    i + 1. megatron takes the mask of i + 1 for it. That says whether i + 1 and i + 2 are of one
    document, but not whether i is: the last token of a document would be asked for the second
    token of the next. So the mask is cleared at the first token of each document, and at the last,
    too, whatever the caller counts there. It is taken of whole sequences, before context ranks cut
    them.

    Args:
        loss_mask_BS: `[B, S]` fp32, of whole sequences.
        documents_BS: `[B, S]`; None: each window is one document, and the mask comes back.

    Returns:
        `[B, S]` fp32. Right for one MTP layer, the most that ModelSpec allows.

    Source: megatron-core 0.16.1, models/gpt/gpt_model.py:633; docs/decisions/0018.
    """
    if documents_BS is None:
        return loss_mask_BS
    crosses_BS = documents_BS[:, 1:] != documents_BS[:, :-1]  # between a token and the next
    is_edge_BS = F.pad(crosses_BS, (1, 0)) | F.pad(crosses_BS, (0, 1))
    return loss_mask_BS.masked_fill(is_edge_BS, 0.0)
