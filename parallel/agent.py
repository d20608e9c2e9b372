"""How does one command start its own local ranks, and start them again when one dies?

`run_ranks` starts N processes, runs one function in each, forwards signals and returns the run's
exit code: `python launch/pretrain.py` without torchrun, whose agent does the same on a cluster. The
ranks are forked from a process that has imported everything once (fork_server.py): a new set of
ranks is there in a second, not in ten. A rank whose parent is gone gets SIGTERM, so that none
trains on unseen.

Ranks meet through a file in a temporary folder, not a TCP port: nothing listens, nothing collides.
"""

import importlib
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any

from parallel.beats import WATCH_ENDED
from parallel.fork_server import enter_fork, fork_context
from parallel.spawn import enter_rank, find_function, threads_per_rank

_GRACE_S = 20.0
"""How long the other ranks may take to end after one has failed: gloo notices a dead peer at
once."""
_HUNG_GRACE_S = 5.0
"""The same after one has lost the others: who still lives cannot run Python."""
_MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
"""Where the store is: on a disk a beat waits whenever a checkpoint is flushed to it."""
_POLL_S = 0.5
_UNKNOWN = 255
"""multiprocessing's exit code of a process whose fork server is gone."""
KILLED = WATCH_ENDED
"""Exit code of a run in which a signal killed a rank: nobody's fault in the program."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Death:
    """A rank that a signal ended."""

    rank: int
    signal: int

    def __str__(self) -> str:
        """Return what happened, as `rank 1 was killed by SIGKILL`."""
        return f"rank {self.rank} was killed by {signal.Signals(self.signal).name}"


class Stopper:
    """Passes SIGTERM and SIGINT on to the ranks, which decide what to do; the parent only waits."""

    def __init__(self) -> None:
        """Know of no ranks yet."""
        self.received: list[int] = []
        self._processes: list[BaseProcess] = []

    @contextmanager
    def listening(self) -> Generator[None]:
        """Take the two signals over for a while."""

        def pass_on(signum: int, _frame: FrameType | None) -> None:
            self.received.append(signum)
            # as SIGTERM: a terminal sends Ctrl-C to the ranks, too, and a second one means at once
            self._send(signal.SIGTERM)

        previous = {s: signal.signal(s, pass_on) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for signum, handler in previous.items():
                signal.signal(signum, handler)

    def start(self, processes: Sequence[BaseProcess]) -> None:
        """Start the processes; one that starts after a signal gets it, too."""
        self._processes = []
        for process in processes:
            process.start()
            self._processes.append(process)
            if self.received:
                os.kill(process.pid or 0, signal.SIGTERM)

    def remind(self) -> None:
        """Send the request again: a rank that had just been forked has not heard the first."""
        if self.received:
            self._send(signal.SIGTERM)

    def _send(self, signum: int) -> None:
        for process in self._processes:
            if process.is_alive() and process.pid:
                os.kill(process.pid, signum)


def run_ranks(
    target: str,
    args: tuple[Any, ...] = (),
    *,
    num_ranks: int,
    on_death: Callable[[Death], None] = lambda _: None,
    may_restart: Callable[[int], bool] = lambda _: False,
    severity: Sequence[int] = (),
    preload: Sequence[str] = (),
) -> int:
    """Run a function in each of `num_ranks` new processes and return the run's exit code.

    When a rank fails, the others get 20 s to end and are then killed.

    Args:
        target: `module:function`, a function that returns its exit code; only the ranks import it.
        args: picklable arguments, the same for every rank.
        num_ranks: processes to start, at least 1.
        on_death: told at once of each rank that a signal has ended.
        may_restart: asked, with the exit code of ranks that have all ended and were not asked to
            stop, whether to start them again.
        severity: exit codes, the one that says most about a run first; of codes that are not there
            the first to come counts.
        preload: other modules that ranks are forked with; of the first call of a process only.

    Returns:
        0 if every rank returned 0, 85 if the worst that happened is that a signal killed one, else
        the code that says most.
    """
    stopper = Stopper()
    with stopper.listening():
        while True:
            code = _run_once(
                target,
                args,
                context=fork_context(preload=(target.partition(":")[0], *preload)),
                num_ranks=num_ranks,
                stopper=stopper,
                on_death=on_death,
                severity=severity,
            )
            if code == 0 or stopper.received or not may_restart(code):
                return code


def _run_once(
    target: str,
    args: tuple[Any, ...],
    *,
    context: ForkServerContext,
    num_ranks: int,
    stopper: Stopper,
    on_death: Callable[[Death], None],
    severity: Sequence[int],
) -> int:
    with tempfile.TemporaryDirectory(prefix=f"ranks-{os.getpid()}-", dir=_MEMORY) as folder:
        store = str(Path(folder) / "store")
        threads = threads_per_rank(num_ranks)
        processes: list[BaseProcess] = [
            context.Process(
                target=_rank_main,
                args=(rank, num_ranks, store, threads, target, args, dict(os.environ)),
                name=f"rank-{rank}",
            )
            for rank in range(num_ranks)
        ]
        try:
            stopper.start(processes)
            codes = _wait_for_all(processes, on_death=on_death, remind=stopper.remind)
            return worst_code(codes, severity=severity)
        finally:
            for process in processes:
                if process.pid and process.is_alive():
                    process.kill()
                    process.join()


def _rank_main(
    rank: int,
    num_ranks: int,
    store_path: str,
    threads: int,
    target: str,
    args: tuple[Any, ...],
    environment: dict[str, str],
) -> None:
    enter_fork(environment)
    _end_with_parent()
    enter_rank(rank, num_ranks, store_path, threads)
    try:
        code = find_function(target)(*args)
        importlib.import_module("parallel.groups").leave_world()
    finally:
        if not _parent().is_alive():  # nobody else is left to tidy up
            shutil.rmtree(Path(store_path).parent, ignore_errors=True)
    sys.exit(code)


def _parent() -> Any:
    parent = multiprocessing.parent_process()
    assert parent is not None, "a rank is started by a parent"
    return parent


def _end_with_parent() -> None:
    """Send this process SIGTERM when its parent is gone, so that it saves and ends."""

    def watch() -> None:
        _parent().join()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def _wait_for_all(
    processes: Sequence[BaseProcess],
    *,
    on_death: Callable[[Death], None],
    remind: Callable[[], None],
) -> list[int]:
    """Return the ranks' exit codes in the order in which they ended; negative: by a signal."""
    codes: list[int] = []
    deadline = float("inf")
    alive = dict(enumerate(processes))
    while alive:
        if not wait([process.sentinel for process in alive.values()], _POLL_S):
            remind()
        ended = {rank: p for rank, p in alive.items() if p.exitcode is not None}
        for rank, process in ended.items():
            process.join()
            del alive[rank]
            code = process.exitcode or 0
            if code == _UNKNOWN and _is_there(process.pid):
                # the process it was forked from is gone, and with it all control of the rank
                os.kill(process.pid or 0, signal.SIGKILL)
                code = -signal.SIGKILL
            codes.append(code)
            if code < 0 and time.monotonic() < deadline:
                on_death(Death(rank=rank, signal=-code))
            if code and deadline == float("inf"):
                grace_s = _HUNG_GRACE_S if code == KILLED else _GRACE_S
                deadline = time.monotonic() + grace_s
        for process in alive.values():
            is_late = time.monotonic() >= deadline
            if is_late or (deadline != float("inf") and _is_stopped(process.pid)):
                process.kill()
    return codes


def _is_there(pid: int | None) -> bool:
    return pid is not None and Path(f"/proc/{pid}").exists()


def _is_stopped(pid: int | None) -> bool:
    """Return whether a process was stopped (SIGSTOP) and so will not end by itself."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="ascii")
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] in "Tt"


def worst_code(codes: Sequence[int], *, severity: Sequence[int]) -> int:
    """Return the exit code of a run whose ranks ended with `codes`.

    Args:
        codes: of the ranks in the order in which they ended; negative: by a signal.
        severity: see run_ranks.
    """
    found = [KILLED if code < 0 else code for code in codes if code]
    if not found:
        return 0
    return next((code for code in severity if code in found), found[0])
