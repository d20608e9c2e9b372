"""Where does each local rank stand when they hang?

A rank that waits in a collective runs no Python, so nobody can ask it anything; but faulthandler
writes the stack from inside the signal, in C. Each rank names a file for it when it starts
(`write_stack_on_signal`), and whoever gives up on the ranks asks for all of them before killing
them (`collect_stacks`). A thread of the rank's own needs no signal (`own_stacks`). No torch.
"""

import faulthandler
import itertools
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_SIGNAL = signal.SIGUSR1
_DEADLINE_S, _POLL_S = 3.0, 0.05
_MAX_FRAMES = 100
_FRAME = re.compile(r'File "(?P<path>.*)", line (?P<line>\d+) in (?P<function>.*)')


@dataclass(frozen=True, kw_only=True, slots=True)
class Frame:
    """One call on a stack."""

    function: str
    path: str
    line: int

    def __str__(self) -> str:
        """Return the call, as `all_reduce (distributed_c10d.py:2810)`."""
        return f"{self.function} ({Path(self.path).name}:{self.line})"


def write_stack_on_signal(folder: Path, *, rank: int) -> None:
    """Let this process write its stacks into `folder` whenever it gets SIGUSR1."""
    # Open for the life of the process: faulthandler keeps only the descriptor.
    file = _path(folder, rank).open("w", encoding="utf-8")
    faulthandler.register(_SIGNAL, file=file.fileno(), all_threads=True)
    _open_files.append(file)


_open_files: list[object] = []


def collect_stacks(
    folder: Path, *, pids: Sequence[int | None], entry: str
) -> list[tuple[Frame, ...]]:
    """Return the stack of each rank's main thread, innermost call first; waits 3 s at most.

    Args:
        folder: what the ranks gave to `write_stack_on_signal`.
        pids: the process of each rank, in rank order; None for one that never started.
        entry: the function that a rank's main thread began with; threads without it are left out.

    Returns:
        One stack for each of `pids`; empty where a rank is dead, stopped or not there yet.
    """
    for rank, pid in enumerate(pids):
        # Without the file the rank has no handler yet, and the signal would end it.
        if pid is not None and _path(folder, rank).exists():
            try:
                os.kill(pid, _SIGNAL)
            except ProcessLookupError:
                continue
    deadline = time.monotonic() + _DEADLINE_S
    written, before = _read(folder, len(pids)), [""]
    while (written != before or "" in written) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
        written, before = _read(folder, len(pids)), written
    return [_main_stack(text, entry) for text in written]


def describe(stacks: Sequence[Sequence[Frame]], *, num_frames: int) -> str:
    """Return the innermost calls of every rank, a block of lines for each, innermost last."""
    lines: list[str] = []
    for rank, stack in enumerate(stacks):
        lines.append(f"rank {rank}, innermost call last:" if stack else f"rank {rank}: no stack")
        lines += [
            f'  File "{frame.path}", line {frame.line}, in {frame.function}'
            for frame in reversed(stack[:num_frames])
        ]
    return "\n".join(lines)


def _path(folder: Path, rank: int) -> Path:
    return folder / f"stack_{rank}.txt"


def _read(folder: Path, num_ranks: int) -> list[str]:
    paths = [_path(folder, rank) for rank in range(num_ranks)]
    return [path.read_text(encoding="utf-8") if path.exists() else "" for path in paths]


def _main_stack(text: str, entry: str) -> tuple[Frame, ...]:
    """Return the thread that `entry` began, of all that faulthandler wrote."""
    for thread in text.split("hread 0x")[1:]:
        frames = tuple(
            Frame(function=found["function"], path=found["path"], line=int(found["line"]))
            for found in _FRAME.finditer(thread)
        )
        if any(frame.function == entry for frame in frames):
            return frames
    return ()


def own_stacks() -> dict[int, tuple[Frame, ...]]:
    """Return the stack of each thread of this process by identifier, innermost call first.

    A thread of the process asks, while the others stand where they stand.
    """
    found: dict[int, tuple[Frame, ...]] = {}
    for thread, innermost in sys._current_frames().items():  # pyright: ignore[reportPrivateUsage]  no other way
        calls = itertools.islice(traceback.walk_stack(innermost), _MAX_FRAMES)
        found[thread] = tuple(
            Frame(function=frame.f_code.co_name, path=frame.f_code.co_filename, line=line)
            for frame, line in calls
        )
    return found


def process_state(pid: int) -> str:
    """Return the state of a process of this machine, as `T (stopped)`, or `gone`.

    Of several threads one that runs or waits for a disk speaks for all; else the main thread does.
    """
    states: list[str] = []
    for thread in (pid, *_threads_of(pid)):
        try:
            status = Path(f"/proc/{thread}/status").read_text(encoding="utf-8", errors="replace")
        except OSError:  # it has ended since
            continue
        states += [line[6:].strip() for line in status.splitlines() if line.startswith("State:")]
    if not states:
        return "gone" if Path("/proc/self/status").exists() else "unknown"
    return next((state for state in states if state[0] in "RD"), states[0])


def _threads_of(pid: int) -> list[int]:
    try:
        return [int(name) for name in os.listdir(f"/proc/{pid}/task")]
    except OSError:
        return []
