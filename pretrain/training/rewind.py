"""How does a run go back to before a divergence, even if it is killed on the way?

A record in `recovery/` is the decision, written first and all at once; without it nothing has
begun. Then, in this order: checkpoints newer than the one to go back to get another name, newest
first; the ledger gets its entry; the incident is written; a mark says that it is done. Each of
these may be done twice, and a start that finds a record without its mark does all of them: the
rest of a rewind never depends on who began it. Until the ledger is written the newest checkpoint
and the ledger fit each other at every point, so that a start's own checks have nothing to refuse.
Rank 0 alone calls what writes. No torch: `start.py` reads the records.
"""

import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data.indexed.atomic import write_bytes
from data.stream.ledger import Entry, Ledger, read_ledger, write_ledger
from parallel.failpoints import failpoint
from pretrain.checkpoint.aside import set_aside
from pretrain.checkpoint.manifest import (
    CheckpointError,
    list_checkpoints,
    read_manifest,
    sync_folder,
)
from pretrain.monitor.event_bundle import find_bundles
from pretrain.monitor.event_bundle import step_of as bundle_step
from pretrain.monitor.incidents import Incident, record_incident
from pretrain.training.corpus import LEDGER_NAME
from pretrain.training.recovery import Recovery

log = logging.getLogger(__name__)

FOLDER_NAME = "recovery"
_SLOW_FROM = 3
_MOST_IN_ONE_PLACE = 4
_MOST_GROWTH = 4
"""A row of rewinds in one place leaves out 1, 2, 4 and 4 times `recovery.max_skipped_batches`."""
_MOST_OF_THE_RUN = 0.2
"""Our choice: a run without a fifth of its text is another run; batches are not to blame then."""
_FACTOR = 0.5
"""OPT-175B went on after divergences with lower rates (arXiv 2205.01068, section 2.5)."""


class NoWayBackError(RuntimeError):
    """A divergence that no rewind answers: a person decides."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rewind:
    """One decision to go back."""

    number: int
    """From 1."""
    attempt: int
    """The start of the run that decided it."""
    onset_step: int
    """Steps done when the spike began."""
    step: int
    """Steps done when it was recognised as a divergence."""
    to_step: int
    """Of the checkpoint to go back to."""
    times: int
    """1: the first in its place, 2: the second, ..."""
    first_batch: int
    """First that is left out."""
    num_batches: int
    """How many are."""
    slow_batches: int = 0
    """Batches after them that are trained on with half the learning rate."""

    @property
    def entries(self) -> tuple[Entry, ...]:
        """What it adds to the ledger."""
        reason = (
            f"divergence from step {self.onset_step} on, recognised at step {self.step}: rewind"
            f" {self.number} to step {self.to_step}"
        )
        first, num = self.first_batch, self.num_batches
        skip = Entry(kind="skip", first_batch=first, num_batches=num, reason=reason)
        if not self.slow_batches:
            return (skip,)
        slow = Entry(
            kind="rate",
            first_batch=first + num,
            num_batches=self.slow_batches,
            reason=f"{reason}, the {self.times}th in its place",
            factor=_FACTOR,
        )
        return (skip, slow)


def plan_rewind(
    recovery: Recovery,
    ledger: Ledger,
    *,
    onset_step: int,
    step: int,
    checkpoints: Sequence[int],
    before: Sequence[Rewind],
    attempt: int,
) -> Rewind:
    """Return where a run goes back to, and which batches it then leaves out.

    Args:
        recovery: margins and limits.
        ledger: of the run.
        onset_step: steps done when the spike began.
        step: steps done now.
        checkpoints: their steps, rising.
        before: the rewinds of the run, in order.
        attempt: number of this start.

    Raises:
        NoWayBackError: if the run has gone back too often, altogether or in this place, or its
            rewinds have left out too much; if no checkpoint is older than the onset, or nothing of
            the run would be left.
    """
    num_batches = ledger.timetable().num_batches
    if len(before) >= recovery.max_rewinds:
        raise NoWayBackError(
            f"the loss diverges from step {onset_step} on, and the run has gone back"
            f" {len(before)} times, recovery.max_rewinds={recovery.max_rewinds} are allowed: it"
            " needs a person. Lower optimizer.lr with change.allow, or raise the limit"
        )
    old = [saved for saved in checkpoints if saved <= onset_step]
    if not old:
        raise NoWayBackError(
            f"the loss diverges from step {onset_step} on, and there is no checkpoint from before"
            f" it (steps {list(checkpoints)}): it needs a person. Lower checkpoints.interval_steps"
            " or raise checkpoints.keep"
        )
    wanted = onset_step - recovery.margin_steps
    to_step = max((saved for saved in old if saved <= wanted), default=old[0])
    times = 1 + len(_in_the_same_place(recovery, before, onset_step=onset_step))
    _refuse_too_many(before, onset_step=onset_step, times=times, num_batches=num_batches)
    first = ledger.batch_of(max(wanted, to_step))
    stop = ledger.batch_of(step) + 1 + recovery.margin_steps
    growth = min(2 ** (times - 1), _MOST_GROWTH)
    length = max(1, min(stop - first, recovery.max_skipped_batches) * growth)
    if first + length >= num_batches:
        raise NoWayBackError(
            f"the loss diverges from step {onset_step} on, and without the batches {first} to"
            f" {first + length - 1} nothing of the run's {num_batches} would be left to train on:"
            " it needs a person. Lower recovery.margin_steps or recovery.max_skipped_batches, or"
            " optimizer.lr with change.allow"
        )
    return Rewind(
        number=len(before) + 1,
        attempt=attempt,
        onset_step=onset_step,
        step=step,
        to_step=to_step,
        times=times,
        first_batch=first,
        num_batches=length,
        slow_batches=recovery.slow_batches if times >= _SLOW_FROM else 0,
    )


def _refuse_too_many(
    before: Sequence[Rewind], *, onset_step: int, times: int, num_batches: int
) -> None:
    """Refuse a rewind where the ones before have shown that batches are not the reason.

    Raises:
        NoWayBackError: names what was given and what is allowed.
    """
    if times > _MOST_IN_ONE_PLACE:
        raise NoWayBackError(
            f"the loss diverges from step {onset_step} on, and the run has gone back {times - 1}"
            f" times from there; {_MOST_IN_ONE_PLACE} rewinds in one place are allowed: it needs a"
            " person. Lower optimizer.lr with change.allow"
        )
    gone = {b for r in before for b in range(r.first_batch, r.first_batch + r.num_batches)}
    if len(gone) > _MOST_OF_THE_RUN * num_batches:
        raise NoWayBackError(
            f"the loss diverges from step {onset_step} on, and rewinds have left out {len(gone)} of"
            f" the run's {num_batches} batches, {int(_MOST_OF_THE_RUN * num_batches)} are allowed:"
            " it needs a person. Lower optimizer.lr with change.allow, or begin a new run"
        )


def _in_the_same_place(
    recovery: Recovery, before: Sequence[Rewind], *, onset_step: int
) -> Sequence[Rewind]:
    """Return the rewinds that went back from where a run diverges again, newest first."""
    found: list[Rewind] = []
    for rewind in reversed(before):
        if (
            not 0
            <= onset_step - rewind.to_step
            <= rewind.step - rewind.to_step + (recovery.margin_steps)
        ):
            break
        found.append(rewind)
    return found


def begin_rewind(folder: Path, rewind: Rewind) -> None:
    """Decide on a rewind: from now on every start of the run finishes it first.

    What earlier rewinds have set aside is removed: nobody has asked for it since.

    Args:
        folder: the run's.
        rewind: what `plan_rewind` gave.

    Raises:
        OSError: if it could not be written; then nothing has begun.
    """
    _remove_rewound(folder / "checkpoints")
    path = _path(folder, rewind.number)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, (json.dumps(asdict(rewind)) + "\n").encode())
    failpoint("rewind.decided", step=rewind.step)


def _remove_rewound(root: Path) -> None:
    for path in root.glob("rewound_step_*"):
        # what is left of it counts as debris; after a dot its number would pass for an attempt's
        doomed = root / f".deleting_{path.name.replace('.', '_')}"
        try:
            path.rename(doomed)
            shutil.rmtree(doomed)
        except OSError as error:
            log.warning("%s could not be removed: %s", path, error)


def finish_rewinds(folder: Path) -> None:
    """Do what is left of a rewind that was decided; nothing where none is under way.

    Args:
        folder: the run's.

    Raises:
        OSError: if storage refuses; the next start goes on with it.
        ValueError: if a record cannot be read.
        DataError: if the run's ledger cannot be read, or does not take the entries.
        CheckpointError: if there is no ledger, and no checkpoint to go back to that has it.
    """
    for rewind in read_rewinds(folder):
        if not _path(folder, rewind.number).with_suffix(".done").exists():
            _finish(folder, rewind)


def _finish(folder: Path, rewind: Rewind) -> None:
    root = folder / "checkpoints"
    newer = [path for path in list_checkpoints(root) if step_of(path) > rewind.to_step]
    for path in reversed(newer):
        if set_aside(path, why="rewound") is None:
            raise OSError(f"{path} could not be renamed, so the run cannot go back")
        failpoint("rewind.set_aside", step=rewind.step)
    if root.is_dir():
        sync_folder(root)
    ledger = _ledger(folder, rewind)
    for entry in rewind.entries:
        if entry not in ledger.entries:
            ledger = ledger.with_entry(entry)
            write_ledger(folder / LEDGER_NAME, ledger)
    failpoint("rewind.ledger", step=rewind.step)
    path = _path(folder, rewind.number)
    text = (
        f"the loss diverges from step {rewind.onset_step} on: the run goes back to step"
        f" {rewind.to_step}, without the batches {rewind.first_batch} to"
        f" {rewind.first_batch + rewind.num_batches - 1}"
    )
    incident = Incident(
        kind="diverged",
        text=text,
        step=rewind.step,
        attempt=rewind.attempt,
        detail={
            **asdict(rewind),
            "set_aside": [path.name for path in newer],
            "bundles": [
                f"{path.parent.name}/{path.name}"
                for path in find_bundles(folder)
                if rewind.onset_step <= bundle_step(path) <= rewind.step
            ],
        },
    )
    record_incident(folder, incident, mark=path.with_suffix(".incident"))
    write_bytes(path.with_suffix(".done"), b"")


def _ledger(folder: Path, rewind: Rewind) -> Ledger:
    path = folder / LEDGER_NAME
    if path.is_file():
        return read_ledger(path)
    kept = {step_of(path): path for path in list_checkpoints(folder / "checkpoints")}
    if rewind.to_step not in kept:
        raise CheckpointError(
            f"rewind {rewind.number} of {folder} goes back to step {rewind.to_step}, but there is"
            f" neither {LEDGER_NAME} nor a checkpoint of that step (there are {sorted(kept)}):"
            " restore one of them"
        )
    manifest = read_manifest(kept[rewind.to_step])
    return Ledger.from_json(manifest.ledger, source=str(kept[rewind.to_step]))


def read_rewinds(folder: Path) -> list[Rewind]:
    """Return the rewinds of a run, in order.

    Raises:
        ValueError: if a record cannot be read.
    """
    found: list[Rewind] = []
    for path in sorted((folder / FOLDER_NAME).glob("rewind_*.json")):
        try:
            record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            found.append(Rewind(**record))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} cannot be read as a rewind: {error}") from error
    return found


def why_not_from_the_start(folder: Path) -> str:
    """Return why a run that has no checkpoint must not begin at step 0; "" if it may.

    Args:
        folder: the run's.
    """
    root = folder / "checkpoints"
    found = [*root.glob("rewound_step_*"), *root.glob("damaged_step_*")]
    found += (folder / FOLDER_NAME).glob("rewind_*.json")
    if not found:
        return ""
    names = ", ".join(sorted(str(path.relative_to(folder)) for path in found)[:5])
    return (
        f"{folder} has no checkpoint to go on from, but it has had some ({names}): a start from"
        " step 0 would train all over again. Rename one of them that is whole to step_*, or move"
        " the folder away to begin anew"
    )


def step_of(checkpoint: Path) -> int:
    """Return the steps done by a checkpoint, from its folder's name."""
    return int(checkpoint.name.removeprefix("step_"))


def spike_mark(folder: Path, *, what: str, number: int, num_rewinds: int) -> Path:
    """Return the file that says that an incident of a spike is recorded.

    Args:
        folder: the run's.
        what: the kind of its event.
        number: of the batch, or of the step.
        num_rewinds: so far; after a rewind the same number is another spike.
    """
    name = f"{what}_{number:08d}.{num_rewinds}.incident"
    return folder / FOLDER_NAME / name


def _path(folder: Path, number: int) -> Path:
    return folder / FOLDER_NAME / f"rewind_{number:04d}.json"
