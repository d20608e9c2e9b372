"""From which of its checkpoints does a run go on: shared storage, or the nodes' own disks?

From the later one. What the nodes hold counts only if all ranks hold it whole
(checkpoint/local_steps.py); where a later local step does not count, an incident says why the run
goes back to an earlier one.
"""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from parallel.agreement import all_gather_json, from_first_rank
from pretrain.checkpoint.continuity import check_same_run
from pretrain.checkpoint.environment import check_same_environment
from pretrain.checkpoint.lease import read_attempts
from pretrain.checkpoint.local_place import LocalPlace, make_identity
from pretrain.checkpoint.local_resume import LocalFound, find_local, keep_only
from pretrain.checkpoint.local_steps import digest_of
from pretrain.checkpoint.manifest import CheckpointError, Manifest, list_checkpoints
from pretrain.checkpoint.sharded import agree_on_newest
from pretrain.monitor.incidents import Incident, record_incident, this_node
from pretrain.training.corpus import Corpus
from pretrain.training.rewind import read_rewinds, why_not_from_the_start
from pretrain.training.run import Run, as_json

log = logging.getLogger(__name__)

Found = tuple[Path, Manifest]


@dataclass(frozen=True, kw_only=True, slots=True)
class Begin:
    """Where a start of a run goes on from."""

    found: Found | None
    """The checkpoint; None: the run begins."""
    place: LocalPlace | None = None
    """Where this rank keeps its own; None: nowhere."""
    counting: tuple[int, ...] = ()
    """Steps there that all ranks have."""


def find_begin(run: Run) -> Begin:
    """Return from where a run goes on; who calls it holds the run; collective.

    Raises:
        ValueError: on every rank, if a folder of the local tier is somebody else's.
        CheckpointError: if all shared checkpoints are damaged, or ranks see unlike files; if there
            is none any more, and the run has been further than its beginning.
        OSError: if shared storage does not answer.
    """
    begin = _find_begin(run)
    if begin.found is None:
        is_first = torch.distributed.get_rank() == 0
        if why := from_first_rank(why_not_from_the_start(run.folder) if is_first else ""):
            raise CheckpointError(why)
    return begin


def _find_begin(run: Run) -> Begin:
    root = run.folder / "checkpoints"
    place = _open_place(run)
    if place is None:
        return Begin(found=agree_on_newest(root, on_damage=partial(_damaged, run)))
    local = find_local(
        place,
        config=digest_of(as_json(run)),
        went_on_from=_went_on_from(run),
        on_damage=partial(_local_damaged, run),
    )
    found = local.newest
    steps: list[int] = from_first_rank([_step(folder) for folder in list_checkpoints(root)])
    shared_step = max(steps, default=0)
    if found is None or (steps and shared_step >= found[1].step):
        shared = _newest_shared(run, or_else=found)
        if found is None or (shared is not None and shared[1].step >= found[1].step):
            found = shared
    step = 0 if found is None else found[1].step
    if place.rank == 0:
        _say_what_is_lost(run, local, step=step, shared_step=shared_step, found=found)
    counting = tuple(held for held in local.counting if held <= step)
    keep_only(place, steps=counting, node=this_node())
    return Begin(found=found, place=place, counting=counting)


def _newest_shared(run: Run, *, or_else: Found | None) -> Found | None:
    """Return the newest whole shared checkpoint; collective.

    Raises:
        CheckpointError: on every rank, if all are damaged and there is no other to go on from.
    """
    try:
        return agree_on_newest(run.folder / "checkpoints", on_damage=partial(_damaged, run))
    except CheckpointError as error:
        if or_else is None:
            raise
        log.warning("%s; going on from the nodes' own disks, step %d", error, or_else[1].step)
        return None


def _open_place(run: Run) -> LocalPlace | None:
    """Return this rank's place on its node's disk, its folders made; collective.

    A disk that refuses is said aloud: saves there will fail, and the run goes on without them.

    Raises:
        ValueError: on every rank, if a folder is somebody else's.
    """
    folder = run.checkpoints.local.folder
    if folder is None:
        return None
    place = LocalPlace(
        folder=folder,
        run_folder=run.folder,
        identity=_agreed_identity(run),
        rank=torch.distributed.get_rank(),
        node=re.sub("[^A-Za-z0-9._-]", "_", this_node()),
    )
    refused = ""
    try:
        place.make()
    except (ValueError, FileExistsError, NotADirectoryError) as error:
        refused = f"rank {place.rank} on {this_node()}: {error}"
    except OSError as error:
        log.warning("no local checkpoints on %s: %s", this_node(), error)
    said = [text for text in all_gather_json(refused) if text]
    if said:
        raise ValueError(said[0])
    return place


def _agreed_identity(run: Run) -> str:
    """Return the run's identity, drawn by rank 0 if it has none; collective.

    Raises:
        OSError: on every rank, if shared storage refuses.
    """
    said = ["", "", ""]
    if torch.distributed.get_rank() == 0:
        try:
            said[0] = make_identity(run.folder / "checkpoints")
        except OSError as error:
            said[1] = f"{run.folder / 'checkpoints'}: {error}"
        except ValueError as error:
            said[2] = str(error)
    identity, failed, refused = from_first_rank(said)
    if refused:
        raise ValueError(refused)
    if failed:
        raise OSError(failed)
    return identity


def _went_on_from(run: Run) -> dict[int, int]:
    """Return from which step each start of a run has gone on, as rank 0 reads it; collective.

    The start after one that has set the run back goes on from where it was set back to, whether it
    has begun or not.
    """
    found: dict[int, int] = {}
    if torch.distributed.get_rank() == 0:
        for attempt in read_attempts(run.folder):
            if attempt.from_step is not None:
                found[attempt.number] = attempt.from_step
        for rewind in read_rewinds(run.folder):
            after = rewind.attempt + 1
            found[after] = min(found.get(after, rewind.to_step), rewind.to_step)
    pairs: list[list[int]] = from_first_rank([[number, step] for number, step in found.items()])
    return {number: step for number, step in pairs}


def _say_what_is_lost(
    run: Run, local: LocalFound, *, step: int, shared_step: int, found: Found | None
) -> None:
    """Record that a step which was committed on the nodes is not gone on from, and why."""
    begun = [attempt for attempt in read_attempts(run.folder) if attempt.from_step is not None]
    rewinds = read_rewinds(run.folder)
    if begun and rewinds and rewinds[-1].attempt == begun[-1].number:
        return  # it was set back on purpose
    reached = max(begun[-1].from_step or 0, begun[-1].committed_step or 0) if begun else 0
    if reached <= step or reached <= shared_step or reached in local.damaged:
        return  # nothing is lost, or its damage is an incident already
    reasons = [f"step {v.step}: {v.problem}" for v in local.passed_over if v.step > step]
    reasons = reasons or [f"step {reached}: no rank has it any more"]
    where = "from the beginning" if found is None else f"from {found[0]}"
    text = f"going on {where}, though later steps were saved on the nodes: {reasons[-1]}"
    record_incident(
        run.folder,
        Incident(kind="local_lost", text=text, step=step, detail={"reasons": reasons[-20:]}),
    )


def check_local(run: Run, corpus: Corpus, begin: Begin) -> None:
    """Refuse what start.py refuses of shared checkpoints; it has not seen the nodes' own.

    Raises:
        CheckpointError: if tokenizer or windows are others than the local checkpoint's, or packages
            and code, where the run is to refuse that.

    Collective: every rank calls it.
    """
    if begin.found is None or not begin.found[1].is_local:
        return
    folder, manifest = begin.found
    check_same_run(
        manifest,
        folder=folder,
        config=as_json(run),
        tokenizer_digest=corpus.manifest.tokenizer_digest,
        windows_digest=corpus.train.header.tokenizer_sha256,
    )
    if run.on_other_environment == "refuse":
        refused = ""
        if torch.distributed.get_rank() == 0:  # its manifest says what the run ran with
            try:
                check_same_environment(manifest, folder=folder)
            except CheckpointError as error:
                refused = str(error)
        if refused := from_first_rank(refused):
            raise CheckpointError(refused)


def _damaged(run: Run, folder: Path, damage: list[str]) -> None:
    text = f"{folder.name} is damaged and set aside; the run goes on from the one before"
    record_incident(
        run.folder, Incident(kind="damaged_checkpoint", text=text, detail={"files": damage[:20]})
    )


def _local_damaged(run: Run, step: int, damage: Mapping[int, str]) -> None:
    ranks = sorted(damage)
    text = (
        f"local step {step} is damaged on ranks {ranks[:8]} and removed; the run goes on from a"
        " checkpoint before it"
    )
    record_incident(
        run.folder,
        Incident(
            kind="damaged_checkpoint",
            text=text,
            step=step,
            rank=ranks[0],
            detail={"files": [damage[rank] for rank in ranks[:20]]},
        ),
    )


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))
