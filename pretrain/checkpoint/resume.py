"""From which checkpoint does a run go on?

The newest committed checkpoint whose files are as they were written. A damaged one is named in a
warning and passed over; if all are damaged the run stops, because starting from scratch would look
like going on. No torch.
"""

import logging
from pathlib import Path

from pretrain.checkpoint.manifest import (
    CheckpointError,
    Manifest,
    find_damage,
    list_checkpoints,
    read_manifest,
)

log = logging.getLogger(__name__)


def find_newest(
    root: Path, *, digests: bool = True, sizes: bool = True
) -> tuple[Path, Manifest] | None:
    """Return the newest whole checkpoint below `root` with its manifest, None if there is none.

    For one process; ranks find it together (sharded.agree_on_newest).

    Args:
        root: folder of a run's checkpoints.
        digests: read every byte of the checkpoint that is returned, not only sizes.
        sizes: look at its files at all; else only at its manifest.

    Raises:
        CheckpointError: if there are checkpoints and all of them are damaged.
        UnreadableError: if storage does not give a file: it may be whole.
    """
    folders = list_checkpoints(root)
    for folder in reversed(folders):
        try:
            manifest = read_manifest(folder)
            names = None if sizes else ()
            damage = [*find_damage(folder, manifest, digests=digests, names=names).values()]
        except CheckpointError as error:
            damage = [str(error)]
        else:
            if not damage:
                return folder, manifest
        log.warning("passing over damaged checkpoint %s: %s", folder, "; ".join(damage))
    if folders:
        raise CheckpointError(
            f"all {len(folders)} checkpoints below {root} are damaged (named above): restore one,"
            f" or move the folder"
            " away to start from scratch"
        )
    return None


def open_checkpoint(path: Path) -> tuple[Path, Manifest]:
    """Return the checkpoint meant by `path`, verified: itself, or the newest of a run folder.

    Raises:
        CheckpointError: if there is none or it is damaged.
    """
    for root in (path, path / "checkpoints"):
        if list_checkpoints(root):
            found = find_newest(root)
            assert found is not None
            return found
    manifest = read_manifest(path)
    damage = find_damage(path, manifest, digests=True)
    if damage:
        raise CheckpointError("; ".join(damage.values()))
    return path, manifest
