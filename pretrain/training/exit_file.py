"""What does a run say when it ends? `exit.json` in the run's folder.

torchrun turns every failure into 1, so a batch script reads the trainer's own code here. Written
whole or not at all.

Codes, and what a chain of jobs does with them:

    0   finished, or was finished already                     stop
    1   failed: an error of the program, a traceback          go on from the newest checkpoint
    2   wrong configuration, corpus or checkpoint             stop, the user mends it
    16  a device is suspected of computing wrongly            go on without its node
    17  validation failed: the model is not worth going on    stop, a person decides
    75  asked to stop: saved                                  go on
    85  infrastructure: a rank died, hung or lost the others  go on
    93  do not requeue: no progress, lease lost, budget spent stop

Source: docs/decisions/0008; BSD sysexits (75, EX_TEMPFAIL); megatron-core (16, 17); NVIDIA's
resiliency extension (93).
"""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path

from pretrain.monitor.secrets import scrub

FINISHED, FAILED, WRONG_INPUT = 0, 1, 2
SUSPECT_HARDWARE, VALIDATION_FAILED = 16, 17
INTERRUPTED, INFRASTRUCTURE, DO_NOT_REQUEUE = 75, 85, 93
SEVERITY = (
    WRONG_INPUT,
    DO_NOT_REQUEUE,
    VALIDATION_FAILED,
    SUSPECT_HARDWARE,
    FAILED,
    INFRASTRUCTURE,
    INTERRUPTED,
)
"""Of ranks that end with unlike codes, the one that says most."""
RESTARTED = frozenset({SUSPECT_HARDWARE, INFRASTRUCTURE})
"""After these codes local ranks are started again."""
STOPS_CHAIN = frozenset({FINISHED, WRONG_INPUT, VALIDATION_FAILED, DO_NOT_REQUEUE})
"""After these codes a job that waits to go on has nothing to do."""

ENDS_JOB = STOPS_CHAIN | {INTERRUPTED}
"""After these codes the same job must not start its ranks again."""


def process_code(code: int, *, environment: Mapping[str, str]) -> int:
    """Return the exit code with which a process of a run ends, given what the run says.

    torchrun starts all ranks again when one ends with anything but 0, as long as it has restarts
    left. A run that is finished, saved, or waits for a person then ends with 0, and `exit.json`
    alone says why; a batch script reads it there. Without restarts left the code stays, as it does
    without torchrun.

    Args:
        code: of the run.
        environment: read for TORCHELASTIC_RESTART_COUNT and TORCHELASTIC_MAX_RESTARTS.
    """
    done = int(environment.get("TORCHELASTIC_RESTART_COUNT", "0"))
    most = int(environment.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    return FINISHED if code in ENDS_JOB and done < most else code


def write_exit(folder: Path, *, code: int, reason: str, step: int | None = None) -> None:
    """Write `exit.json` into a run's folder.

    A failure does not take the place of what another rank of this attempt has said: who loses its
    neighbour fails later than the neighbour, and knows less.

    Args:
        folder: the run's; made if missing.
        code: the exit code.
        reason: one sentence; written without secrets.
        step: optimizer steps done, if known.
    """
    job = os.environ.get("SLURM_JOB_ID", "")
    if code in (FAILED, INFRASTRUCTURE) and _job_that_spoke(folder) == job:
        return
    folder.mkdir(parents=True, exist_ok=True)
    said = {"code": code, "reason": scrub(reason), "step": step, "job": job}
    record = {**said, "time_unix_s": round(time.time(), 3)}
    writing = folder / f".exit.json.{os.getpid()}"
    writing.write_text(json.dumps(record) + "\n", encoding="utf-8")
    os.replace(writing, folder / "exit.json")


def _job_that_spoke(folder: Path) -> str | None:
    """Return which job of the batch system `exit.json` is of; None: there is none to be read."""
    try:
        return str(json.loads((folder / "exit.json").read_text(encoding="utf-8"))["job"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def clear_exit(folder: Path) -> None:
    """Remove what an earlier attempt said; a run that is under way has no `exit.json`."""
    (folder / "exit.json").unlink(missing_ok=True)
