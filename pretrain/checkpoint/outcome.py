"""What does a writer of checkpoints get, and what does it say of a save?"""

import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from pretrain.checkpoint.manifest import CheckpointError, Manifest

Tier = Literal["shared", "local"]
"""shared: storage that all nodes see, one file of each rank. local: the nodes' own disks."""
Box = tuple[str, tuple[int, ...], Tensor]
"""Key of a stored tensor, index of the first value in it, values on the CPU."""
Boxes = Callable[[], Iterator[Box]]
SAVE_ERRORS = (OSError, CheckpointError, ValueError, MemoryError, zipfile.BadZipFile)
"""What costs the save that it happens to, and nothing else."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Copied:
    """The state of a rank, ready to be written."""

    manifest: Manifest
    """All but `files`, `written_by`."""
    boxes: Boxes
    """Yields the values, as often as it is called."""
    shapes: Mapping[str, Sequence[int]]
    """Of the stored tensors, by key."""
    begun_s: float
    """When the save began, by `time.monotonic`."""
    blocking_s: float
    """Seconds that training stood still for it on this rank."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How a save went; the same on every rank but for its duration, bytes and local folder."""

    step: int
    folder: Path
    problem: str = ""
    """Empty: it is committed."""
    ranks: tuple[int, ...] = ()
    """Which could not write."""
    blocking_s: float
    """Seconds that training stood still, on the slowest rank."""
    duration_s: float
    """Seconds from the begin to the commit on this rank."""
    num_bytes: int
    """Written by this rank."""
    tier: Tier = "shared"
