"""What is the loss on text the model has not seen, in all and by domain?

The same windows each time, cut among the replicas; the tail is padded with windows that do not
count, so that every rank runs the same number of forward passes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from data.stream.loader import WindowStream
from parallel.groups import data_rank, is_last_stage
from parallel.layout import Layout
from parallel.reduce import from_last_stage, sum_over_data
from parallel.schedule import MicroBatch, forward_backward
from pretrain.training.train_step import micro_batches


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidationLoss:
    """Mean token loss in nats; the same on every rank."""

    loss_by_domain: dict[str, float]
    """Each domain that has at least one window."""
    loss: float
    """Mean over the domains' tokens in the whole validation text, each domain weighted by its
    size."""


def validation_loss(
    chunks: Sequence[torch.nn.Module],
    stream: WindowStream,
    *,
    windows_per_domain: int,
    micro_sequences: int,
    layout: Layout,
    device: torch.device,
    document_end: int | None = None,
) -> ValidationLoss:
    """Return the loss on a fixed choice of windows.

    Args:
        chunks: this rank's wrapped model chunks.
        stream: the validation windows.
        windows_per_domain: at most so many of each domain, evenly spaced.
        micro_sequences: sequences in one forward pass.
        layout: its replicas share the windows.
        device: this rank's.
        document_end: see micro_batches.

    Collective: every rank calls it.
    """
    num_windows = stream.num_sequential(windows_per_domain)
    share = micro_sequences * layout.dp
    num_batches = -(-num_windows // share)
    if layout.vp > 1:  # the interleaved schedule takes micro-batches in rounds of pp
        num_batches = -(-num_batches // layout.pp) * layout.pp
    per_rank = num_batches * micro_sequences
    first = min(data_rank() * per_rank, num_windows)
    num_counted = min(per_rank, num_windows - first)
    windows = stream.sequential(first, num_counted, per_domain=windows_per_domain)
    tokens = torch.zeros(per_rank, stream.window_tokens + 1, dtype=torch.int64)
    domain_idx = torch.zeros(per_rank, dtype=torch.int64)
    tokens[:num_counted] = torch.from_numpy(windows.tokens)
    domain_idx[:num_counted] = torch.from_numpy(windows.domain_idx)
    batches = list(
        micro_batches(
            tokens.to(device),
            domain_idx.to(device),
            micro_sequences=micro_sequences,
            num_counted=num_counted,
            document_end=document_end,
        )
    )
    for chunk in chunks:
        chunk.eval()
    with torch.no_grad():
        kept = forward_backward(
            chunks,
            [iter(batches) for _ in chunks],
            num_microbatches=len(batches),
            micro_batch_size=micro_sequences,
            sequence_length=stream.window_tokens,
            read_loss=partial(_by_domain, num_domains=len(stream.domains)),
            forward_only=True,
        )
    for chunk in chunks:
        chunk.train()
    totals = torch.zeros(2, len(stream.domains), dtype=torch.float64, device=device)
    if is_last_stage():
        for sums in kept:
            totals += sums
        totals = sum_over_data(totals)
    sums, counts = from_last_stage(totals).tolist()
    return _weighted(stream, sums, counts)


def _by_domain(batch: MicroBatch, token_loss_BS: Tensor, *, num_domains: int) -> Tensor:
    """Return loss sums and token counts by domain, `[2, domains]` fp64."""
    result = torch.zeros(2, num_domains, dtype=torch.float64, device=token_loss_BS.device)
    result[0].index_add_(0, batch.domain_idx, (token_loss_BS.double() * batch.loss_mask).sum(1))
    result[1].index_add_(0, batch.domain_idx, batch.loss_mask.double().sum(1))
    return result


def _weighted(stream: WindowStream, sums: list[float], counts: list[float]) -> ValidationLoss:
    by_domain = {
        domain: total / count
        for domain, total, count in zip(stream.domains, sums, counts, strict=True)
        if count > 0
    }
    weights = {domain: stream.num_windows_by_domain[domain] for domain in by_domain}
    mean = sum(weights[domain] * loss for domain, loss in by_domain.items()) / sum(weights.values())
    return ValidationLoss(loss_by_domain=by_domain, loss=mean)
