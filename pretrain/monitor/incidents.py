"""What went wrong in a run, once for each time? `runs/<name>/incidents.jsonl`.

One incident is one line of JSON, appended in one write, so that several processes may append and a
killed one loses at most its own line. Whoever knows of an incident first records it; nobody records
one that another process has seen better (a rank that loses its neighbour says nothing, the
neighbour's end is the incident).
"""

import json
import logging
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from pretrain.monitor.secrets import scrubbed

log = logging.getLogger(__name__)

INCIDENTS_NAME = "incidents.jsonl"

Kind = Literal[
    "rank_died",  # a process ended by a signal or an error that is not its own
    "hang",  # ranks wait for one that does not come
    "straggler",  # one rank holds up the others, step after step
    "failure",  # an exception of our own code
    "save_failed",  # a checkpoint could not be written; training goes on
    "damaged_checkpoint",  # found before use, set aside
    "local_lost",  # a later step on the nodes' own disks does not count; back to an earlier one
    "data",  # windows missing, damaged or not read in time
    "loss_spike",  # a loss or gradient norm that is out of the ordinary
    "diverged",  # a loss that does not come back by itself
    "alarm",  # a number that is out of bounds for long (alarms.py)
    "non_finite",  # a loss or gradient that is no number
    "transient",  # numbers that were wrong once, and right when computed again
    "suspect_device",  # a rank whose memory or arithmetic is wrong
    "lease_taken",  # a lease whose holder was gone has been taken over
    "no_progress",  # the run starts and starts and gets nowhere
    "environment",  # other packages or code than the checkpoint's
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Incident:
    """One incident."""

    kind: Kind
    text: str
    """One sentence: what happened, and what the run does about it."""
    step: int | None = None
    """Optimizer steps done when it happened, if known."""
    rank: int | None = None
    """The rank that caused it, if one did."""
    node: str = ""
    """Host name of that rank."""
    attempt: int | None = None
    """Which start of the run."""
    detail: Mapping[str, object] = field(default_factory=dict[str, object])
    """What a person who mends it wants to see: files, stacks, measured times; JSON values."""


def this_node() -> str:
    """Return this machine's name as the batch system knows it, else its host name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def record_incident(folder: Path, incident: Incident, *, mark: Path | None = None) -> None:
    """Append an incident to a run's `incidents.jsonl`; a disk that refuses is only warned of.

    Args:
        folder: the run's; made if missing.
        incident: what happened.
        mark: a file that who records first creates; if it is there, this is old news.
    """
    if mark is not None and not _is_news(mark):
        return
    job = "_".join(
        os.environ[name]
        for name in ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID")
        if name in os.environ
    )
    record = scrubbed(
        {
            "time_unix_s": round(time.time(), 3),
            **asdict(incident),
            "recorded_by": this_node(),
            "job": job or os.environ.get("SLURM_JOB_ID", ""),
        }
    )
    log.warning("incident (%s): %s", incident.kind, record["text"])
    line = (json.dumps(record, default=str) + "\n").encode()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / INCIDENTS_NAME, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o640)
        try:
            os.write(descriptor, line)
        finally:
            os.close(descriptor)
    except OSError as error:
        log.warning("%s: incident not recorded: %s", folder / INCIDENTS_NAME, error)


def _is_news(mark: Path) -> bool:
    try:
        mark.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(mark, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o640))
    except FileExistsError:
        return False
    except OSError as error:
        log.warning("%s: %s", mark, error)
    return True


def read_incidents(folder: Path) -> list[dict[str, object]]:
    """Return a run's incidents, oldest first; lines cut by a full disk are left out.

    Args:
        folder: the run's; none have been recorded if the file is missing.
    """
    path = folder / INCIDENTS_NAME
    if not path.exists():
        return []
    found: list[dict[str, object]] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            log.warning("%s: left out a line that was cut: %.60s", path, line)
    return found
