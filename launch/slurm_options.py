"""What may a user ask of SLURM? The words of conf/submit.yaml."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pretrain.monitor.node_faults import FaultPolicy

MOST_ELEMENTS = 1000
"""Of an array: SLURM's MaxArraySize is 1001 where nobody has changed it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SlurmOptions:
    """What is asked of SLURM beside the run's own needs; conf/submit.yaml says each in a line.

    Raises:
        ValueError: if a value is out of range.
    """

    segments: int
    device: Literal["gpu", "cpu"]
    time_limit_s: int | None
    margin_s: int
    max_restarts: int
    spare_nodes: int
    limit: int
    cpus_per_task: int
    verdict_grace_s: int
    partition: str | None
    account: str | None
    qos: str | None
    options: tuple[str, ...]
    exclude: tuple[str, ...]
    environment: dict[str, str]
    faults: FaultPolicy

    def __post_init__(self) -> None:
        least = dict.fromkeys(("segments", "margin_s", "limit", "cpus_per_task"), 1)
        least |= dict.fromkeys(("max_restarts", "spare_nodes", "verdict_grace_s"), 0)
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise ValueError(
                    f"slurm.{name}={getattr(self, name)} given; allowed: {smallest} or more"
                )
        if self.segments > MOST_ELEMENTS:
            raise ValueError(
                f"slurm.segments={self.segments} given; allowed: up to {MOST_ELEMENTS}"
            )
        if self.time_limit_s is not None and self.time_limit_s < 60:
            raise ValueError(
                f"slurm.time_limit_s={self.time_limit_s} given; allowed: 60 or more, SLURM counts"
                " in minutes"
            )
        for option in self.options:
            if not re.fullmatch(r"--[a-z][a-z-]*(=.*)?", option):
                raise ValueError(f"slurm.options: got {option!r}; allowed: as --reservation=mine")


@dataclass(frozen=True, kw_only=True, slots=True)
class Submission:
    """One call of launch/submit.py."""

    job: Literal["train", "sweep", "prepare", "nodes"]
    dry_run: bool
    tasks: Path | None
    slurm: SlurmOptions
