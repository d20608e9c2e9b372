"""Steps under all judges while faults are planted, for tests of them; run on every rank."""

import hashlib
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from parallel import groups
from parallel.failpoints import arm
from pretrain.checkpoint.pieces import pieces_of_rank
from pretrain.monitor.incidents import Incident
from pretrain.training.fit import fit
from pretrain.training.recheck import StepRecheck
from pretrain.training.run import Run
from pretrain.training.state_audit import StateAudit
from pretrain.training.step_sample import StepSample
from pretrain.training.suspicion import LeftOutError, SuspectDeviceError
from pretrain.training.train_step import StepResult
from pretrain.training.verify import make_trainer


@dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
    """What a rank's steps have left."""

    losses: tuple[tuple[str, str], ...]
    """Loss and norm of each step, as hexadecimal."""
    digest: str
    """Of all that the rank would save, of what it has read, and of the ledger."""
    incidents: tuple[dict[str, Any], ...]
    """Rank 0 has them."""
    ended: str
    """Name of the error that ended it."""
    skipped: tuple[tuple[int, int], ...]
    """Ranges of batches that its ledger leaves out."""


def judged_steps(run: Run, *, faults: str, folder: str, num_steps: int) -> Judged:
    """Train some steps under the judges of a run.

    Args:
        run: the configuration.
        faults: as FAULTS names them.
        folder: where faults leave their marks; empty.
        num_steps: at which to stop.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    kept = {name: os.environ.get(name) for name in ("FAULTS", "FAULTS_FOLDER", "RANK")}
    groups.join_world()
    rank = str(torch.distributed.get_rank())
    os.environ.update(FAULTS=faults, FAULTS_FOLDER=folder, RANK=rank)
    arm()
    try:
        return _judged(run, num_steps=num_steps)
    finally:
        os.environ.update({name: value for name, value in kept.items() if value is not None})
        for name in (name for name, value in kept.items() if value is None):
            del os.environ[name]
        os.environ.pop("FAULTS", None)
        arm()


def _judged(run: Run, *, num_steps: int) -> Judged:
    trainer = make_trainer(run)
    incidents: list[Incident] = []
    losses: list[tuple[str, str]] = []

    def enter(_phase: str, _step: int) -> None: ...

    audit = StateAudit(trainer, record=incidents.append, enter=enter)

    def monitor(result: StepResult, _: int) -> None:
        audit.after_update()
        losses.append((result.loss.hex(), result.gradient_norm.hex()))

    ended = ""
    try:
        fit(
            trainer,
            monitor=monitor,
            checkpoint=lambda _: audit.before_save(),
            should_stop=lambda: trainer.position.step >= num_steps,
            enter=enter,
            judges=(
                audit,
                StepRecheck(trainer, record=incidents.append, enter=enter),
                StepSample(trainer, record=incidents.append, enter=enter),
            ),
        )
    except (SuspectDeviceError, LeftOutError) as error:  # on every rank alike
        ended = type(error).__name__
    digest = "" if ended else digest_of(trainer)
    trainer.close()
    return Judged(
        losses=tuple(losses),
        digest=digest,
        incidents=tuple(asdict(incident) for incident in incidents),
        ended=ended,
        skipped=tuple((skipped.start, skipped.stop) for skipped in trainer.ledger.skipped()),
    )


def digest_of(trainer: Any) -> str:
    """Return a digest of all that a rank would save, and of what it has read; collective."""
    digest = hashlib.sha256(f"{trainer.take_consumed():x}".encode())
    pieces: list[Any] = pieces_of_rank(trainer.chunks, trainer.optimizer)
    for piece in sorted(pieces, key=lambda p: (p.key, p.start)):
        digest.update(f"{piece.key}{piece.start}".encode())
        digest.update(piece.values.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
