"""What was in the batch when something happened, and does it happen again?

While steps are ordinary a rank keeps what it has anyway, by reference: the losses of the sequences
of the last batches, and the newest batch that was ordinary. On an event all ranks stop together and
tell rank 0 which sequence of the global batch had which loss, how tokens were spread over experts
and, where that is known, the gradient norm of each module. Then the step is computed again:

- the ordinary batch, with the weights of now: has the model changed, or is the batch another?
- the event's batch, each replica with the micro-batches of another one: is a device to blame?
- the event's batch again, as it was: the same bits, or were the numbers wrong once?

The last pass leaves the gradients that were there before, and all that a pass moves is put back
(step_state.py), so the run goes on to the same bits as without a recorder. An event takes three
steps' time. Rank 0 then reads what stood in the worst sequences, for a limited time, and writes the
bundle (monitor/event_bundle.py). The series before the event stand in metrics.jsonl already:
nothing of them is kept here, so that a start that has just begun knows them, too.

C sequences of a replica, L layers, E experts.
"""

import hashlib
import json
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from parallel.agreement import from_first_rank
from parallel.beats import Phase
from parallel.failpoints import failpoint
from parallel.reduce import sum_over_all
from parallel.schedule import MicroBatch
from pretrain.model.expert_load import ExpertLoad
from pretrain.monitor.event_bundle import (
    EventKind,
    bundle_path,
    find_bundles,
    last_records,
    write_bundle,
)
from pretrain.monitor.records import METRICS_NAME
from pretrain.monitor.spike_cause import cause_of
from pretrain.training.event_rerun import Rerun, Verdict, rerun_of
from pretrain.training.event_sequences import Measured, sequence_columns
from pretrain.training.event_text import read_worst, rows_of
from pretrain.training.run import as_json
from pretrain.training.train_step import StepResult
from pretrain.training.trainer import Trainer

log = logging.getLogger(__name__)

ModuleNorms = Callable[[], Mapping[str, float]]
"""Gradient norm of each module of the whole model; collective."""

_KEPT_STEPS = 4
"""Before the event's own: an alarm is three of five, so its onset is four steps before at most."""
_SERIES_STEPS = 64
_NUM_WORST = 32
_NO_SERIES = {"attempt", "time_unix_s", "consumed", "consumed_from_step", "stage", "window_tokens"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """What has happened, the same on every rank."""

    kind: EventKind
    text: str
    """One sentence, as in the incident."""
    onset_step: int = -1
    """First step of the spike, where one lasts."""
    scores: Mapping[str, float] = field(default_factory=dict[str, float])
    """Robust deviations by name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recorded:
    """What has become of an event."""

    result: StepResult
    """Of the step: of the last pass over its batch, whose gradients are there now."""
    detail: Mapping[str, object] = field(default_factory=dict[str, object])
    """For the incident, on rank 0: `bundle` and `cause`; empty where nothing was written."""


class FlightRecorder:
    """Keeps the last steps of a rank, and writes down what was in them when something happens."""

    def __init__(
        self,
        trainer: Trainer,
        *,
        attempt: int,
        load: ExpertLoad,
        enter: Callable[[Phase, int], None],
        module_norms: ModuleNorms = dict,
    ) -> None:
        """Have kept nothing.

        Args:
            trainer: whose steps are kept.
            attempt: number of this start.
            load: counts tokens of experts; known to the trainer's step_state.
            enter: told that a step is computed again.
            module_norms: gradient norms by module of the step that is there.
        """
        self._trainer = trainer
        self._attempt = attempt
        self._load = load
        self._enter = enter
        self._module_norms = module_norms
        self._kept: deque[Measured] = deque(maxlen=_KEPT_STEPS)
        self._ordinary: tuple[Measured, Sequence[MicroBatch]] | None = None

    def keep(self, batches: Sequence[MicroBatch], result: StepResult, *, is_ordinary: bool) -> None:
        """Keep a step that is taken; no copy, no synchronisation.

        Args:
            batches: this replica's part of it.
            result: what it measured.
            is_ordinary: whether nothing about it stands out.
        """
        step = self._measured(result)
        self._kept.append(step)
        if is_ordinary:
            self._ordinary = (step, batches)

    def _measured(self, result: StepResult) -> Measured:
        trainer = self._trainer
        return Measured(step=trainer.position.step, batch=trainer.batch, result=result)

    def record(self, event: Event, batches: Sequence[MicroBatch], result: StepResult) -> Recorded:
        """Write down what is known of an event, once; collective.

        Args:
            event: what has happened.
            batches: this replica's part of the batch of the step that is there.
            result: what the step measured.
        """
        return self._written(
            event,
            result,
            again=lambda: rerun_of(self._trainer, batches, result, ordinary=self._ordinary),
        )

    def record_non_finite(
        self, text: str, result: StepResult, verdict: Verdict, said: str
    ) -> Mapping[str, object]:
        """Write down what is known of a step that is no number, once; collective.

        Args:
            text: one sentence, as in the incident.
            result: what the step measured.
            verdict: of whoever has computed it again (recheck.py).
            said: the same in one sentence.

        Returns:
            `detail` of a `Recorded`.
        """
        rerun = Rerun(verdict=verdict, text=said, result=result)
        return self._written(
            Event(kind="non_finite", text=text), result, again=lambda: rerun
        ).detail

    def _written(self, event: Event, result: StepResult, *, again: Callable[[], Rerun]) -> Recorded:
        """Write down an event, unless it is old news; collective.

        Args:
            event: what has happened.
            result: what the step measured.
            again: says whether it comes again; collective.
        """
        trainer = self._trainer
        path = bundle_path(
            trainer.run.folder, step=trainer.position.step, batch=trainer.batch, kind=event.kind
        )
        if not from_first_rank(torch.distributed.get_rank() == 0 and self._is_wanted(path.exists)):
            return Recorded(result=result)
        self._enter("recheck", trainer.position.step)
        try:
            failpoint("event.begin")
            told = self._gather(event, result)
            rerun = again()
        finally:
            self._enter("step", trainer.position.step)
        if torch.distributed.get_rank() != 0:
            return Recorded(result=rerun.result)
        # what is written down must never end what it is about
        try:
            bundle = self._bundle(event, result, told=told, rerun=rerun)
            write_bundle(path, bundle)
        except (OSError, ValueError, ArithmeticError, LookupError, TypeError) as error:
            log.warning("%s: not written: %r", path, error)
            return Recorded(result=rerun.result)
        failpoint("event.written")
        detail = {
            "bundle": str(path.relative_to(trainer.run.folder)),
            "cause": bundle["cause"]["kind"],
        }
        return Recorded(result=rerun.result, detail=detail)

    def _is_wanted(self, exists: Callable[[], bool]) -> bool:
        try:
            num_bundles = len(find_bundles(self._trainer.run.folder))
            return not exists() and num_bundles < self._trainer.run.recovery.max_bundles
        except OSError as error:
            log.warning("%s: no event is recorded: %s", self._trainer.run.folder, error)
            return False

    def _gather(self, event: Event, result: StepResult) -> dict[str, Any]:
        """Return what all ranks know of the event's batches, on rank 0; collective."""
        trainer = self._trainer
        onset = event.onset_step if event.onset_step >= 0 else trainer.position.step
        steps = [kept for kept in self._kept if onset <= kept.step < trainer.position.step]
        steps.append(self._measured(result))
        before_LE = trainer.step_state.before(self._load.counts_LE)
        tokens_LE = sum_over_all(self._load.counts_LE - before_LE)
        norms = self._module_norms()
        first_layer = trainer.run.model.num_dense_layers
        rows: list[list[float]] = tokens_LE[first_layer:].tolist()
        return {
            "sequences": sequence_columns(trainer, steps),
            "experts": {
                "first_layer": first_layer,
                "tokens": [[int(count) for count in row] for row in rows],
            },
            "module_gradient_norms": dict(norms),
        }

    def _bundle(
        self, event: Event, result: StepResult, *, told: Mapping[str, Any], rerun: Rerun
    ) -> dict[str, Any]:
        trainer, run = self._trainer, self._trainer.run
        records = last_records(
            run.folder / METRICS_NAME, before=trainer.position.step, most=_SERIES_STEPS
        )
        names = {name for record in records for name in record if "/" not in name}
        config = json.dumps(as_json(run), sort_keys=True, default=str).encode()
        bundle: dict[str, Any] = {
            "kind": event.kind,
            "text": event.text,
            "run": run.name,
            "attempt": self._attempt,
            "time_unix_s": round(time.time(), 3),
            "step": trainer.position.step,
            "batch": trainer.batch,
            "onset_step": event.onset_step,
            "stage": trainer.segment.stage,
            "window_tokens": trainer.segment.window_tokens,
            "global_sequences": trainer.segment.global_sequences,
            "vocab_size": run.model.vocab_size,
            "policy": run.recovery.policy,
            "config_sha256": hashlib.sha256(config).hexdigest(),
            "ledger": {"entries": len(trainer.ledger.entries), "digest": trainer.ledger.digest},
            "loss": result.loss,
            "loss_max": result.loss_max,
            "gradient_norm": result.gradient_norm,
            "lr": result.lr,
            "scores": dict(event.scores),
            "spike_z": max(event.scores.values(), default=None),
            "rerun": rerun.as_json(),
            "ordinary": rerun.ordinary,
            "series": {
                name: [record.get(name) for record in records]
                for name in sorted(names - _NO_SERIES)
            },
            **told,
        }
        bundle["worst"], bundle["text_problem"] = read_worst(
            run, trainer.ledger, rows_of(told["sequences"], most=_NUM_WORST)
        )
        cause = cause_of(bundle)
        return {**bundle, "cause": {"kind": cause.kind, "reasons": list(cause.reasons)}}
