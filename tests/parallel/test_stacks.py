"""In which state is a process, and where does each thread of this one stand?"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from parallel.stacks import own_stacks, process_state

BUSY = "while True: pass"
IDLE = "import time; time.sleep(600)"
BUSY_THREAD = f"import threading; threading.Thread(target=exec, args=({BUSY!r},)).start()"


@pytest.fixture
def start() -> Iterator[Callable[[str], int]]:
    """Return what starts a Python program and gives its process."""
    running: list[subprocess.Popen[bytes]] = []

    def run(program: str) -> int:
        running.append(subprocess.Popen([sys.executable, "-c", program]))
        return running[-1].pid

    yield run
    for process in running:
        process.kill()
        process.wait()


def until_state(pid: int, letter: str) -> str:
    """Return the state once it begins with a letter, or the last one after 20 s."""
    deadline = time.monotonic() + 20
    while (state := process_state(pid))[0] != letter and time.monotonic() < deadline:
        time.sleep(0.01)
    return state


@pytest.mark.parametrize(("program", "letter"), [(BUSY, "R"), (IDLE, "S"), (BUSY_THREAD, "R")])
def test_a_process_runs_sleeps_and_stops(
    start: Callable[[str], int], program: str, letter: str
) -> None:
    pid = start(program)
    assert until_state(pid, letter)[0] == letter
    os.kill(pid, signal.SIGSTOP)
    assert until_state(pid, "T") == "T (stopped)"


def test_a_process_that_was_awaited_is_gone(start: Callable[[str], int]) -> None:
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    assert process_state(done.pid) == "gone"


def test_a_thread_that_waits_is_shown_where_it_waits() -> None:
    over = threading.Event()

    def wait_here() -> None:
        over.wait()

    waiting = threading.Thread(target=wait_here)
    waiting.start()
    try:
        found = own_stacks()
    finally:
        over.set()
        waiting.join()
    assert "wait_here" in [frame.function for frame in found[waiting.ident or 0]]
    own = found[threading.get_ident()]
    assert [frame.function for frame in own[:2]] == [
        "own_stacks",
        "test_a_thread_that_waits_is_shown_where_it_waits",
    ]
