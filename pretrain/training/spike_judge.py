"""Is this step taken, left out, or the last before the run goes back?

The judge that `fit` asks about each measured step (train_step.py): it shows the step's reduced
numbers to the run's detector and does what the policy says (recovery.py). A batch that is left out
changes nothing of the detector, so that it makes no difference whether it was left out just now or
by an entry of the ledger after the run was started again.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from data.indexed.format import DataError
from parallel.agreement import from_first_rank
from parallel.schedule import MicroBatch
from pretrain.checkpoint.lease import HeldError, incident_mark
from pretrain.checkpoint.manifest import CheckpointError, list_checkpoints
from pretrain.monitor.incidents import Incident, record_incident
from pretrain.monitor.loss_spikes import Seen
from pretrain.training.recovery import reason_to_skip, stage_name
from pretrain.training.rewind import (
    NoWayBackError,
    begin_rewind,
    finish_rewinds,
    plan_rewind,
    read_rewinds,
    spike_mark,
    step_of,
)
from pretrain.training.train_step import StepResult, Verdict
from pretrain.training.trainer import Trainer


class RewoundError(RuntimeError):
    """The run has gone back to an older checkpoint, and goes on from it when it is started."""


class SpikeJudge:
    """Answers the spikes of a run; each rank has one."""

    def __init__(self, trainer: Trainer, *, attempt: int, why_lost: Callable[[], str]) -> None:
        """Look up how often the run has gone back; collective.

        Args:
            trainer: whose steps are judged.
            attempt: number of this start.
            why_lost: asked on rank 0 before a rewind: who has taken the run over, or "".
        """
        self._trainer = trainer
        self._attempt = attempt
        self._why_lost = why_lost
        folder = trainer.run.folder
        self._num_rewinds = int(from_first_rank(len(read_rewinds(folder))))

    def __call__(self, batches: Sequence[MicroBatch], result: StepResult) -> Verdict:
        """Return what becomes of a step; collective.

        Raises:
            RewoundError: on every rank: the run is set back, and this start ends.
            NoWayBackError: on every rank: it diverges, and may not or cannot go back.
            HeldError: on every rank: it is another job's by now.
            OSError: on every rank: storage refused.
        """
        if not result.is_finite:
            return Verdict(result=result)  # apply_step refuses it; its number says nothing
        trainer, recovery = self._trainer, self._trainer.run.recovery
        values = {"loss": result.loss, "gradient_norm": result.gradient_norm}
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
            self._record("skip", text, number=trainer.batch, values=values, seen=seen)
            return Verdict(result=result, leave_out=reason)
        seen = trainer.spikes.observe(values, step=trainer.position.step, stage=stage)
        trainer.seen = seen
        if seen.event == "alarm":
            text = f"the loss or the gradient norm spikes from step {seen.onset_step} on"
            self._record("spike", text, number=seen.onset_step, values=values, seen=seen)
        if seen.event == "diverged":
            if recovery.policy == "rewind":
                self._go_back(seen)
            text = (
                f"the loss diverges from step {seen.onset_step} on; the run goes on, as"
                f" recovery.policy={recovery.policy} says"
            )
            self._record("diverged", text, number=seen.onset_step, values=values, seen=seen)
        return Verdict(result=result)

    def _go_back(self, seen: Seen) -> None:
        """Set the run back, on rank 0 for all; collective.

        Raises:
            as __call__; it never returns.
        """
        self._trainer.saver.wait()  # a checkpoint that commits later would be the newest
        said: dict[str, str] = {}
        if torch.distributed.get_rank() == 0:
            said = self._decide(seen)
        said = from_first_rank(said)
        errors = {"held": HeldError, "failed": OSError, "no way": NoWayBackError}
        for name, error in errors.items():
            if name in said:
                raise error(said[name])
        raise RewoundError(said["done"])

    def _decide(self, seen: Seen) -> dict[str, str]:
        trainer, folder = self._trainer, self._trainer.run.folder
        if lost := self._why_lost():
            return {"held": lost}
        try:
            rewind = plan_rewind(
                trainer.run.recovery,
                trainer.ledger,
                onset_step=seen.onset_step,
                step=trainer.position.step,
                checkpoints=[step_of(path) for path in list_checkpoints(folder / "checkpoints")],
                before=read_rewinds(folder),
                attempt=self._attempt,
            )
            begin_rewind(folder, rewind)
            finish_rewinds(folder)
            incident_mark(folder, self._attempt).touch()  # why this start ends is recorded
        except NoWayBackError as error:
            step = trainer.position.step
            record_incident(folder, Incident(kind="diverged", text=str(error), step=step))
            return {"no way": str(error)}
        except (OSError, ValueError, DataError, CheckpointError) as error:
            return {"failed": f"{folder}: the run could not be set back: {error}"}
        return {
            "done": f"the loss diverged from step {rewind.onset_step} on: the run goes on from"
            f" step {rewind.to_step}, rewind {rewind.number} of recovery.max_rewinds="
            f"{trainer.run.recovery.max_rewinds}"
        }

    def _record(
        self, what: str, text: str, *, number: int, values: dict[str, Any], seen: Seen
    ) -> None:
        """Write an incident once, however often a run that is started again comes by."""
        if torch.distributed.get_rank():
            return
        folder = self._trainer.run.folder
        incident = Incident(
            kind="diverged" if what == "diverged" else "loss_spike",
            text=text,
            step=self._trainer.position.step,
            attempt=self._attempt,
            detail={**values, "scores": {**seen.scores}, "batch": self._trainer.batch},
        )
        mark = spike_mark(folder, what=what, number=number, num_rewinds=self._num_rewinds)
        record_incident(folder, incident, mark=mark)
