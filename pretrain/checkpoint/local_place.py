"""Where on its node's disk does a rank keep checkpoints of its own, and whose are they?

    <folder>/<run>-<digest of the run's folder>/<identity>/rank_00007/step_00000100

The identity is drawn once and stands in the run's folder of shared checkpoints. A folder that was
deleted, or moved aside, and begun anew under the same name has another one, and never meets what
the run before it has left on a node. No torch.

`folder` is often below a place into which everybody may write, with a name that can be guessed: all
of these folders are made for their owner alone, and one that is another user's, a link, or open to
others is refused.

Source: our choice, docs/decisions/0008.
"""

import hashlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from pretrain.checkpoint.manifest import sync_folder

IDENTITY_NAME = "local_identity"
_MODE = 0o700


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalTier:
    """Checkpoints on the nodes' own disks, between those on shared storage.

    Raises:
        ValueError: if a folder is no absolute path, or the interval does not fit.
    """

    folder: Path | None = None
    """On a disk of each node; what is above it must exist. null: no such checkpoints."""
    interval_steps: int = 0
    """Every so many steps; where a shared one is due, that one alone is written."""

    def __post_init__(self) -> None:
        if self.folder is not None and not self.folder.is_absolute():
            raise ValueError(
                f"checkpoints.local.folder={self.folder} given, allowed: an absolute path, the same"
                " on every node, or null"
            )
        if self.interval_steps < 0 or (self.folder is not None and not self.interval_steps):
            raise ValueError(
                f"checkpoints.local.interval_steps={self.interval_steps} given, allowed: 1 or more,"
                " or 0 where checkpoints.local.folder=null"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalPlace:
    """Where one rank keeps its own checkpoints of a run."""

    folder: Path
    """As configured."""
    run_folder: Path
    """Of the run, on shared storage."""
    identity: str
    """From `read_identity`."""
    rank: int
    node: str
    """Name of this machine: on a disk that several nodes see, each has its own part."""

    @property
    def of_run(self) -> Path:
        """Everything on this node of runs in this folder, whatever their identity."""
        absolute = str(self.run_folder.absolute())
        digest = hashlib.sha256(absolute.encode()).hexdigest()[:12]
        return self.folder / f"{self.run_folder.name}-{digest}"

    @property
    def of_node(self) -> Path:
        """This node's part of what belongs to the run of this identity."""
        return self.of_run / self.identity / self.node

    @property
    def root(self) -> Path:
        """The rank's own folder, `step_*` below it."""
        return self._of_rank(self.rank)

    def _of_rank(self, rank: int) -> Path:
        return self.of_node / f"rank_{rank:05d}"

    def make(self) -> None:
        """Make the folders, for their owner alone.

        Raises:
            ValueError: names a folder that is somebody else's.
            OSError: if the disk refuses; what is above `folder` is not made.
        """
        for path in (self.folder, self.of_run, self.of_node.parent, self.of_node, self.root):
            path.mkdir(mode=_MODE, exist_ok=True)
            _require_own(path)

    def remove_strangers(self, ranks: Collection[int]) -> None:
        """Remove what other identities, and ranks that are elsewhere now, have left on this node.

        Args:
            ranks: those of this node.
        """
        own = {self._of_rank(rank).name for rank in ranks}
        for path in self.of_run.iterdir():
            if path.name != self.identity:
                shutil.rmtree(path, ignore_errors=True)
        for path in self.of_node.iterdir():
            if path.name not in own:
                shutil.rmtree(path, ignore_errors=True)

    def remove(self) -> None:
        """Remove this rank's checkpoints, and the folders above them that are empty then."""
        shutil.rmtree(self.root, ignore_errors=True)
        for path in (self.of_node, self.of_node.parent, self.of_run):
            try:
                path.rmdir()
            except OSError:  # another rank has something there
                return


def _require_own(path: Path) -> None:
    """Refuse a folder that somebody else could have put there or can write into.

    Raises:
        ValueError: names the folder.
    """
    status = path.lstat()
    problem = ""
    if not stat.S_ISDIR(status.st_mode):
        problem = "is no folder"
    elif status.st_uid != os.getuid():
        problem = f"belongs to user {status.st_uid}"
    elif status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        problem = f"is writable for others (mode {stat.S_IMODE(status.st_mode):o})"
    if problem:
        raise ValueError(
            f"checkpoints.local.folder: {path} {problem}: who can write there can change a"
            " checkpoint; allowed: a folder of your own that nobody else writes into (a new name"
            " is made with mode 700)"
        )


def read_identity(root: Path) -> str:
    """Return the identity of a run, "" if it has none yet.

    Args:
        root: folder of the run's shared checkpoints.

    Raises:
        ValueError: if it is none that `make_identity` has drawn: it becomes part of a path.
        OSError: if storage does not give it.
    """
    path = root / IDENTITY_NAME
    try:
        text = path.read_text(encoding="ascii", errors="replace").strip()
    except FileNotFoundError:
        return ""
    if not re.fullmatch("[0-9a-f]{16}", text):
        raise ValueError(
            f"{path} holds {text[:40]!r}; 16 hexadecimal digits are allowed: remove the file, and"
            " the run goes on from shared storage"
        )
    return text


def make_identity(root: Path) -> str:
    """Return the identity of a run, drawn now if it has none; who holds its lease calls it.

    Raises:
        ValueError: see `read_identity`.
        OSError: if storage refuses.
    """
    identity = read_identity(root)
    if not identity:
        identity = secrets.token_hex(8)
        root.mkdir(parents=True, exist_ok=True)
        writing = root / f".{IDENTITY_NAME}.{identity}"
        with writing.open("w", encoding="ascii") as file:
            file.write(identity + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(writing, root / IDENTITY_NAME)
        sync_folder(root)
    return identity
