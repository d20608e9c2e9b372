"""How does a run go from its first token to its last?

`fit` is the loop: next batch, train step, monitor, checkpoint. Everything else here brings the
parts of a rank together before it and takes leave after it. The state of a run is two integers,
steps done and sequences consumed; which tokens come next follows from them.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from parallel import groups
from parallel.device import Device
from parallel.reduce import max_over_all
from parallel.schedule import MicroBatch
from parallel.seeds import seed_ranks
from pretrain.checkpoint.manifest import Manifest
from pretrain.checkpoint.sharded import (
    load_checkpoint,
    load_weights,
    remove_old,
    save_checkpoint,
)
from pretrain.model.assemble import build_chunks
from pretrain.model.initialise import initialise_weights
from pretrain.model.transformer_config import transformer_config
from pretrain.training.batch import local_slots
from pretrain.training.corpus import Corpus, document_end
from pretrain.training.evaluate import ValidationLoss, validation_loss
from pretrain.training.lr_schedule import step_lr
from pretrain.training.optimizer import make_optimizer, set_coefficients, wrap_chunks
from pretrain.training.run import Run, as_json
from pretrain.training.train_step import StepResult, micro_batches, train_step

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Position:
    """How far a run has come; with the configuration, all that decides what comes next."""

    step: int = 0
    """Optimizer steps done."""
    sequences: int = 0
    """Sequences consumed."""


class Trainer:
    """One rank's model, optimizer and place in the data."""

    def __init__(self, run: Run, *, device: Device, corpus: Corpus) -> None:
        """Build this rank's part of the model with its first weights.

        Args:
            run: the whole configuration.
            device: what this rank computes on.
            corpus: training and validation windows.

        Collective: every rank calls it; starts the layout's groups.
        """
        groups.start_groups(run.layout)
        seed_ranks(run.seed)
        self.run = run
        self.corpus = corpus
        self.device = device.current()
        self.position = Position()
        self.data_wait_s = 0.0
        self.total_steps = run.num_steps
        self.modules = build_modules(run, device)
        initialise_weights(self.modules, std=run.model.init_std, seed=run.seed)
        self.chunks = wrap_chunks(self.modules, config=self.modules[0].config, adamw=run.optimizer)
        self.optimizer = make_optimizer(self.chunks, adamw=run.optimizer, precision=run.precision)

    @property
    def tokens(self) -> int:
        """Tokens consumed so far, over all replicas."""
        return self.position.sequences * self.run.data.sequence_tokens

    @property
    def is_finished(self) -> bool:
        """Whether the run has consumed all its tokens."""
        return self.position.step >= self.total_steps

    def next_batch(self) -> list[MicroBatch]:
        """Return this replica's micro-batches of the step to come."""
        started = time.monotonic()
        run = self.run
        size = run.batch.size_at(self.position.sequences, sequence_tokens=run.data.sequence_tokens)
        slots = local_slots(
            size,
            micro_sequences=run.batch.micro_sequences,
            dp=run.layout.dp,
            data_rank=groups.data_rank(),
        )
        batches: list[MicroBatch] = []
        for micro in slots:
            windows = self.corpus.train.stream.windows(
                self.position.sequences + micro.start, len(micro)
            )
            tokens = torch.from_numpy(windows.tokens).to(self.device, torch.int64)
            domain_idx = torch.from_numpy(windows.domain_idx).to(self.device, torch.int64)
            batches += micro_batches(
                tokens,
                domain_idx,
                micro_sequences=len(micro),
                document_end=document_end(run, self.corpus),
            )
        self.data_wait_s = time.monotonic() - started
        return batches

    def step(self, batches: Sequence[MicroBatch]) -> StepResult:
        """Train on one global batch and move on; collective.

        Raises:
            NonFiniteGradientError: see train_step.
        """
        run = self.run
        sequences = (
            self.position.sequences + len(batches) * run.batch.micro_sequences * run.layout.dp
        )
        result = train_step(
            self.chunks,
            self.optimizer,
            batches,
            lr=self.lr_after(sequences),
            clip_norm=run.optimizer.clip_norm,
        )
        self.position = Position(step=self.position.step + 1, sequences=sequences)
        return result

    def lr_after(self, sequences: int) -> float:
        """Return the learning rate of the step that ends after `sequences` sequences."""
        return step_lr(
            sequences * self.run.data.sequence_tokens,
            schedule=self.run.lr_schedule,
            peak_lr=self.run.optimizer.lr,
            total_tokens=self.run.total_tokens,
        )

    def validate(self, *, windows_per_domain: int) -> ValidationLoss:
        """Return the validation loss; collective."""
        return validation_loss(
            self.chunks,
            self.corpus.validation.stream,
            windows_per_domain=windows_per_domain,
            micro_sequences=self.run.batch.micro_sequences,
            layout=self.run.layout,
            device=self.device,
            document_end=document_end(self.run, self.corpus),
        )

    def save(self) -> None:
        """Write a checkpoint of this moment; collective.

        Raises:
            CheckpointError: see save_checkpoint.
        """
        root = self.run.folder / "checkpoints"
        manifest = Manifest(
            step=self.position.step,
            sequences=self.position.sequences,
            tokens=self.tokens,
            tokenizer_digest=self.corpus.manifest.tokenizer_digest,
            config=as_json(self.run),
            versions={},
            files={},
        )
        save_checkpoint(root, chunks=self.chunks, optimizer=self.optimizer, manifest=manifest)
        if torch.distributed.get_rank() == 0:
            remove_old(root, keep=self.run.checkpoints.keep)

    def start_from(self, folder: Path) -> None:
        """Take only the weights of a verified checkpoint, of any layout; collective.

        Raises:
            CheckpointError: see load_weights.
        """
        load_weights(folder, chunks=self.chunks)
        self.optimizer.reload_model_params()  # fp32 masters, where weights are bf16

    def load(self, folder: Any, manifest: Manifest) -> None:
        """Go on from a verified checkpoint of any layout; collective.

        Raises:
            CheckpointError: see load_checkpoint.
        """
        same_ranks = manifest.config["layout"] == as_json(self.run)["layout"]
        load_checkpoint(folder, chunks=self.chunks, optimizer=self.optimizer, same_ranks=same_ranks)
        set_coefficients(self.optimizer, self.run.optimizer)
        self.position = Position(step=manifest.step, sequences=manifest.sequences)


def build_modules(run: Run, device: Device) -> Sequence[Any]:
    """Return this rank's model chunks, weights not drawn; reads the current groups."""
    config = transformer_config(
        run.model,
        layout=run.layout,
        device=device,
        precision=run.precision,
        load_balance=run.load_balance,
        mtp_loss_weight=run.mtp_loss_weight,
        exchange=run.exchange,
        recompute=run.recompute,
    )
    return build_chunks(
        run.model,
        config=config,
        device=device,
        layout=run.layout,
        max_tokens=run.data.sequence_tokens,
    )


def fit(
    trainer: Trainer,
    *,
    monitor: Callable[[StepResult, int], None],
    checkpoint: Callable[[], None],
    should_stop: Callable[[], bool],
) -> bool:
    """Train until the last token or until a rank is asked to stop.

    Args:
        trainer: this rank's part of the run.
        monitor: shown each step's result and the sequences of its global batch.
        checkpoint: called after each step; decides by itself whether to write.
        should_stop: whether this rank has been asked to stop; all ranks stop after the same step.

    Returns:
        True if the run is finished, False if it was stopped.

    Collective: every rank calls it.
    """
    while not trainer.is_finished:
        before = trainer.position.sequences
        batch = trainer.next_batch()
        result = trainer.step(batch)
        monitor(result, trainer.position.sequences - before)
        checkpoint()
        if bool(max_over_all(torch.tensor(float(should_stop()), device=trainer.device))):
            return False
    return True
