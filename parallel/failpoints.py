"""Where can a fault be planted in a rank, and how does it strike once?

The environment variable FAULTS names faults, separated by `;`, each as

    point:action[:rank=R][:step=S][:every]

`failpoint("save.half_file", step=15)` is a look at a tuple, empty in every real run. A fault of
FAULTS strikes the first time that its rank comes by its point at its step, then never again, also
not in a later start of the run: the mark is a file in FAULTS_FOLDER. `every` strikes each time.
Used by tests/chaos; nothing else sets the variables. No torch.

A point that knows what it looks at (`step.window`) asks `planted_values` instead, and strikes each
time that it sees one of them, at any step: `step.window:nan=FINGERPRINT`.

Actions: `kill` SIGKILL, `stop` SIGSTOP, `term` SIGTERM, `raise` an exception, `full` ENOSPC, `eio`
EIO, `sleep=SECONDS`, `hold=SECONDS` (the interpreter's lock is kept), `exit=CODE`, `limit=BYTES`
(no file of this process grows beyond: EFBIG). What a fault cannot do by itself (flip a bit of a
buffer, make a NaN, scale a gradient, put garbage in the place of text, let the optimizer's moments
grow) the point does: `failpoint` returns the action's name.
"""

import ctypes
import errno
import os
import resource
import signal
import time
from dataclasses import dataclass
from pathlib import Path

POINTS = (
    "step.begin",
    "step.forward",
    "step.dispatch",
    "step.backward",
    "step.window",
    "step.before_optimizer",
    "step.after_optimizer",
    "data.batch",
    "data.fetch",
    "data.read",
    "evaluation.begin",
    "save.begin",
    "save.staged",
    "save.half_file",
    "save.file_written",
    "save.before_manifest",
    "save.before_commit",
    "save.committed",
    "save.retention",
    "local.begin",
    "local.staged",
    "local.half_file",
    "local.file_written",
    "local.before_manifest",
    "local.before_commit",
    "local.committed",
    "local.retention",
    "load.begin",
    "load.half",
    "event.begin",
    "event.written",
    "rewind.decided",
    "rewind.set_aside",
    "rewind.ledger",
)
_DONE_BY_THE_POINT = (
    "flip",
    "flip_copy",
    "flip_moment",
    "nan",
    "scale",
    "drift",
    "garbage",
    "grow",
)


class PlantedError(RuntimeError):
    """The exception of the action `raise`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """One planted fault."""

    point: str
    action: str
    value: float = 0.0
    rank: int | None = None
    """None: every rank."""
    step: int | None = None
    """None: any step."""
    every: bool = False


def read_faults(text: str) -> tuple[Fault, ...]:
    """Return the faults that a FAULTS variable names.

    Raises:
        ValueError: if one cannot be read.
    """
    return tuple(_read_fault(part) for part in text.split(";") if part.strip())


def _read_fault(text: str) -> Fault:
    point, _, rest = text.strip().partition(":")
    action, *words = rest.split(":")
    name, _, value = action.partition("=")
    options = {name: value for name, _, value in (word.partition("=") for word in words)}
    if point not in POINTS or not name or not options.keys() <= {"rank", "step", "every"}:
        raise ValueError(
            f"FAULTS: {text!r} given; point:action[:rank=R][:step=S][:every] with one of the points"
            f" {', '.join(POINTS)} is allowed"
        )
    return Fault(
        point=point,
        action=name,
        value=float(value or 0),
        rank=int(options["rank"]) if "rank" in options else None,
        step=int(options["step"]) if "step" in options else None,
        every="every" in options,
    )


_faults = read_faults(os.environ.get("FAULTS", ""))
_step = -1


def arm() -> None:
    """Take the faults of the environment as it is now; a forked rank has another."""
    global _faults
    _faults = read_faults(os.environ.get("FAULTS", ""))


def at_step(step: int) -> None:
    """Say which step the training thread is in: the optimizer steps done before it."""
    global _step
    _step = step


def is_armed(point: str) -> bool:
    """Return whether any fault is planted at `point`."""
    return any(fault.point == point for fault in _faults)


def planted_values(point: str) -> tuple[float, ...]:
    """Return the values of the faults that are planted for this rank at `point`."""
    own = int(os.environ.get("RANK", "0"))
    mine = (f for f in _faults if f.point == point and f.rank in (None, own))
    return tuple(fault.value for fault in mine if fault.action == "nan")


def failpoint(point: str, *, step: int | None = None) -> str:
    """Do what is planted here, nothing in a real run.

    Args:
        point: one of POINTS.
        step: optimizer steps done; None: where the training thread is.

    Returns:
        The action that the caller has to take itself (such as `flip`, `nan`), or "".
    """
    for fault in _faults:
        if fault.point != point or fault.step not in (None, _step if step is None else step):
            continue
        if fault.rank not in (None, int(os.environ.get("RANK", "0"))):
            continue
        if fault.every or _first_time(fault):
            if fault.action in _DONE_BY_THE_POINT:
                return fault.action
            _strike(fault)
    return ""


def _first_time(fault: Fault) -> bool:
    """Return whether the fault has not struck yet, in this start of the run or an earlier one."""
    own = (fault.point, fault.action, fault.rank, fault.step, os.environ.get("RANK", "0"))
    mark = Path(os.environ["FAULTS_FOLDER"]) / "-".join(map(str, own))
    try:
        os.close(os.open(mark, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def _strike(fault: Fault) -> None:
    signals = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM}
    errors = {"full": errno.ENOSPC, "eio": errno.EIO}
    if fault.action in signals:
        os.kill(os.getpid(), signals[fault.action])
    elif fault.action in errors:
        raise OSError(errors[fault.action], f"{os.strerror(errors[fault.action])} (planted)")
    elif fault.action == "raise":
        raise PlantedError(f"planted at {fault.point}")
    elif fault.action == "sleep":
        time.sleep(fault.value)
    elif fault.action == "hold":
        ctypes.PyDLL(None).usleep(int(fault.value * 1e6))
    elif fault.action == "exit":
        os._exit(int(fault.value))
    elif fault.action == "limit":
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(fault.value), hard))
    else:
        raise ValueError(f"FAULTS: action {fault.action!r} is not known")
