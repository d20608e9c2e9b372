"""Which checkpoints stay?

The newest `keep` that are verified: written or loaded by this attempt, or read again now and found
as they were written. A damaged one is set aside under another name and counts for nothing, so that
no number of bad saves pushes out the last good one.
"""

import logging
import os
import shutil
from pathlib import Path

import torch

from parallel.agreement import all_gather_json, from_first_rank
from parallel.failpoints import failpoint
from pretrain.checkpoint.aside import set_aside
from pretrain.checkpoint.manifest import (
    MANIFEST_NAME,
    CheckpointError,
    Manifest,
    SchemaError,
    UnreadableError,
    content_digest,
    find_damage,
    list_checkpoints,
    read_manifest,
    share_of_files,
    step_folder,
)

log = logging.getLogger(__name__)

_MOST_SIZES = 64
"""Files whose size every rank looks at; at 1,536 ranks all sizes would be two million calls."""
_DEBRIS = (".writing_*", ".deleting_*")


class Retention:
    """Removes old checkpoints of a run; each rank has one."""

    def __init__(self, root: Path, *, keep: int, purpose: str, token: str) -> None:
        """Know no verified checkpoint yet.

        Args:
            root: folder of the run's checkpoints.
            keep: how many verified ones stay, at least 1.
            purpose: whose group ranks agree over.
            token: of this attempt, as in the names of unfinished saves.
        """
        self._root, self._keep, self._purpose, self._token = root, keep, purpose, token
        self._verified: set[str] = set()
        self._hold: str | None = None

    def trust(self, folder: Path) -> None:
        """Count a checkpoint as verified."""
        self._verified.add(folder.name)

    def hold(self, step: int | None) -> None:
        """Keep the newest checkpoint of at most `step` steps, and all after it; None: do not."""
        self._hold = None if step is None else step_folder(self._root, step).name

    def remove_old(self, *, step: int) -> None:
        """Remove all but the newest `keep` verified checkpoints, and debris; collective.

        Args:
            step: of the save that was just committed.
        """
        names: list[str] = from_first_rank(self._names(), purpose=self._purpose)
        kept: list[str] = []
        damaged: list[str] = []
        try:
            for name in reversed(names):
                if len(kept) >= self._keep and not (self._hold and kept[-1] > self._hold):
                    break
                is_whole = name in self._verified or self._verify(name)
                (kept if is_whole else damaged).append(name)
        except (UnreadableError, CheckpointError) as error:  # the same on all ranks
            log.warning("nothing of %s is removed now: %s", self._root, error)
            return
        if torch.distributed.get_rank() == 0:
            try:
                for name in damaged:
                    set_aside(self._root / name)
                self._delete([name for name in names if name not in (*kept, *damaged)], step=step)
            except OSError as error:
                log.warning("old checkpoints of %s could not be removed: %s", self._root, error)

    def _names(self) -> list[str]:
        """Return the checkpoints that rank 0 sees, oldest first."""
        if torch.distributed.get_rank():
            return []
        try:
            return [folder.name for folder in list_checkpoints(self._root)]
        except OSError as error:
            log.warning("%s cannot be listed: %s", self._root, error)
            return []

    def _verify(self, name: str) -> bool:
        """Return whether a checkpoint is as it was written; each rank reads a share of it."""
        if find_damage_together(self._root / name, purpose=self._purpose):
            return False
        self.trust(self._root / name)
        return True

    def _delete(self, names: list[str], *, step: int) -> None:
        for name in names:
            doomed = self._root / f".deleting_{name}"
            shutil.rmtree(doomed, ignore_errors=True)
            os.rename(self._root / name, doomed)  # from here on nobody takes it for a checkpoint
            failpoint("save.retention", step=step)
            shutil.rmtree(doomed)
        remove_debris(self._root, below=self._token)


def find_damage_together(folder: Path, *, purpose: str) -> list[str]:
    """Return what is wrong with a checkpoint, the same on every rank; each reads a share of it.

    Rank 0 reads again what any rank complains of: a file that is whole there, and not elsewhere, is
    no damage but another file.

    Args:
        folder: the checkpoint.
        purpose: whose group ranks agree over.

    Raises:
        CheckpointError: on every rank, if ranks see unlike files.
        UnreadableError: on every rank, if storage does not give a file, or other code wrote it:
            that is no damage.

    Collective: every rank calls it.
    """
    rank, num_ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    own: dict[str, str] = {}
    manifest: Manifest | None = None
    digest = unreadable = ""
    try:
        manifest = read_manifest(folder)
        digest = content_digest((folder / MANIFEST_NAME).read_bytes())
        shared = share_of_files(manifest, rank=rank, num_ranks=num_ranks)
        looked_at = [*manifest.files][:_MOST_SIZES]
        own = find_damage(folder, manifest, digests=False, names=looked_at)
        own |= find_damage(folder, manifest, digests=True, names=shared)
    except OSError as error:
        unreadable = str(error)
    except SchemaError as error:
        unreadable = str(error)
    except CheckpointError as error:
        own = {MANIFEST_NAME: str(error)}
    everyone = all_gather_json([digest, own, unreadable], purpose=purpose)
    said = [text for _, _, text in everyone if text]
    if said:
        raise UnreadableError(said[0])
    names = sorted({name for _, damage, _ in everyone for name in damage})
    verdict: list[list[str]] = [[], []]
    if rank == 0:
        verdict = _confirmed(folder, manifest, own, names)
    confirmed, unreadable_now = from_first_rank(verdict, purpose=purpose)
    if unreadable_now:
        raise UnreadableError(unreadable_now[0])
    digests = {digest for digest, _, _ in everyone}
    if not confirmed and (names or len(digests) > 1):
        others = [r for r, words in enumerate(everyone) if words != [everyone[0][0], {}, ""]]
        text = next((t for _, damage, _ in everyone for t in damage.values()), "another manifest")
        raise CheckpointError(
            f"ranks {others[:8]} of {num_ranks} see other files of {folder} than rank 0: {text};"
            " all ranks must see the same files"
        )
    return confirmed


def _confirmed(
    folder: Path, manifest: Manifest | None, own: dict[str, str], names: list[str]
) -> list[list[str]]:
    """Return what rank 0 finds wrong with what any rank complains of, and what it cannot read."""
    if manifest is None:
        return [[own[MANIFEST_NAME]], []]
    again = [name for name in names if name in manifest.files]
    try:
        return [[*find_damage(folder, manifest, digests=True, names=again).values()], []]
    except OSError as error:
        return [[], [str(error)]]


def remove_debris(root: Path, *, below: str) -> None:
    """Remove what killed saves have left; where no save of this attempt is under way.

    Args:
        root: folder of a run's checkpoints.
        below: token of this attempt: what an attempt with a higher one writes is not debris.
    """
    for pattern in _DEBRIS:
        for debris in root.glob(pattern):
            token = debris.name.rpartition(".")[2]
            if not (token.isdecimal() and below.isdecimal() and token > below):
                shutil.rmtree(debris, ignore_errors=True)
