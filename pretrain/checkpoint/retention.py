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
    CheckpointError,
    find_damage,
    list_checkpoints,
    read_manifest,
)

log = logging.getLogger(__name__)

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
        damage = verify_share(self._root / name)
        everyone = all_gather_json(damage, purpose=self._purpose)
        found = [line for said in everyone for line in said]
        if found:
            log.warning("%s is damaged: %s", self._root / name, "; ".join(found[:3]))
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


def verify_share(folder: Path) -> list[str]:
    """Return what this rank finds wrong with its share of a checkpoint's files."""
    share = (torch.distributed.get_rank(), torch.distributed.get_world_size())
    try:
        return find_damage(folder, read_manifest(folder), digests=True, share=share)
    except CheckpointError as error:
        return [str(error)]


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
