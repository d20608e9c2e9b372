"""What does a run show of itself while it trains?

After each step the loss, the gradient norm, the rate and the speed; every `console_interval_steps`
what costs a collective (step_metrics.py). Values are the same on every rank; rank 0 writes them.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from data.corpus.manifest import CorpusManifest
from parallel.device import Device
from pretrain.checkpoint.saver import Outcome
from pretrain.model.count import flop_per_token
from pretrain.monitor.alarms import Alarms
from pretrain.monitor.incidents import Incident, record_incident
from pretrain.monitor.loss_spikes import STATES, Seen
from pretrain.monitor.metrics import THOROUGH_EVERY
from pretrain.monitor.quantities import bits_per_byte
from pretrain.monitor.telemetry import Telemetry
from pretrain.monitor.throughput import Throughput, ThroughputConfig, find_peak_flop_per_s
from pretrain.training.comparison import Comparison
from pretrain.training.evaluate import ValidationLoss
from pretrain.training.expectation import NOT_PREDICTED, Expected
from pretrain.training.run import Run
from pretrain.training.step_metrics import StepMetrics
from pretrain.training.train_step import StepResult
from pretrain.training.trainer import Trainer
from pretrain.training.workloads import StepSize


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """One text's loss, and the same in bits per byte."""

    loss: float
    bits_per_byte: float


def make_throughput(run: Run, device: Device) -> Throughput:
    """Return the clock of a run's steps; MFU is known on H100 and H200 only."""
    number_format = "fp8" if run.precision.uses_fp8 else "bf16"
    peak = find_peak_flop_per_s(device.name, number_format=number_format)
    return Throughput(
        ThroughputConfig(
            peak_flop_per_s=peak,
            num_devices=run.layout.num_ranks,
        )
    )


class Observer:
    """Turns steps, validations and saves of one rank into records."""

    def __init__(
        self,
        trainer: Trainer,
        *,
        metrics: StepMetrics,
        throughput: Throughput,
        telemetry: Telemetry | None,
        num_rewinds: int = 0,
        shadow: Callable[[], Mapping[str, float]] = dict,
        expected: Expected = NOT_PREDICTED,
    ) -> None:
        """Begin with the step to come.

        Args:
            trainer: what is watched.
            metrics: what measures logged steps.
            throughput: clock of the steps, started by the caller.
            telemetry: where records go; None on all ranks but the first.
            num_rewinds: how often the run has gone back before this start.
            expected: what is predicted of the run.
            shadow: returns, once, how far FP8's gradients were from BF16's before the step.
        """
        self._trainer = trainer
        self.throughput = throughput
        """The clock; paused for what is no training."""
        self._telemetry = telemetry
        self._num_rewinds = num_rewinds
        self._committed_s = time.monotonic()
        run = trainer.run
        self._alarms = Alarms(run.alarms, checkpoint_interval_steps=run.checkpoints.interval_steps)
        self._metrics = metrics
        self._shadow = shadow
        self._expected = expected
        self.comparison = Comparison(expected)
        """What was predicted beside what is measured."""
        self._begin(trainer.position.step + 1)
        self.losses: list[float] = []
        """Loss of each step of this attempt, nats per token."""
        self.memory_peak_bytes = 0
        """Of the fullest rank, when last asked."""

    def step_done(
        self, result: StepResult, *, num_sequences: int, times_s: Mapping[str, float]
    ) -> None:
        """Record a step; collective where it is a logged one.

        Args:
            result: what the step measured.
            num_sequences: sequences of its global batch.
            times_s: where the time of a logged step went (watching.py).
        """
        trainer, run = self._trainer, self._trainer.run
        step = trainer.position.step
        batch = trainer.ledger.batch_of(step - 1)
        segment = trainer.timetable.segment_at(batch)
        flop = flop_per_token(run.model, sequence_tokens=segment.window_tokens)
        step_s = self.throughput.finish_step(segment.batch_tokens, flop_per_token=flop)
        micro_sequences = run.micro_sequences(segment.window_tokens)
        self._metrics.count(
            result, segment, num_microbatches=num_sequences // (micro_sequences * run.layout.dp)
        )
        self.losses.append(result.loss)
        record: dict[str, float | int | str] = {
            "step": step,
            "tokens": trainer.tokens,
            "loss": result.loss,
            "loss_max": result.loss_max,
            "gradient_norm": result.gradient_norm,
            "gradient_norm_clipped": trainer.clip.clipped_norm,
            "lr": result.lr,
            "stage": segment.stage,
            "window_tokens": segment.window_tokens,
            "global_sequences": segment.global_sequences,
            "data_wait_s": trainer.data.wait_s,
            "skipped_batches": batch - (step - 1),
            "rewinds": self._num_rewinds,
            **_spike_metrics(trainer.seen),
            **self._shadow(),
            **self.throughput.metrics(tokens_left=trainer.timetable.num_tokens - trainer.tokens),
            **self._expected.metrics(
                window_tokens=segment.window_tokens, global_sequences=segment.global_sequences
            ),
        }
        if self._is_logged(step):
            trainer.settle_damage()
            found = self._metrics.read(result)
            self.memory_peak_bytes = int(found["memory_peak_bytes"])
            age_s = time.monotonic() - self._committed_s
            record |= {**found, **times_s, **self._consumed(), "last_commit_age_s": age_s}
            self._raise_alarms(record)
        size = StepSize(
            window_tokens=segment.window_tokens, global_sequences=segment.global_sequences
        )
        self.comparison.add(size=size, step_s=step_s, record=record)
        if self._is_logged(step) and self.comparison.memory_bytes:
            record["predicted_memory_peak_bytes"] = int(self.comparison.memory_bytes)
        self._begin(step + 1)
        self._write(record)

    def _raise_alarms(self, record: Mapping[str, float | int | str]) -> None:
        if self._telemetry is None:
            return
        for alarm in self._alarms.look(record):
            incident = Incident(
                kind="alarm",
                text=f"{alarm.text}; the run goes on",
                step=int(record["step"]),
                attempt=self._telemetry.attempt,
                detail={"metric": alarm.metric, "value": alarm.value, "limit": alarm.limit},
            )
            record_incident(self._trainer.run.folder, incident)

    def _begin(self, step: int) -> None:
        """Prepare for a step; which ones are thorough follows from their number alone."""
        logged = step // self._trainer.run.telemetry.console_interval_steps
        is_last = step >= self._trainer.total_steps
        self._metrics.begin_step(
            is_logged=self._is_logged(step),
            is_thorough=logged % THOROUGH_EVERY == 0 or is_last,
        )

    def _is_logged(self, step: int) -> bool:
        interval = self._trainer.run.telemetry.console_interval_steps
        return step % interval == 0 or step >= self._trainer.total_steps

    def _consumed(self) -> dict[str, int | str]:
        first = self._trainer.consumed_from_step
        return {"consumed_from_step": first, "consumed": f"{self._trainer.take_consumed():016x}"}

    def validated(self, result: ValidationLoss, *, duration_s: float) -> Mapping[str, Score]:
        """Record a validation and return its scores by domain, the whole as `all`."""
        scores = score_validation(result, self._trainer.corpus.manifest)
        record: dict[str, float | int | str] = {
            "step": self._trainer.position.step,
            "validation_s": duration_s,
        }
        for name, score in scores.items():
            prefix = "validation" if name == "all" else f"validation/{name}"
            record[f"{prefix}/loss"] = score.loss
            record[f"{prefix}/bits_per_byte"] = score.bits_per_byte
        self._write(record)
        return scores

    def save_begun(self) -> None:
        """Record what was read up to the checkpoint that begins; collective."""
        step = self._trainer.position.step
        if self._trainer.consumed_from_step < step:  # the same on all ranks
            self._write({"step": step, **self._consumed()})

    def saved(self, outcome: Outcome) -> None:
        """Record a checkpoint that is committed."""
        self._committed_s = time.monotonic()
        name = "checkpoint" if outcome.tier == "shared" else "local_checkpoint"
        self._write(
            {
                "step": outcome.step,
                f"{name}_save_s": outcome.duration_s,
                f"{name}_blocking_s": outcome.blocking_s,
            }
        )

    def _write(self, record: Mapping[str, float | int | str]) -> None:
        """Log a record, with the tokens read up to its step: they are every curve's axis."""
        if self._telemetry is not None:
            trainer, step = self._trainer, int(record["step"])
            batch = min(trainer.ledger.batch_of(step), trainer.timetable.num_batches)
            self._telemetry.log({"tokens": trainer.timetable.tokens_before(batch), **record})


def _spike_metrics(seen: Seen | None) -> dict[str, float | int]:
    """Return the score of a step that was judged, and where the run stands."""
    if seen is None:
        return {}
    score = {"spike_z": seen.worst} if seen.scores else {}
    return {**score, "spike_state": STATES.index(seen.state)}


def score_validation(result: ValidationLoss, corpus: CorpusManifest) -> dict[str, Score]:
    """Return loss and bits per byte of each domain and of `all`.

    bits per byte = nats per token / ln 2 * tokens of the domain / bytes of the domain.
    """
    domains = list(result.loss_by_domain)
    text = corpus.splits["validation"]
    scores: dict[str, Score] = {}
    for name, names in [("all", domains), *((domain, [domain]) for domain in domains)]:
        loss = result.loss if name == "all" else result.loss_by_domain[name]
        bits = bits_per_byte(
            loss,
            num_tokens=sum(text[domain].tokens for domain in names),
            num_bytes=sum(text[domain].bytes for domain in names),
        )
        scores[name] = Score(loss=loss, bits_per_byte=bits)
    return scores
