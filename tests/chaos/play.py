"""How is a run disturbed, and started again until it ends as a chain of jobs would?

The command's own `start` runs in this process and forks real ranks; faults are real signals, real
errors and real damage to files. Between two starts a scene may change what lies on the disk.
"""

import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from launch.compose import to_yaml
from pretrain.checkpoint.lease import read_attempts
from pretrain.checkpoint.manifest import (
    CheckpointError,
    find_damage,
    list_checkpoints,
    read_manifest,
)
from pretrain.training.exit_file import STOPS_CHAIN
from pretrain.training.run import Run
from pretrain.training.start import USER_ERRORS, start

Between = Callable[[Run, int], None]
_MOST_STARTS = 24


@dataclass(frozen=True, kw_only=True, slots=True)
class Played:
    """A run that was disturbed and has ended."""

    run: Run
    codes: tuple[int, ...]
    """Of each start; the last one ends the chain."""
    struck: frozenset[str]
    """Marks of the faults that struck."""
    seconds: float
    """From the first start to the end."""
    left_over: tuple[str, ...] = ()
    """Processes and temporary files that outlived it."""
    stood_at: Mapping[int, int] = field(default_factory=dict[int, int])
    """Number of an attempt -> step of the newest whole checkpoint on the disk when its start of the
    chain began: it may not go on from less."""
    is_harmed: bool = False
    """Whether what lies on the disk may have been changed between two starts."""


class Environment:
    """A temporary folder of their own for runs, and what is there before them."""

    def __init__(self, folder: Path) -> None:
        """Take note of this process's children.

        Args:
            folder: empty; runs find it as their temporary folder.
        """
        self.folder = folder
        self._processes = descendants(os.getpid())
        self._shared = _shared_memory()

    def left_over(self) -> tuple[str, ...]:
        """Return what is there now and was not there before."""
        processes = descendants(os.getpid()) - self._processes
        files = [*self.folder.iterdir(), *(_abandoned(_shared_memory() - self._shared))]
        return (*(f"process {pid}" for pid in sorted(processes)), *sorted(map(str, files)))


def play(
    run: Run,
    faults: Sequence[str] = (),
    *,
    between: Between | None = None,
    environment: Environment | None = None,
) -> Played:
    """Start a run, again and again until its chain would end, while faults strike.

    Args:
        run: the configuration; its folder may exist.
        faults: as FAULTS names them, each strikes once.
        between: called before each start but the first with the number of starts before it; may
            change what lies on the disk.
        environment: taken before anything was started; None: leftovers are not looked for.
    """
    started, codes = time.monotonic(), list[int]()
    stood_at: dict[int, int] = {}
    kept = tempfile.gettempdir()
    with tempfile.TemporaryDirectory(prefix="faults-") as marks:
        if environment is not None:
            tempfile.tempdir = os.environ["TMPDIR"] = str(environment.folder)
        os.environ.update(FAULTS=";".join(faults), FAULTS_FOLDER=marks, WANDB_MODE="disabled")
        try:
            while not codes or codes[-1] not in STOPS_CHAIN:
                if codes and between is not None:
                    between(run, len(codes))
                stood_at[_next_attempt(run)] = _newest_whole(run)
                codes.append(_start(run))
                assert len(codes) < _MOST_STARTS, f"it never ends: {codes}"
        finally:
            del os.environ["FAULTS"], os.environ["FAULTS_FOLDER"]
            tempfile.tempdir = os.environ["TMPDIR"] = kept
        struck = frozenset(os.listdir(marks))
    return Played(
        run=run,
        codes=tuple(codes),
        struck=struck,
        seconds=time.monotonic() - started,
        left_over=() if environment is None else environment.left_over(),
        stood_at=stood_at,
        is_harmed=between is not None,
    )


def _next_attempt(run: Run) -> int:
    attempts = read_attempts(run.folder)
    return attempts[-1].number + 1 if attempts else 1


def _newest_whole(run: Run) -> int:
    """Return the step of the newest checkpoint whose every byte is as it was written; 0: none."""
    for folder in reversed(list_checkpoints(run.folder / "checkpoints")):
        try:
            manifest = read_manifest(folder)
        except CheckpointError:
            continue
        if not find_damage(folder, manifest, digests=True):
            return manifest.step
    return 0


def _start(run: Run) -> int:
    try:
        return start(run, config_yaml=to_yaml(run))
    except USER_ERRORS:
        return 2


def descendants(pid: int) -> frozenset[int]:
    """Return the processes below `pid`, without the one that ranks are forked from."""
    children: dict[int, list[int]] = {}
    names: dict[int, str] = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            fields = (path / "stat").read_text("ascii").rpartition(")")[2].split()
            names[int(path.name)] = (path / "cmdline").read_text("utf-8", "replace")
        except OSError:
            continue  # it has just ended
        if fields[0] != "Z":
            children.setdefault(int(fields[1]), []).append(int(path.name))
    found: set[int] = set()
    todo = [pid]
    while todo:
        for child in children.get(todo.pop(), []):
            todo.append(child)
            if "forkserver" not in names[child] or child not in children.get(pid, []):
                found.add(child)
    return frozenset(p for p in found if "resource_tracker" not in names[p])


def _abandoned(paths: frozenset[Path]) -> frozenset[Path]:
    """Return those that no process on this machine has mapped or open: others run tests beside us.

    A folder of ours is named after this process, so whatever is in it was left by it.
    """
    if not (others := {str(path) for path in paths if path.is_file()}):
        return paths
    in_use: set[str] = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "maps").read_text("utf-8", "replace").split()
            words += [os.readlink(link) for link in (process / "fd").iterdir()]
        except OSError:  # it has just ended, or is another user's, who owns no file of ours
            continue
        in_use |= others.intersection(words)
    return frozenset(path for path in paths if str(path) not in in_use)


def _shared_memory() -> frozenset[Path]:
    """Return what torch and multiprocessing keep in shared memory."""
    names = ("torch_*", "sem.*", "psm_*", "pym-*", f"ranks-{os.getpid()}-*")
    return frozenset(path for name in names for path in Path("/dev/shm").glob(name))
