"""Could somebody else put a checkpoint into a run's folder, or take it away? No torch.

Who may write into a folder may rename what is in it. The manifests' digests tell a damaged
checkpoint from a whole one, but whoever writes a whole one writes its digests, too; and a run goes
on from the newest that is whole.

So folders of a run, and the folder of all runs, are refused where everybody may write into them: a
chmod mends it. With the sticky bit (/tmp) only the owner may rename an entry; there what counts is
whose the entry is. A folder above, or one that a group may write into, is only warned of: the first
is often not ours to change, the second is how teams share runs.
"""

import logging
import os
import stat
from collections.abc import Iterator
from pathlib import Path

log = logging.getLogger(__name__)


def check_folders(root: Path, folder: Path) -> None:
    """Refuse a run's folders into which everybody may write; warn of others who may.

    Args:
        root: the folder of all runs, `output_root`; it need not exist.
        folder: the run's, below it; it need not exist.

    Raises:
        ValueError: names the folder and the command that mends it.
    """
    own = _existing(root, folder)
    for path in own:
        _check(path)
    highest = own[0] if own else root
    for path in highest.resolve().parents:
        if path.exists() and _is_open_to_all(path.stat()):
            log.warning(
                "%s is writable for everybody (mode %o): whoever has an account here can exchange"
                " the folders of runs below it",
                path,
                stat.S_IMODE(path.stat().st_mode),
            )


def check_given(folder: Path, *, key: str) -> None:
    """Refuse weights from a folder into which everybody may write.

    Args:
        folder: a checkpoint.
        key: of the configuration that names it.

    Raises:
        ValueError: names the key, the folder and the command that mends it.
    """
    if folder.exists():
        _check(folder, key=key)


def _existing(root: Path, folder: Path) -> list[Path]:
    """Return those folders that exist, from the top down."""
    between = [folder, *folder.parents]
    between = between[: between.index(root)] if root in between else [folder]
    checkpoints = folder / "checkpoints"
    inside = sorted(checkpoints.iterdir()) if checkpoints.is_dir() else []
    wanted = [root, *reversed(between), checkpoints, *inside]
    return [path for path in wanted if path.is_dir()]


def _check(path: Path, *, key: str = "output_root") -> None:
    """Refuse or warn of one folder.

    Raises:
        ValueError: if everybody may write into it, or somebody else has put it where they may.
    """
    status = path.stat()
    mode = stat.S_IMODE(status.st_mode)
    if _is_open_to_all(status):
        raise ValueError(
            f"{key}: {path} is writable for everybody (mode {mode:o}), who could put a checkpoint"
            f" there; allowed: folders that their owner and group write into. `chmod o-w {path}`,"
            " or choose another folder"
        )
    above = path.resolve().parent.stat()
    others = above.st_mode & stat.S_IWOTH and status.st_uid not in (os.getuid(), 0)
    if others:
        raise ValueError(
            f"{key}: {path} belongs to user {status.st_uid} and stands in a folder into which"
            " everybody may write: somebody else may have put it there; allowed: a folder of your"
            " own"
        )
    if mode & stat.S_IWGRP and status.st_gid not in _own_groups():
        log.warning(
            "%s is writable for group %d (mode %o), which is none of yours",
            path,
            status.st_gid,
            mode,
        )


def _own_groups() -> Iterator[int]:
    yield from (os.getgid(), os.getegid(), *os.getgroups())


def _is_open_to_all(status: os.stat_result) -> bool:
    return bool(status.st_mode & stat.S_IWOTH) and not status.st_mode & stat.S_ISVTX
