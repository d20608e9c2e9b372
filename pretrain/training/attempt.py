"""Is this start of a run the only one, and is it worth making?

Rank 0 takes the run's lease (checkpoint/lease.py) for all ranks. Before, it looks at the starts
before this one: the end of one that said nothing becomes an incident, and after some that got
nowhere this one is refused, so that a fault that comes back each time does not burn a cluster
overnight.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from data.indexed.format import DataError
from parallel.agreement import from_first_rank
from pretrain.checkpoint.environment import running_versions
from pretrain.checkpoint.lease import (
    Attempt,
    HeldError,
    Lease,
    LeaseError,
    incident_mark,
    read_attempts,
    take_lease,
)
from pretrain.checkpoint.manifest import CheckpointError, list_checkpoints
from pretrain.checkpoint.retention import remove_debris
from pretrain.monitor.incidents import Incident, record_incident
from pretrain.monitor.secrets import scrub
from pretrain.training.exit_file import (
    DO_NOT_REQUEUE,
    FINISHED,
    INFRASTRUCTURE,
    INTERRUPTED,
    WRONG_INPUT,
    clear_exit,
)
from pretrain.training.rewind import finish_rewinds, read_rewinds
from pretrain.training.run import Run, as_json

log = logging.getLogger(__name__)

_UNREADABLE = (ValueError, DataError, CheckpointError)
_REGULAR_ENDS = (FINISHED, INTERRUPTED, WRONG_INPUT)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunAttempt:
    """This start of a run, as every rank knows it."""

    number: int
    """Which start; rises for ever."""
    lease: Lease | None
    """Rank 0's claim; None on the others."""

    def why_lost(self) -> str:
        """Return who has taken the run over; "" on other ranks than 0, and if nobody has."""
        return "" if self.lease is None else self.lease.why_lost()

    @property
    def is_lost(self) -> bool:
        """Whether this rank knows that the run was taken over; costs nothing."""
        return self.lease is not None and self.lease.is_lost

    def note(self, **changes: int | None) -> None:
        """Keep `from_step` or `committed_step` with the attempt; a full disk is only warned of."""
        if self.lease is not None:
            try:
                self.lease.note(**changes)
            except OSError as error:
                log.warning("the attempt's file was not written: %s", error)

    def end(self, *, code: int, reason: str) -> None:
        """Give the lease back."""
        if self.lease is not None:
            try:
                self.lease.end(code=code, reason=scrub(reason))
            except OSError as error:
                log.warning("the lease was not given back: %s", error)


def begin_attempt(run: Run) -> RunAttempt:
    """Claim the run's folder for this start; collective.

    Raises:
        HeldError: on every rank: another job holds it.
        LeaseError: on every rank: the last starts got nowhere.
        OSError: on every rank: the file system refuses.
        CheckpointError: on every rank: what the run says of its rewinds cannot be read or done.
    """
    said: dict[str, Any] = {}
    lease: Lease | None = None
    if torch.distributed.get_rank() == 0:
        try:
            lease = _claim(run)
            said = {"number": lease.number}
        except HeldError as error:
            said = {"held": str(error)}
        except LeaseError as error:
            said = {"refused": str(error)}
        except OSError as error:
            said = {"failed": f"{run.folder}: {error}"}
        except _UNREADABLE as error:
            said = {"wrong": f"{run.folder} cannot be gone on with: {error}"}
    said = from_first_rank(said)
    if "held" in said:
        raise HeldError(said["held"])
    if "refused" in said:
        raise LeaseError(said["refused"])
    if "failed" in said:
        raise OSError(said["failed"])
    if "wrong" in said:
        raise CheckpointError(said["wrong"])
    return RunAttempt(number=said["number"], lease=lease)


def _claim(run: Run) -> Lease:
    """Return the run's lease, with the folder as a start may find it; given back if that fails."""
    digest = _digest(run)
    lease = take_lease(run.folder, lease_s=run.restarts.lease_s, digest=digest)
    codes: dict[type[Exception], int] = {LeaseError: DO_NOT_REQUEUE, OSError: INFRASTRUCTURE}
    try:
        _make_ready(run, lease, digest=digest)
    except (LeaseError, OSError, *_UNREADABLE) as error:
        code = next((c for kind, c in codes.items() if isinstance(error, kind)), WRONG_INPUT)
        RunAttempt(number=lease.number, lease=lease).end(code=code, reason=str(error))
        raise
    return lease


def _make_ready(run: Run, lease: Lease, *, digest: str) -> None:
    before = read_attempts(run.folder)[:-1]
    if before and before[-1].code is None:
        _record_silent_end(run, before[-1])
    _refuse_without_progress(run, before, digest=digest)
    clear_exit(run.folder)
    remove_debris(run.folder / "checkpoints", below=f"{lease.number:08d}")
    finish_rewinds(run.folder)


def _digest(run: Run) -> str:
    """Return the digest of what decides how a start goes: configuration and code."""
    content = json.dumps([as_json(run), running_versions()], sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _refuse_without_progress(run: Run, attempts: Sequence[Attempt], *, digest: str) -> None:
    """Refuse to start again what got nowhere as often as is allowed.

    Raises:
        LeaseError: names the starts and how they ended.
    """
    most = run.restarts.without_progress
    in_vain: list[Attempt] = []
    rewound = {rewind.attempt for rewind in read_rewinds(run.folder)}  # recovery.max_rewinds' case
    newest = list_checkpoints(run.folder / "checkpoints")
    # a rank may have died between its commit and the note of it: the disk knows
    reached = int(newest[-1].name.removeprefix("step_")) if newest else 0
    has_later = False  # whether a later start has begun, which shows what was left of this one
    for attempt in reversed(attempts):
        if attempt.code == DO_NOT_REQUEUE:
            continue  # it was refused
        if (
            attempt.digest != digest
            or attempt.code in _REGULAR_ENDS
            or attempt.number in rewound
            or (attempt.from_step is not None and reached > attempt.from_step)
        ):
            break
        # One without a from_step ended before it knew where to begin, so it committed nothing. What
        # another committed on its nodes' disks may be gone with them: where the next one begins
        # shows it, and until then it counts neither way.
        if has_later or not attempt.has_progressed:
            in_vain.append(attempt)
        if attempt.from_step is not None:
            has_later, reached = True, max(reached, attempt.from_step)
    if len(in_vain) < most:
        return
    reasons = sorted({attempt.reason or "ended without a word" for attempt in in_vain[:most]})
    text = (
        f"the last {len(in_vain)} starts of {run.name} committed no checkpoint that lasted"
        f" ({'; '.join(reasons)[:300]}): it is not started again as it is. Read"
        f" {run.folder / 'incidents.jsonl'}; another configuration or commit starts anew, and so"
        f" does restarts.without_progress={len(in_vain) + most}"
    )
    mark = incident_mark(run.folder, in_vain[0].number).with_suffix(".no_progress")
    record_incident(run.folder, Incident(kind="no_progress", text=text), mark=mark)
    raise LeaseError(text)


def _record_silent_end(run: Run, attempt: Attempt) -> None:
    """Record the end of an attempt that nobody has recorded: all that knew of it are gone."""
    record_incident(
        run.folder,
        Incident(
            kind="rank_died",
            text=f"attempt {attempt.number} ended without a word; the run goes on from its newest"
            " checkpoint",
            node=attempt.owner.host,
            attempt=attempt.number,
            step=attempt.committed_step,
        ),
        mark=incident_mark(run.folder, attempt.number),
    )
