"""Is this step taken, left out, or the last before the run goes back?

The judge that `fit` asks about each measured step (train_step.py): it shows the step's reduced
numbers to the run's detector and does what the policy says (recovery.py). A batch that is left out
changes nothing of the detector, so that it makes no difference whether it was left out just now or
by an entry of the ledger after the run was started again.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from data.indexed.format import DataError
from parallel.agreement import from_first_rank
from parallel.beats import Phase
from parallel.schedule import MicroBatch
from pretrain.checkpoint.aside import set_aside
from pretrain.checkpoint.lease import HeldError, incident_mark
from pretrain.checkpoint.manifest import CheckpointError, list_checkpoints, step_folder
from pretrain.checkpoint.retention import find_damage_together
from pretrain.monitor.event_bundle import EventKind
from pretrain.monitor.incidents import Incident, record_incident
from pretrain.monitor.loss_spikes import Seen
from pretrain.training.flight_recorder import Event, FlightRecorder
from pretrain.training.recovery import reason_to_skip, stage_name
from pretrain.training.rewind import (
    NoWayBackError,
    Rewind,
    begin_rewind,
    finish_rewinds,
    plan_rewind,
    read_rewinds,
    spike_mark,
    step_of,
)
from pretrain.training.saves import wait_for_save
from pretrain.training.train_step import StepResult, Verdict
from pretrain.training.trainer import Trainer


class RewoundError(RuntimeError):
    """The run has gone back to an older checkpoint, and goes on from it when it is started."""


class SpikeJudge:
    """Answers the spikes of a run; each rank has one."""

    def __init__(
        self,
        trainer: Trainer,
        *,
        attempt: int,
        why_lost: Callable[[], str],
        enter: Callable[[Phase, int], None],
        recorder: FlightRecorder,
    ) -> None:
        """Look up how often the run has gone back; collective.

        Args:
            trainer: whose steps are judged.
            attempt: number of this start.
            why_lost: asked on rank 0 before a rewind: who has taken the run over, or "".
            enter: told that the run goes back, and that a save is waited for.
            recorder: writes down what was in a batch that stands out.

        Raises:
            OSError: on every rank, if the rewinds of the run cannot be read.
        """
        self._trainer = trainer
        self._attempt = attempt
        self._why_lost = why_lost
        self._enter = enter
        self._recorder = recorder
        self._refused: set[int] = set()  # steps whose damaged checkpoint the disk would not rename
        self.num_rewinds = _num_rewinds(trainer.run.folder)
        """How often the run has gone back before this start."""

    def __call__(self, batches: Sequence[MicroBatch], result: StepResult) -> Verdict:
        """Return what becomes of a step; collective.

        Raises:
            RewoundError: on every rank: the run is set back, and this start ends.
            NoWayBackError: on every rank: it diverges, and may not or cannot go back.
            HeldError: on every rank: it is another job's by now.
            OSError: on every rank: storage refused.
            CheckpointError: on every rank: ranks see unlike files of a checkpoint.
        """
        if not result.is_finite:
            return Verdict(result=result)  # apply_step refuses it; its number says nothing
        trainer, recovery = self._trainer, self._trainer.run.recovery
        values = {"loss": result.loss, "gradient_norm": result.gradient_norm}
        if trainer.run.layout.dp > 1:  # of one replica it is the loss again
            values["loss_max"] = result.loss_max
        stage = stage_name(trainer.segment, trainer.ledger, batch=trainer.batch)
        seen = trainer.spikes.look(values, stage=stage)
        if recovery.leaves_out(
            seen,
            entries=trainer.ledger.entries,
            batch=trainer.batch,
            precision=trainer.run.precision,
        ):
            reason = reason_to_skip(seen)
            text = f"batch {trainer.batch} is left out: {reason}"
            self._record("skip", text, batches, result=result, seen=seen)
            return Verdict(result=result, leave_out=reason)
        was_normal = seen.state == "normal"
        seen = trainer.spikes.observe(values, step=trainer.position.step, stage=stage)
        trainer.seen = seen
        if seen.event == "alarm":
            text = f"the loss or the gradient norm spikes from step {seen.onset_step} on"
            result = self._record("spike", text, batches, result=result, seen=seen)
        elif seen.event == "diverged":
            result = self._diverged(batches, result, seen=seen)
        elif recovery.policy == "watch" and was_normal and seen.worst > recovery.rule.far:
            text = f"batch {trainer.batch} stands out: {reason_to_skip(seen)}; it is trained on"
            result = self._record("flagged", text, batches, result=result, seen=seen)
        is_ordinary = seen.state == "normal" and not seen.is_flagged
        self._recorder.keep(batches, result, is_ordinary=is_ordinary)
        return Verdict(result=result)

    def _diverged(
        self, batches: Sequence[MicroBatch], result: StepResult, *, seen: Seen
    ) -> StepResult:
        """Set the run back, or record why it goes on; collective.

        Raises:
            as __call__.
        """
        policy = self._trainer.run.recovery.policy
        says = f"the loss diverges from step {seen.onset_step} on"
        if policy == "rewind":
            event = Event(
                kind="diverged", text=says, onset_step=seen.onset_step, scores=seen.scores
            )
            self._recorder.record(event, batches, result)
            self._go_back(seen)
        text = f"{says}; the run goes on, as recovery.policy={policy} says"
        return self._record("diverged", text, batches, result=result, seen=seen)

    def _go_back(self, seen: Seen) -> None:
        """Set the run back, on rank 0 for all; collective.

        Raises:
            as __call__; it never returns.
        """
        # a checkpoint that commits later would be the newest
        wait_for_save(self._trainer, enter=self._enter)
        self._enter("recheck", self._trainer.position.step)  # a slow phase, of files
        rewind = self._plan_to_whole(seen)
        said = self._done(rewind) if torch.distributed.get_rank() == 0 else ""
        if failed := from_first_rank(said):
            raise OSError(failed)
        raise RewoundError(
            f"the loss diverged from step {rewind.onset_step} on: the run goes on from step"
            f" {rewind.to_step}, rewind {rewind.number} of recovery.max_rewinds="
            f"{self._trainer.run.recovery.max_rewinds}"
        )

    def _plan_to_whole(self, seen: Seen) -> Rewind:
        """Return a rewind to a checkpoint that is as it was written; collective.

        Each rank reads a share of it, before newer ones are renamed. One that is damaged is set
        aside, and the next older one is taken.

        Raises:
            as __call__.
        """
        errors = {"held": HeldError, "failed": OSError, "no way": NoWayBackError}
        while True:
            is_first = torch.distributed.get_rank() == 0
            planned: dict[str, Any] = from_first_rank(self._plan(seen) if is_first else {})
            for name, error in errors.items():
                if name in planned:
                    raise error(planned[name])
            rewind = Rewind(**planned["rewind"])
            folder = step_folder(self._trainer.run.folder / "checkpoints", rewind.to_step)
            damage = find_damage_together(folder, purpose="agreement")
            if not damage:
                return rewind
            if is_first:
                self._set_aside(folder, damage)

    def _set_aside(self, folder: Path, damage: list[str]) -> None:
        text = f"{folder.name} is damaged and set aside; the run goes back to one before it"
        record_incident(
            self._trainer.run.folder,
            Incident(
                kind="damaged_checkpoint",
                text=text,
                step=self._trainer.position.step,
                attempt=self._attempt,
                detail={"files": damage[:20]},
            ),
        )
        if set_aside(folder) is None:
            self._refused.add(step_of(folder))

    def _plan(self, seen: Seen) -> dict[str, Any]:
        """Return what rank 0 would do."""
        trainer, folder = self._trainer, self._trainer.run.folder
        try:
            if lost := self._why_lost():
                return {"held": lost}
            saved = {step_of(path) for path in list_checkpoints(folder / "checkpoints")}
            rewind = plan_rewind(
                trainer.run.recovery,
                trainer.ledger,
                onset_step=seen.onset_step,
                step=trainer.position.step,
                checkpoints=sorted(saved - self._refused),
                before=read_rewinds(folder),
                attempt=self._attempt,
            )
        except NoWayBackError as error:
            step = trainer.position.step
            record_incident(folder, Incident(kind="diverged", text=str(error), step=step))
            return {"no way": str(error)}
        except (OSError, ValueError) as error:
            return {"failed": f"{folder}: the run could not be set back: {error}"}
        return {"rewind": asdict(rewind)}

    def _done(self, rewind: Rewind) -> str:
        """Set the run back and return "", or why that failed; the next start goes on with it."""
        folder = self._trainer.run.folder
        try:
            begin_rewind(folder, rewind)
            finish_rewinds(folder)
            incident_mark(folder, self._attempt).touch()  # why this start ends is recorded
        except (OSError, ValueError, DataError, CheckpointError) as error:
            return f"{folder}: the run could not be set back: {error}"
        return ""

    def _record(
        self,
        kind: EventKind,
        text: str,
        batches: Sequence[MicroBatch],
        *,
        result: StepResult,
        seen: Seen,
    ) -> StepResult:
        """Write an incident once, however often a run that is started again comes by; collective.

        Returns:
            The step's result, of the pass whose gradients are there.
        """
        event = Event(kind=kind, text=text, onset_step=seen.onset_step, scores=seen.scores)
        recorded = self._recorder.record(event, batches, result)
        if torch.distributed.get_rank():
            return recorded.result
        trainer = self._trainer
        folder, batch = trainer.run.folder, trainer.batch
        incident = Incident(
            kind="diverged" if kind == "diverged" else "loss_spike",
            text=text,
            step=trainer.position.step,
            attempt=self._attempt,
            detail={
                "loss": result.loss,
                "gradient_norm": result.gradient_norm,
                "scores": {**seen.scores},
                "batch": batch,
                **recorded.detail,
            },
        )
        number = batch if kind in ("skip", "flagged") else seen.onset_step
        mark = spike_mark(folder, what=kind, number=number, num_rewinds=self.num_rewinds)
        record_incident(folder, incident, mark=mark)
        return recorded.result


def _num_rewinds(folder: Path) -> int:
    """Return how often a run has gone back, as rank 0 reads it; collective."""
    said: list[int | str] = [0, ""]
    if torch.distributed.get_rank() == 0:
        try:
            said[0] = len(read_rewinds(folder))
        except (OSError, ValueError) as error:
            said[1] = f"{folder}: {error}"
    number, failed = from_first_rank(said)
    if failed:
        raise OSError(failed)
    return int(number)
