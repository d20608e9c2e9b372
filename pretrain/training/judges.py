"""Who looks at a step before it is applied, and in which order?

The state first (state_audit.py): where memory is wrong, the reason for all that follows is known.
Then whether the numbers are any (recheck.py), whether they come out again (step_sample.py), and
last whether they are those of a run that goes well (spike_judge.py).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from parallel.beats import Phase
from pretrain.checkpoint.lease import incident_mark
from pretrain.monitor.incidents import Incident, record_incident
from pretrain.training.flight_recorder import FlightRecorder
from pretrain.training.recheck import StepRecheck
from pretrain.training.spike_judge import SpikeJudge
from pretrain.training.state_audit import StateAudit
from pretrain.training.step_sample import StepSample
from pretrain.training.train_step import Judge
from pretrain.training.trainer import Trainer


@dataclass(frozen=True, kw_only=True, slots=True)
class Judges:
    """What looks at the numbers of a run."""

    audit: StateAudit
    """Also told of every update, and asked before every checkpoint."""
    of_steps: tuple[Judge, ...]
    """For `fit`, in order; the audit is the first."""
    num_rewinds: int
    """How often the run has gone back before this start."""


def judges_of(
    trainer: Trainer,
    *,
    attempt: int,
    why_lost: Callable[[], str],
    enter: Callable[[Phase, int], None],
    recorder: FlightRecorder,
) -> Judges:
    """Return the judges of a run that is about to go on; collective.

    Args:
        trainer: its state, taken as right from here on.
        attempt: which start of the run this is.
        why_lost: asked on rank 0 before a rewind: who has taken the run over, or "".
        enter: told what the rank does.
        recorder: writes down what was in a batch that stands out.
    """
    folder = trainer.run.folder

    def record(incident: Incident) -> None:
        ends = incident.kind == "suspect_device"  # what neighbours say later is no news
        mark = incident_mark(folder, attempt) if ends else None
        record_incident(folder, replace(incident, attempt=attempt), mark=mark)

    audit = StateAudit(trainer, record=record, enter=enter)
    recheck = StepRecheck(trainer, record=record, enter=enter, witness=recorder.record_non_finite)
    sample = StepSample(trainer, record=record, enter=enter)
    spikes = SpikeJudge(trainer, attempt=attempt, why_lost=why_lost, enter=enter, recorder=recorder)
    return Judges(
        audit=audit,
        of_steps=(audit, recheck, sample, spikes),
        num_rewinds=spikes.num_rewinds,
    )
