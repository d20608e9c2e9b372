"""What ranks of test_agent.py do: die, stop, wait."""

import os
import signal
from pathlib import Path


def die_until(folder: str, times: int) -> int:
    """Kill rank 1 as often as is asked."""
    if os.environ["RANK"] == "0":
        return 0
    for number in range(times):
        mark = Path(folder) / str(number)
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
    return 0


def stop_one() -> int:
    """Stop rank 1 and fail on rank 0, which has noticed."""
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGSTOP)
    return 85


def write_pid_and_wait(folder: str) -> int:
    """Say who I am, and wait for ever."""
    (Path(folder) / f"pid_{os.getpid()}").touch()
    signal.pause()
    return 0
