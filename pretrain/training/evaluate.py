"""What is the loss on text the model has not seen, in all and by domain?

The same windows each time, cut among the replicas; the tail is padded with windows that do not
count, so that every rank runs the same number of forward passes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.stream.windows import read_windows, spread_windows
from parallel.failpoints import failpoint
from parallel.groups import data_rank, is_last_stage
from parallel.layout import Layout
from parallel.reduce import from_last_stage, sum_over_data
from parallel.schedule import MicroBatch, forward_backward
from pretrain.training.corpus import Corpus, validation_window_tokens
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
    corpus: Corpus,
    *,
    windows_per_domain: int,
    micro_sequences: int,
    layout: Layout,
    device: torch.device,
    document_attention: bool,
) -> ValidationLoss:
    """Return the loss on a fixed choice of windows.

    Args:
        chunks: this rank's wrapped model chunks.
        corpus: its validation windows are read.
        windows_per_domain: at most so many of each domain, evenly spaced.
        micro_sequences: sequences in one forward pass.
        layout: its replicas share the windows.
        device: this rank's.
        document_attention: see Data.

    Raises:
        DataError: if a window is damaged or cannot be read.

    Collective: every rank calls it.
    """
    failpoint("evaluation.begin")
    buckets, windows = spread_windows(corpus.validation, per_domain=windows_per_domain)
    num_windows, share = len(buckets), micro_sequences * layout.dp
    num_batches = -(-num_windows // share)
    if layout.vp > 1:  # the interleaved schedule takes micro-batches in rounds of pp
        num_batches = -(-num_batches // layout.pp) * layout.pp
    per_rank = num_batches * micro_sequences
    first = min(data_rank() * per_rank, num_windows)
    own = slice(first, min(first + per_rank, num_windows))
    found = _padded(
        corpus,
        buckets[own],
        windows[own],
        size=per_rank,
        device=device,
        across_documents=not document_attention,
    )
    batches = list(
        micro_batches(
            found["tokens"],
            found["domain_idx"],
            micro_sequences=micro_sequences,
            loss_mask=found["loss_mask"],
            documents=found["documents"] if document_attention else None,
        )
    )
    num_domains = len(corpus.domains)
    for chunk in chunks:
        chunk.eval()
    with torch.no_grad():
        kept = forward_backward(
            chunks,
            [iter(batches) for _ in chunks],
            num_microbatches=len(batches),
            micro_batch_size=micro_sequences,
            sequence_length=batches[0].tokens.shape[1],
            read_loss=partial(_by_domain, num_domains=num_domains),
            forward_only=True,
        )
    for chunk in chunks:
        chunk.train()
    totals = torch.zeros(2, num_domains, dtype=torch.float64, device=device)
    if is_last_stage():
        for sums in kept:
            totals += sums
        totals = sum_over_data(totals)
    sums, counts = from_last_stage(totals).tolist()
    return _weighted(corpus, sums, counts)


def _by_domain(batch: MicroBatch, token_loss_BS: Tensor, *, num_domains: int) -> Tensor:
    """Return loss sums and token counts by domain, `[2, domains]` fp64."""
    result = torch.zeros(2, num_domains, dtype=torch.float64, device=token_loss_BS.device)
    result[0].index_add_(0, batch.domain_idx, (token_loss_BS.double() * batch.loss_mask).sum(1))
    result[1].index_add_(0, batch.domain_idx, batch.loss_mask.double().sum(1))
    return result


def _padded(
    corpus: Corpus,
    buckets: NDArray[np.int64],
    windows: NDArray[np.int64],
    *,
    size: int,
    device: torch.device,
    across_documents: bool,
) -> dict[str, Tensor]:
    """Return validation windows as `micro_batches` wants them; those beyond do not count."""
    window_tokens = validation_window_tokens(corpus)
    tokens = torch.zeros(size, window_tokens + 1, dtype=torch.int64)
    documents = torch.zeros(size, window_tokens, dtype=torch.int32)
    loss_mask = torch.zeros(size, window_tokens, dtype=torch.bool)
    domain_idx = torch.zeros(size, dtype=torch.int64)
    if count := len(buckets):
        found = read_windows(corpus.validation, buckets, windows)
        tokens[:count] = torch.from_numpy(found.tokens)
        mask, numbers = found.described(across_documents=across_documents)
        loss_mask[:count] = torch.from_numpy(mask)
        documents[:count] = torch.from_numpy(numbers)
        names = [corpus.validation.header.buckets[bucket].domain for bucket in buckets.tolist()]
        domain_idx[:count] = torch.tensor([corpus.domains.index(name) for name in names])
    parts = {
        "tokens": tokens,
        "documents": documents,
        "loss_mask": loss_mask,
        "domain_idx": domain_idx,
    }
    return {name: values.to(device) for name, values in parts.items()}


def _weighted(corpus: Corpus, sums: list[float], counts: list[float]) -> ValidationLoss:
    by_domain = {
        domain: total / count
        for domain, total, count in zip(corpus.domains, sums, counts, strict=True)
        if count > 0
    }
    texts = corpus.manifest.splits["validation"]
    weights = {domain: texts[domain].tokens for domain in by_domain}
    mean = sum(weights[domain] * loss for domain, loss in by_domain.items()) / sum(weights.values())
    return ValidationLoss(loss_by_domain=by_domain, loss=mean)
