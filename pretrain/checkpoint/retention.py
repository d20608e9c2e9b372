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
from pretrain.checkpoint.manifest import (
    MANIFEST_NAME,
    CheckpointError,
    Manifest,
    content_digest,
    find_damage,
    list_checkpoints,
    read_manifest,
    share_of_files,
)

log = logging.getLogger(__name__)

_MOST_SIZES = 64
"""Files whose size every rank looks at; at 1,536 ranks all sizes would be two million calls."""
_DEBRIS = (".writing_*", ".deleting_*")


class Retention:
    """Removes old checkpoints of a run; each rank has one."""

    def __init__(self, root: Path, *, keep: int, purpose: str) -> None:
        """Know no verified checkpoint yet.

        Args:
            root: folder of the run's checkpoints.
            keep: how many verified ones stay, at least 1.
            purpose: whose group ranks agree over.
        """
        self._root, self._keep, self._purpose = root, keep, purpose
        self._verified: set[str] = set()

    def trust(self, folder: Path) -> None:
        """Count a checkpoint as verified."""
        self._verified.add(folder.name)

    def remove_old(self, *, step: int) -> None:
        """Remove all but the newest `keep` verified checkpoints, and debris; collective.

        Args:
            step: of the save that was just committed.
        """
        names = from_first_rank(self._names(), purpose=self._purpose)
        kept: list[str] = []
        damaged: list[str] = []
        for name in reversed(names):
            if len(kept) == self._keep:
                break
            if name in self._verified or self._verify(name):
                kept.append(name)
            else:
                damaged.append(name)
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
        return [folder.name for folder in list_checkpoints(self._root)]

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
        remove_debris(self._root)


def find_damage_together(folder: Path, *, purpose: str) -> list[str]:
    """Return what is wrong with a checkpoint, the same on every rank; each reads a share of it.

    Rank 0 reads again what any rank complains of: a file that is whole there, and not elsewhere, is
    no damage but another file.

    Args:
        folder: the checkpoint.
        purpose: whose group ranks agree over.

    Raises:
        CheckpointError: on every rank, if ranks see unlike files.

    Collective: every rank calls it.
    """
    rank, num_ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    own: dict[str, str] = {}
    manifest: Manifest | None = None
    try:
        manifest = read_manifest(folder)
        shared = share_of_files(manifest, rank=rank, num_ranks=num_ranks)
        looked_at = [*manifest.files][:_MOST_SIZES]
        own = find_damage(folder, manifest, digests=False, names=looked_at)
        own |= find_damage(folder, manifest, digests=True, names=shared)
    except CheckpointError as error:
        own = {MANIFEST_NAME: str(error)}
    digest = "" if manifest is None else content_digest((folder / MANIFEST_NAME).read_bytes())
    everyone = all_gather_json([digest, own], purpose=purpose)
    names = sorted({name for _, damage in everyone for name in damage})
    confirmed = [own[MANIFEST_NAME]] if manifest is None else []
    if manifest is not None and rank == 0:
        again = [name for name in names if name in manifest.files]
        confirmed = [*find_damage(folder, manifest, digests=True, names=again).values()]
    confirmed = from_first_rank(confirmed, purpose=purpose)
    digests = {digest for digest, _ in everyone}
    if not confirmed and (names or len(digests) > 1):
        others = [r for r, said in enumerate(everyone) if said != [everyone[0][0], {}]]
        said = next((t for _, damage in everyone for t in damage.values()), "another manifest")
        raise CheckpointError(
            f"ranks {others[:8]} of {num_ranks} see other files of {folder} than rank 0: {said};"
            " all ranks must see the same files"
        )
    return confirmed


def set_aside(folder: Path) -> Path | None:
    """Rename a damaged checkpoint, for a person to look at; None if the disk refuses."""
    number = 0
    while (aside := folder.with_name(f"damaged_{folder.name}.{number}")).exists():
        number += 1
    try:
        os.rename(folder, aside)
    except OSError as error:
        log.warning("%s could not be set aside: %s", folder, error)
        return None
    log.warning("%s is damaged and now called %s", folder, aside.name)
    return aside


def remove_debris(root: Path) -> None:
    """Remove what killed saves have left; only where no save is under way."""
    for pattern in _DEBRIS:
        for debris in root.glob(pattern):
            shutil.rmtree(debris, ignore_errors=True)
