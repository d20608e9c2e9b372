"""What happens in one training step?

Gradients of one global batch and their norm (`measure_step`), then the clip and the update
(`apply_step`): nothing else, and nothing of it knows where the batch came from or who watches.
Between the two nothing has moved that StepState (step_state.py) does not put back, so a step may
be taken again or left out.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from parallel.failpoints import failpoint
from parallel.gradients import apply_gradients, measure_gradients
from parallel.reduce import from_last_stage, max_over_data, sum_over_context, sum_over_data
from parallel.schedule import MicroBatch, forward_backward
from pretrain.model.router import batch_counters, counting_batch
from pretrain.training.model_failpoints import grow_first_moments
from pretrain.training.optimizer import set_lr, zero_gradients


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """What a step measured; the same on every rank."""

    loss: float
    """Nats per token, mean over the global batch, main model only."""
    gradient_norm: float
    """Global norm before the clip."""
    lr: float
    """Learning rate that it was taken with."""
    loss_max: float = math.nan
    """The largest loss of a replica's share of the batch."""
    sequence_sums: Tensor | None = field(default=None, compare=False, repr=False)
    """`[C, 2]` fp32, this rank's alone: losses and tokens of its replica's sequences in their
    order, with context ranks of its part of each; None on all stages but the last."""
    sequence_domains: Tensor | None = field(default=None, compare=False, repr=False)
    """`[C]` int64, the domain of each of these sequences; on every stage."""

    @property
    def is_finite(self) -> bool:
        """Whether loss and gradients are numbers; the same on every rank."""
        return math.isfinite(self.loss) and math.isfinite(self.gradient_norm)


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What becomes of a step that is measured and not applied; the same on every rank."""

    result: StepResult
    """What the step measures: as given, or of another pass over the same batch."""
    leave_out: str = ""
    """Why its batch is left out, for the ledger; "": it is applied."""


Judge = Callable[[Sequence[MicroBatch], StepResult], Verdict]
"""Looks at a measured step, and may compute it again (Trainer.measure); collective."""


def train_step(
    chunks: Sequence[torch.nn.Module],
    optimizer: Any,
    batches: Sequence[MicroBatch],
    *,
    lr: float,
    clip_norm: float,
) -> StepResult:
    """Train on one global batch: `measure_step`, then `apply_step`.

    Args:
        chunks: this rank's wrapped model chunks.
        optimizer: megatron's optimizer over them.
        batches: this replica's micro-batches, all of one shape `[B, S]`.
        lr: learning rate of this step.
        clip_norm: largest global gradient norm.

    Raises:
        NonFiniteGradientError: on every rank, before any weight has changed.

    Collective: every rank calls it.
    """
    result = measure_step(chunks, optimizer, batches, lr=lr)
    apply_step(optimizer, result, clip_norm=clip_norm)
    return result


def measure_step(
    chunks: Sequence[torch.nn.Module],
    optimizer: Any,
    batches: Sequence[MicroBatch],
    *,
    lr: float,
) -> StepResult:
    """Compute the reduced gradients of one global batch, its loss and their norm.

    Args:
        chunks: this rank's wrapped model chunks.
        optimizer: megatron's optimizer over them.
        batches: this replica's micro-batches, all of one shape `[B, S]`.
        lr: learning rate that the step would be applied with.

    Collective: every rank calls it, and gets the same result.
    """
    zero_gradients(chunks, optimizer)
    count_choices(chunks, batches)
    micro_batch_size, sequence_length = batches[0].tokens.shape
    kept = forward_backward(
        chunks,
        [iter(batches) for _ in chunks],
        num_microbatches=len(batches),
        micro_batch_size=micro_batch_size,
        sequence_length=sequence_length,
        read_loss=_sequence_sums,
    )
    sequence_sums = torch.cat(kept) if kept else None
    loss, loss_max = _loss_over_all(sequence_sums, batches[0].loss_mask.device)
    return StepResult(
        loss=loss,
        loss_max=loss_max,
        gradient_norm=measure_gradients(optimizer),
        lr=lr,
        sequence_sums=sequence_sums,
        sequence_domains=torch.cat([batch.domain_idx for batch in batches]),
    )


def apply_step(optimizer: Any, result: StepResult, *, clip_norm: float) -> None:
    """Clip the gradients that `measure_step` has left and update the weights.

    Args:
        optimizer: megatron's optimizer.
        result: what measure_step returned.
        clip_norm: largest global gradient norm.

    Raises:
        NonFiniteGradientError: on every rank, before any weight has changed.

    Collective: every rank calls it.
    """
    set_lr(optimizer, result.lr)
    failpoint("step.before_optimizer")
    apply_gradients(optimizer, norm=result.gradient_norm, clip_norm=clip_norm)
    if failpoint("step.after_optimizer") == "grow":
        grow_first_moments(optimizer)


def count_choices(chunks: Sequence[torch.nn.Module], batches: Sequence[MicroBatch]) -> None:
    """Route the global batch once for the losses that need its counts (`global_aux`).

    Costs a forward pass, about a third of a step; nothing with other losses.

    Args:
        chunks: this rank's wrapped model chunks.
        batches: this replica's micro-batches.

    Collective: every rank calls it.
    """
    routers = batch_counters(chunks)
    if not routers:
        return
    micro_batch_size, sequence_length = batches[0].tokens.shape
    for chunk in chunks:
        chunk.eval()  # the MTP loss of this pass is not a metric
    with counting_batch(routers), torch.no_grad():
        forward_backward(
            chunks,
            [iter(batches) for _ in chunks],
            num_microbatches=len(batches),
            micro_batch_size=micro_batch_size,
            sequence_length=sequence_length,
            read_loss=_sequence_sums,
            forward_only=True,
        )
    for chunk in chunks:
        chunk.train()


def _sequence_sums(batch: MicroBatch, token_loss_BS: Tensor) -> Tensor:
    loss_BS = token_loss_BS.float() * batch.loss_mask
    return torch.stack([loss_BS.sum(1), batch.loss_mask.sum(1)], dim=1)


def _loss_over_all(sums_C2: Tensor | None, device: torch.device) -> tuple[float, float]:
    """Return the loss of the global batch and the largest of a replica's; in fp64, collective."""
    told = torch.zeros(2, dtype=torch.float64, device=device)
    if sums_C2 is not None:
        own = sums_C2.sum(0, dtype=torch.float64)
        total, share = sum_over_data(own), sum_over_context(own)
        largest = max_over_data(share[0] / share[1].clamp_min(1))  # a share may count no token
        told = torch.stack([total[0] / total[1], largest])
    loss, loss_max = from_last_stage(told).tolist()
    return loss, loss_max


def micro_batches(
    tokens: Tensor,
    domain_idx: Tensor,
    *,
    micro_sequences: int,
    loss_mask: Tensor | None = None,
    documents: Tensor | None = None,
) -> Iterator[MicroBatch]:
    """Yield windows as micro-batches of inputs and labels.

    Args:
        tokens: `[C, S+1]` int64.
        domain_idx: `[C]` int64.
        micro_sequences: B; C is a multiple of it.
        loss_mask: `[C, S]` bool, which labels count; None: all.
        documents: `[C, S]` int32, see MicroBatch; None: each window is one document, whatever it
            holds.

    Source: documents: docs/decisions/0018.
    """
    if loss_mask is None:
        loss_mask = torch.ones_like(tokens[:, 1:], dtype=torch.bool)
    for start in range(0, len(tokens), micro_sequences):
        window = slice(start, start + micro_sequences)
        yield MicroBatch(
            tokens=tokens[window, :-1].contiguous(),
            labels=tokens[window, 1:].contiguous(),
            loss_mask=loss_mask[window].float(),
            domain_idx=domain_idx[window],
            documents=None if documents is None else documents[window],
        )
