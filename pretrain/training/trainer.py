"""What does one rank of a run hold, and what can be done with it?

Model, optimizer and place in the data: read a batch, train on it or leave it out, validate, save,
load. The loop over them is fit.py. The state of a run in its data is one integer, the steps
done; with the ledger and the seed it decides which windows come next.
"""

import logging
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from data.indexed.format import DataError
from data.stream.consumed import MASK
from data.stream.ledger import Entry, write_ledger
from data.stream.order import Segment
from parallel import groups
from parallel.agreement import from_first_rank
from parallel.device import Device
from parallel.reduce import sum_over_data
from parallel.schedule import MicroBatch
from parallel.seeds import seed_ranks
from pretrain.checkpoint.environment import running_versions
from pretrain.checkpoint.manifest import CheckpointError, Manifest
from pretrain.checkpoint.optimizer_state import num_updates
from pretrain.checkpoint.pieces import pieces_of_rank
from pretrain.checkpoint.saver import Saver, SaverConfig
from pretrain.checkpoint.sharded import load_checkpoint, load_weights
from pretrain.model.initialise import initialise_weights
from pretrain.monitor.loss_spikes import LossSpikes, Seen
from pretrain.training.build import build_modules
from pretrain.training.clip import GradientClip
from pretrain.training.corpus import LEDGER_NAME, Corpus, validation_window_tokens
from pretrain.training.evaluate import ValidationLoss, validation_loss
from pretrain.training.lr_schedule import step_lr
from pretrain.training.model_failpoints import plant_in_model
from pretrain.training.module_norms import tensors_to_clip
from pretrain.training.optimizer import make_optimizer, set_coefficients, wrap_chunks
from pretrain.training.replaced_windows import ReplacedWindows
from pretrain.training.replica_batches import ReplicaBatches
from pretrain.training.run import Run, as_json
from pretrain.training.step_state import StepState
from pretrain.training.train_step import Judge, StepResult, apply_step, measure_step

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

    def __init__(
        self,
        run: Run,
        *,
        device: Device,
        corpus: Corpus,
        number: int = 0,
        is_fenced: Callable[[], str] = lambda: "",
    ) -> None:
        """Build this rank's part of the model with its first weights.

        Args:
            run: the whole configuration.
            device: what this rank computes on.
            corpus: training and validation windows, and the ledger of the run.
            number: of this start of the run; names what its unfinished saves are called.
            is_fenced: asked before a checkpoint is committed; see Saver.

        Collective: every rank calls it; starts the layout's groups.
        """
        groups.start_groups(run.layout)
        seed_ranks(run.seed)
        self.run = run
        self.corpus = corpus
        self.device = device.current()
        self.ledger = corpus.ledger
        self.timetable = corpus.ledger.timetable()
        self.total_steps = corpus.ledger.num_steps
        self.position = Position()
        self.is_saved = True  # on shared storage, or new
        self._move_to(0)
        self.consumed = 0  # digest of the windows read since `consumed_from_step`
        self.consumed_from_step = 0
        self._digest = 0  # of the batch read last
        self._replaced = ReplacedWindows(device=self.device)
        self.data = ReplicaBatches(run, corpus, self.ledger, device=self.device)
        self.modules = build_modules(run, device)
        initialise_weights(self.modules, std=run.model.init_std, seed=run.seed)
        plant_in_model(self.modules)
        self.chunks = wrap_chunks(self.modules, config=self.modules[0].config, adamw=run.optimizer)
        self.optimizer = make_optimizer(self.chunks, adamw=run.optimizer, precision=run.precision)
        self.step_state = StepState(self.modules)
        self.clip = GradientClip(
            run.optimizer, tensors_to_clip(self.modules, self.optimizer, run=run)
        )
        self.spikes = LossSpikes(run.recovery.rule)
        self.seen: Seen | None = None  # what spike_judge.py thinks of the last step
        self.saver = Saver(
            SaverConfig(
                root=run.folder / "checkpoints",
                keep=run.checkpoints.keep,
                read_back=run.checkpoints.read_back,
                token=f"{number:08d}" if number else str(from_first_rank(secrets.token_hex(4))),
            ),
            device=self.device,
            is_fenced=is_fenced,
        )

    @property
    def batch(self) -> int:
        """Number of the batch to come; at the end of the run, of all batches."""
        return min(self.ledger.batch_of(self.position.step), self.timetable.num_batches)

    @property
    def segment(self) -> Segment:
        """Stage, window length and size of the batch to come, at the end of the run of the last."""
        return self.timetable.segment_at(min(self.batch, self.timetable.num_batches - 1))

    @property
    def tokens(self) -> int:
        """Tokens consumed so far, over all replicas; skipped batches count as consumed."""
        return self.timetable.tokens_before(self.batch)

    @property
    def is_finished(self) -> bool:
        """Whether the run has consumed all its tokens."""
        return self.position.step >= self.total_steps

    def next_batch(self) -> list[MicroBatch]:
        """Return this replica's micro-batches of the step to come.

        Raises:
            DataError: if a window is damaged or cannot be read.
        """
        batches, self._digest = self.data.read(self.position.step)
        self.consumed = (self.consumed + self._digest) & MASK
        return batches

    def take_consumed(self) -> int:
        """Return the digest of what all replicas have read since it was last taken; collective.

        Source: data/stream/consumed.py; `consumed_from_step` says since when.
        """
        own = self.consumed if groups.context_rank() == 0 else 0  # context ranks read the same
        # 64-bit sums wrap around in int64 as they do modulo 2**64
        signed = own - 2**64 if own >= 2**63 else own
        total = sum_over_data(torch.tensor([signed], dtype=torch.int64, device=self.device))
        self.consumed, self.consumed_from_step = 0, self.position.step
        return int(total[0]) & MASK

    def step(self, batches: Sequence[MicroBatch]) -> StepResult:
        """Train on one global batch and move on; collective.

        Raises:
            NonFiniteGradientError: see train_step.
        """
        result = self.try_step(batches, judges=())
        assert result is not None, "nobody had it left out"
        return result

    def try_step(
        self, batches: Sequence[MicroBatch], *, judges: Sequence[Judge]
    ) -> StepResult | None:
        """Train on one global batch and move on, or leave the batch out; collective.

        Args:
            batches: this replica's part of it, as `next_batch` gave it.
            judges: asked in turn, before anything has moved for good.

        Returns:
            What the step measured, None if a judge had the batch left out.

        Raises:
            NonFiniteGradientError: see train_step.
        """
        self.step_state.take()
        result = self.measure(batches)
        for judge in judges:
            verdict = judge(batches, result)
            if verdict.leave_out:
                self.leave_out(verdict.leave_out)
                return None
            result = verdict.result
        shrunk = replace(result, gradient_norm=self.clip.shrink(result.gradient_norm))
        apply_step(self.optimizer, shrunk, clip_norm=self.clip.last_limit)
        self.clip.observe(result.gradient_norm)
        self._move_to(self.position.step + 1)
        return result

    def measure(self, batches: Sequence[MicroBatch]) -> StepResult:
        """Compute the gradients of the step to come; `step_state` undoes it; collective."""
        return measure_step(
            self.chunks,
            self.optimizer,
            batches,
            lr=self.lr_after(self.timetable.tokens_before(self.batch + 1))
            * self.ledger.rate_factor(self.batch),
        )

    def leave_out(self, reason: str) -> None:
        """Leave the batch that was read last out of the run: an entry of the ledger; collective.

        What the pass over it has moved is put back, and the step is taken with the batch after it.

        Args:
            reason: for whoever reads the ledger; the same on every rank.

        Raises:
            OSError: on every rank, if the ledger could not be written.
            DataError: see settle_damage.
        """
        self.step_state.restore()
        self.settle_damage()
        skip = Entry(kind="skip", first_batch=self.batch, num_batches=1, reason=reason)
        self.ledger = self.ledger.with_entry(skip)
        self._write_ledger()
        self.consumed = (self.consumed - self._digest) & MASK
        self.total_steps = self.ledger.num_steps
        self._move_to(self.position.step)
        self.data.close()
        self.data = ReplicaBatches(self.run, self.corpus, self.ledger, device=self.device)
        self._replaced = ReplacedWindows(device=self.device)

    def _move_to(self, step: int) -> None:
        batch = min(self.ledger.batch_of(step), self.timetable.num_batches)
        self.position = Position(step=step, sequences=self.timetable.sequences_before(batch))

    def lr_after(self, tokens: int) -> float:
        """Return the learning rate of the step that ends after `tokens` tokens."""
        return step_lr(
            tokens,
            schedule=self.run.lr_schedule,
            peak_lr=self.run.optimizer.lr,
            total_tokens=self.timetable.num_tokens,
        )

    def validate(self, *, windows_per_domain: int) -> ValidationLoss:
        """Return the validation loss; collective."""
        return validation_loss(
            self.chunks,
            self.corpus,
            windows_per_domain=windows_per_domain,
            micro_sequences=self.run.micro_sequences(validation_window_tokens(self.corpus)),
            layout=self.run.layout,
            device=self.device,
            document_attention=self.run.data.document_attention,
        )

    def settle_damage(self) -> None:
        """Put windows that any replica found damaged into every rank's ledger; collective.

        Rank 0 writes them into the run's ledger file.

        Raises:
            DataError: on every rank, if ranks of one replica have found other damage in what they
                have trained on, or all replicas together more than may be replaced.
            OSError: on every rank, if the ledger could not be written.
        """
        before = len(self.ledger.replaced())
        self.ledger = self._replaced.settle(
            self.ledger, self.data.reader.new_damage, next_batch=self.batch
        )
        num_replaced, most = len(self.ledger.replaced()), self.run.data.reading.max_replaced
        if num_replaced == before:
            return
        self._write_ledger()
        if num_replaced > most:
            raise DataError(
                f"{num_replaced} windows are damaged and replaced, data.reading.max_replaced={most}"
                f" are allowed; they stand in {self.run.folder / LEDGER_NAME}"
            )

    def _write_ledger(self) -> None:
        """Have rank 0 write the ledger; collective; OSError on every rank if storage refuses."""
        refused, path = "", self.run.folder / LEDGER_NAME
        if torch.distributed.get_rank() == 0:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_ledger(path, self.ledger)
            except OSError as error:
                refused = f"{path} could not be written: {error}"
        if refused := from_first_rank(refused):
            raise OSError(refused)

    def save(self) -> None:
        """Write a checkpoint of this moment and wait until it is committed; collective.

        Raises:
            CheckpointError: on every rank, if one could not write; what was there before is as it
                was.
            DataError: see begin_save.
        """
        self.begin_save()
        self.saver.wait()
        outcome = self.saver.take_outcome()
        assert outcome is not None, "it was waited for"
        if outcome.problem:
            raise CheckpointError(f"{outcome.folder} could not be written: {outcome.problem}")

    def begin_save(self) -> None:
        """Begin to write a checkpoint of this moment; collective.

        Raises:
            DataError: see settle_damage; and if the manifest of the training windows is another one
                than at the start, when the checkpoint is written all the same.
        """
        manifest = self._manifest()
        self.saver.hold(self.run.recovery.oldest_needed(self.spikes))
        self.saver.begin(lambda: pieces_of_rank(self.chunks, self.optimizer), manifest)
        self.corpus.train.check_unchanged()

    def begin_local_save(self) -> None:
        """Do the same to the nodes' own disks; collective."""
        manifest = self._manifest()
        self.saver.begin_local(
            lambda: pieces_of_rank(self.chunks, self.optimizer, alone=True), manifest
        )
        self.corpus.train.check_unchanged()

    def _manifest(self) -> Manifest:
        self.settle_damage()
        return Manifest(
            step=self.position.step,
            sequences=self.position.sequences,
            tokens=self.tokens,
            tokenizer_digest=self.corpus.manifest.tokenizer_digest,
            config=as_json(self.run),
            versions=running_versions() if torch.distributed.get_rank() == 0 else {},
            files={},
            ledger=self.ledger.as_json(),
            updates=num_updates(self.optimizer),
            spikes=self.spikes.as_json(),
            clip=self.clip.as_json(),
        )

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
        load_checkpoint(
            folder,
            manifest,
            chunks=self.chunks,
            optimizer=self.optimizer,
            same_ranks=same_ranks,
        )
        self.is_saved = not manifest.is_local
        if self.is_saved:
            self.saver.trust(folder)
        set_coefficients(self.optimizer, self.run.optimizer)
        self.spikes = LossSpikes.from_json(manifest.spikes, rule=self.run.recovery.rule)
        self.clip.take(manifest.clip)
        if not same_ranks:
            self.spikes.forget("loss_max")  # the largest of more replicas is larger
        self._move_to(manifest.step)
        self.consumed_from_step = manifest.step

    def close(self) -> None:
        """Stop reading ahead."""
        self.data.close()
