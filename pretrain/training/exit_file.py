"""What does a run say when it ends? `exit.json` in the run's folder.

torchrun turns every failure into 1, so a batch script reads the trainer's own code here. Written
whole or not at all.

Codes: 0 finished, 1 failed (a traceback was printed), 2 wrong configuration or data (the user can
mend it), 75 asked to stop: saved, run the same command to go on. Source: docs/decisions/0008; BSD
sysexits (75, EX_TEMPFAIL).
"""

import json
import os
import time
from pathlib import Path

FINISHED, FAILED, WRONG_INPUT, INTERRUPTED = 0, 1, 2, 75


def write_exit(folder: Path, *, code: int, reason: str, step: int | None = None) -> None:
    """Write `exit.json` into a run's folder.

    A failure does not take the place of what another rank of this attempt has said: who loses its
    neighbour fails later than the neighbour, and knows less.

    Args:
        folder: the run's; made if missing.
        code: the exit code.
        reason: one sentence.
        step: optimizer steps done, if known.
    """
    if code == FAILED and (folder / "exit.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    record = {"code": code, "reason": reason, "step": step, "time_unix_s": round(time.time(), 3)}
    writing = folder / f".exit.json.{os.getpid()}"
    writing.write_text(json.dumps(record) + "\n", encoding="utf-8")
    os.replace(writing, folder / "exit.json")


def clear_exit(folder: Path) -> None:
    """Remove what an earlier attempt said; a run that is under way has no `exit.json`."""
    (folder / "exit.json").unlink(missing_ok=True)
