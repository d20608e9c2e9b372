"""Who may write into a run's folder?

The attempt with the highest number. Each start of a run claims the next number by creating
`attempts/00000007.json`, which the file system gives to one taker only, and renews it by a beat
while it lives. A second job waits to see whether the beat goes on: if it does, it is refused with
the owner's name; if it does not, the owner is gone, whatever any clock says, and the second takes
over with a higher number. An owner that was only asleep finds the higher number before its next
commit and stops. The files stay: they are the history of the run's attempts.

Source: our choice, docs/decisions/0008; the rising number is a fencing token.
"""

import json
import logging
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

ATTEMPTS_NAME = "attempts"
_FILE = re.compile(r"(\d{8})\.json")
_BEATS_PER_LEASE = 4


class LeaseError(RuntimeError):
    """The run is another job's, or gets nowhere: started again as it is, it would end so again."""


class HeldError(LeaseError):
    """Another process holds the run and lives."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Owner:
    """The process that holds a lease."""

    host: str
    pid: int
    started: int
    """When its process began, in ticks since the host's start; tells it from a later process of the
    same number."""
    boot: str
    """Of its host's last start."""
    job: str = ""
    """Of the batch system."""

    def __str__(self) -> str:
        """Return who it is, for messages."""
        return f"{self.host}, process {self.pid}" + (f", job {self.job}" if self.job else "")

    @property
    def is_certainly_gone(self) -> bool:
        """Whether it ran on this host and does no longer; False if that cannot be known."""
        if self.host != socket.gethostname() or not self.boot or self.boot != _boot_id():
            return False
        return _started(self.pid) != self.started


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """One start of a run."""

    number: int
    """From 1; rises with every start."""
    owner: Owner
    begun_unix_s: float
    beat: int = 0
    """Rises while the attempt lives."""
    from_step: int | None = None
    """The checkpoint that it goes on from; None: not known yet."""
    committed_step: int | None = None
    """Its newest checkpoint."""
    digest: str = ""
    """Of the configuration and the code: with another, the attempt before says nothing."""
    code: int | None = None
    """Exit code; None: under way, or ended without a word."""
    reason: str = ""

    @property
    def has_progressed(self) -> bool:
        """Whether it has committed a checkpoint beyond the one it went on from."""
        return self.committed_step is not None and self.committed_step > (self.from_step or 0)


def this_owner(environment: Mapping[str, str] | None = None) -> Owner:
    """Return the calling process as an owner."""
    values = os.environ if environment is None else environment
    return Owner(
        host=socket.gethostname(),
        pid=os.getpid(),
        started=_started(os.getpid()),
        boot=_boot_id(),
        job=values.get("SLURM_JOB_ID", ""),
    )


def read_attempts(folder: Path) -> list[Attempt]:
    """Return the attempts of a run, oldest first; one that cannot be read is left out, said aloud.

    Args:
        folder: the run's.
    """
    found: list[Attempt] = []
    root = folder / ATTEMPTS_NAME
    names = sorted(p.name for p in root.iterdir()) if root.is_dir() else []
    for name in filter(_FILE.fullmatch, names):
        attempt = _read(root / name)
        if attempt is not None:
            found.append(attempt)
    return found


def _read(path: Path) -> Attempt | None:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        owner = Owner(**_known(Owner, record["owner"]))
        return Attempt(**_known(Attempt, {**record, "owner": owner}))
    except (OSError, ValueError, TypeError, KeyError) as error:
        log.warning("%s cannot be read: %s", path, error)
        return None


def _known(cls: type, record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that this code knows; newer code may have written more."""
    names = {field.name for field in fields(cls)}
    return {name: value for name, value in record.items() if name in names}


def _numbers(root: Path) -> list[int]:
    if not root.is_dir():
        return []
    found = (_FILE.fullmatch(path.name) for path in root.iterdir())
    return sorted(int(match[1]) for match in found if match)


class Lease:
    """This process's claim on a run's folder, renewed by a thread."""

    def __init__(self, root: Path, attempt: Attempt, *, lease_s: float) -> None:
        """Begin to renew a number that was claimed; `take_lease` calls it."""
        self._root = root
        self._attempt = attempt
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._lost = ""
        self._interval_s = lease_s / _BEATS_PER_LEASE
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    @property
    def number(self) -> int:
        """Of this attempt."""
        return self._attempt.number

    @property
    def is_lost(self) -> bool:
        """Whether the last beat found the run taken over."""
        return bool(self._lost)

    def why_lost(self) -> str:
        """Return who has taken the run over, looking now; "" if nobody has."""
        if not self._lost:
            newest = _numbers(self._root)[-1:]
            if newest and newest[0] > self.number:
                taker = _read(_path(self._root, newest[0]))
                who = "another job" if taker is None else str(taker.owner)
                self._lost = (
                    f"the run was taken over by {who} (attempt {newest[0]}, this is"
                    f" {self.number}): this process was not seen for too long"
                )
        return self._lost

    def note(self, **changes: object) -> None:
        """Write what is known now into the attempt's file: `from_step`, `committed_step`."""
        with self._lock:
            self._attempt = replace(self._attempt, **changes)  # type: ignore[arg-type]  fields of it
            self._write()

    def end(self, *, code: int, reason: str) -> None:
        """Give the lease back; the next attempt need not wait."""
        if not self._ended.is_set():
            self._ended.set()
            self._thread.join()
            self.note(code=code, reason=reason)

    def _renew(self) -> None:
        while not self._ended.wait(self._interval_s):
            try:
                if self.why_lost():
                    return
                self.note(beat=self._attempt.beat + 1)
            except OSError as error:  # storage that hiccups; the next beat may get through
                log.warning("%s: the lease was not renewed: %s", self._root, error)

    def _write(self) -> None:
        path = _path(self._root, self.number)
        writing = path.with_name(f".{path.name}.{os.getpid()}")
        writing.write_text(json.dumps(asdict(self._attempt)) + "\n", encoding="utf-8")
        os.replace(writing, path)


def take_lease(
    folder: Path,
    *,
    lease_s: float,
    digest: str = "",
    wait: Callable[[float], None] = time.sleep,
) -> Lease:
    """Return the claim on a run's folder once no other process lives that holds it.

    Waits at most about `lease_s` for an owner that may be dead; not at all for one that has ended,
    or is certainly gone.

    Args:
        folder: the run's; made if missing.
        lease_s: how long an owner may be silent before it counts as gone, in seconds; the same for
            every job of the run.
        digest: of configuration and code, for `Attempt.digest`.
        wait: how to wait.

    Raises:
        HeldError: if another process holds the run and lives; names it.
        OSError: if the file system refuses.
    """
    root = folder / ATTEMPTS_NAME
    root.mkdir(parents=True, exist_ok=True)
    while True:
        newest = (_numbers(root) or [0])[-1]
        if newest:
            _wait_until_gone(root, newest, lease_s=lease_s, wait=wait)
        attempt = Attempt(
            number=newest + 1, owner=this_owner(), begun_unix_s=round(time.time(), 3), digest=digest
        )
        if _claim(_path(root, attempt.number), attempt):
            return Lease(root, attempt, lease_s=lease_s)


def _claim(path: Path, attempt: Attempt) -> bool:
    """Create an attempt's file; False if another process was faster.

    It gets its name by a hard link, which fails where the name exists, and so is never seen empty.
    """
    own = f"{attempt.owner.host}.{os.getpid()}.{threading.get_ident()}"
    writing = path.with_name(f".{path.name}.{own}")
    writing.write_text(json.dumps(asdict(attempt)) + "\n", encoding="utf-8")
    try:
        os.link(writing, path)
    except FileExistsError:
        return False
    finally:
        writing.unlink()
    return True


def _wait_until_gone(
    root: Path, number: int, *, lease_s: float, wait: Callable[[float], None]
) -> None:
    """Return when attempt `number` has ended or is gone.

    Raises:
        HeldError: if it lives.
    """
    before = _read(_path(root, number))
    deadline = time.monotonic() + lease_s
    while True:
        now = _read(_path(root, number))
        # a file that cannot be read now says nothing; its owner may be renewing it
        if now is not None and (now.code is not None or now.owner.is_certainly_gone):
            return
        if now is not None and before is None:
            before = now
        if now is not None and before is not None and now.beat != before.beat:
            raise HeldError(
                f"{root.parent} is held by {now.owner} (attempt {number}), which is running: one"
                " job writes into a run's folder. Stop it first, or choose another name"
            )
        if time.monotonic() >= deadline:
            owner = "the owner" if now is None else now.owner
            log.warning("%s: %s has not been seen for %.0f s", root, owner, lease_s)
            return
        wait(min(1.0, lease_s / 10))


def incident_mark(folder: Path, number: int) -> Path:
    """Return the file that says of an attempt that its end is recorded as an incident."""
    return folder / ATTEMPTS_NAME / f"{number:08d}.incident"


def _path(root: Path, number: int) -> Path:
    return root / f"{number:08d}.json"


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _started(pid: int) -> int:
    """Return when a process of this host began, in ticks; 0 if there is none or it is dead."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text("ascii").rpartition(")")[2].split()
    except (OSError, ValueError):
        return 0
    return 0 if state in "ZX" else int(rest[18])
