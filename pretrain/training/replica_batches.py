"""Which micro-batches does this replica train on, step by step?"""

import time
from functools import partial
from typing import Any

import torch

from data.stream.ledger import Ledger
from data.stream.loader import BatchReader, Share
from parallel import groups
from parallel.failpoints import failpoint
from parallel.schedule import MicroBatch
from pretrain.training.corpus import Corpus
from pretrain.training.model_failpoints import spoilt
from pretrain.training.run import Run
from pretrain.training.train_step import micro_batches


class ReplicaBatches:
    """Reads this replica's part of each batch of a ledger, ahead of the step that asks."""

    def __init__(self, run: Run, corpus: Corpus, ledger: Ledger, *, device: torch.device) -> None:
        """Start the thread that reads.

        Args:
            run: the configuration.
            corpus: its text; closed by the caller, after this.
            ledger: which batches are read in which order.
            device: where micro-batches go.
        """
        self._run = run
        self._device = device
        self._ledger = ledger
        self._timetable = ledger.timetable()
        self._domain_idx = torch.tensor(
            [corpus.domains.index(bucket.domain) for bucket in ledger.last_plan.buckets]
        )
        self.reader = BatchReader(
            corpus.train,
            ledger,
            seed=run.seed,
            share=Share(
                replicas=run.layout.dp,
                replica=groups.data_rank(),
                micro_batch_tokens=run.micro_batch_tokens,
            ),
            reading=run.data.reading,
            allocate=partial(_host_memory, pinned=device.type != "cpu"),
        )
        self.wait_s = 0.0
        """Seconds that the last step has waited for its batch."""

    def read(self, step: int) -> tuple[list[MicroBatch], int]:
        """Return the micro-batches of a step, and the digest of their windows.

        Args:
            step: optimizer steps before it.

        Raises:
            DataError: if a window is damaged or cannot be read.
        """
        started = time.monotonic()
        failpoint("data.fetch")
        found = self.reader.read(step)
        within = self._run.data.document_attention
        loss_mask, documents = found.windows.described(across_documents=not within)
        tokens = self._to_device(found.windows.tokens).long()
        if failpoint("data.batch", step=found.batch) == "garbage":
            tokens = spoilt(tokens, vocab_size=self._run.model.vocab_size, seed=found.batch)
        window_tokens = self._timetable.segment_at(found.batch).window_tokens
        batches = list(
            micro_batches(
                tokens,
                self._domain_idx[torch.from_numpy(found.addresses.bucket)].to(self._device),
                micro_sequences=self._run.micro_sequences(window_tokens),
                loss_mask=self._to_device(loss_mask),
                documents=self._to_device(documents) if within else None,
            )
        )
        self.wait_s = time.monotonic() - started
        return batches, found.digest

    def close(self) -> None:
        """Stop reading ahead."""
        self.reader.close()

    def _to_device(self, values: Any) -> torch.Tensor:
        return torch.from_numpy(values).to(self._device)


def _host_memory(shape: tuple[int, int], *, pinned: bool) -> Any:
    """Return int32 memory that windows are read into, pinned where a device copies from it."""
    failpoint("data.read")  # in the thread that reads ahead
    return torch.empty(shape, dtype=torch.int32, pin_memory=pinned).numpy()
