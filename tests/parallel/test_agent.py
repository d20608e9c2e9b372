"""Local ranks of one command: exit codes, signals, restarts, and no process left behind."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from parallel.agent import Death, run_ranks, worst_code

ROOT = Path(__file__).resolve().parents[2]
OWN = "parallel.spawn:call_with_own"
SEVERITY = (2, 93, 1, 85, 75)


@pytest.mark.parametrize(
    ("codes", "worst"),
    [
        ([0, 0], 0),
        ([0, 2], 2),
        ([85, 1], 1),
        ([75, 85], 85),
        ([-9, 85, 85], 85),
        ([-9, 93, 0], 93),
        ([7, 85], 85),
        ([7, 8], 7),
        ([], 0),
    ],
)
def test_the_code_that_says_most_is_the_runs(codes: list[int], worst: int) -> None:
    assert worst_code(codes, severity=SEVERITY) == worst


def test_the_run_ends_with_the_code_of_the_rank_that_failed() -> None:
    assert run_ranks(OWN, ("builtins:int", ["0", "2"]), num_ranks=2) == 2


def test_ranks_that_succeed_end_with_zero() -> None:
    assert run_ranks("builtins:int", num_ranks=1) == 0


def test_a_request_to_stop_is_passed_on_and_a_rank_killed_by_it_ends_the_run() -> None:
    handler = signal.getsignal(signal.SIGTERM)
    others = set(multiprocessing.active_children())

    def stop_once_a_rank_is_there() -> None:
        while not set(multiprocessing.active_children()) - others:
            threading.Event().wait(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    asking = threading.Thread(target=stop_once_a_rank_is_there)
    asking.start()
    deaths: list[Death] = []
    # The rank would wait for ever, and has no handler: the signal kills it. A run that was asked to
    # stop is not started again.
    code = run_ranks(
        "signal:pause", num_ranks=1, on_death=deaths.append, may_restart=lambda _: True
    )
    assert code == 85
    assert [str(death) for death in deaths] == ["rank 0 was killed by SIGTERM"]
    asking.join()
    assert signal.getsignal(signal.SIGTERM) is handler


def test_ranks_that_die_are_started_again_while_they_may(tmp_path: Path) -> None:
    deaths: list[Death] = []
    asked: list[int] = []

    def may_restart(code: int) -> bool:
        asked.append(code)
        return len(asked) < 3

    code = run_ranks(
        "tests.parallel.deaths:die_until",
        (str(tmp_path), 2),
        num_ranks=2,
        on_death=deaths.append,
        may_restart=may_restart,
    )
    assert code == 0
    assert asked == [85, 85]
    assert [death.rank for death in deaths] == [1, 1]


def test_a_stopped_rank_does_not_outlive_the_others() -> None:
    started = time.monotonic()
    assert run_ranks("tests.parallel.deaths:stop_one", num_ranks=2) == 85
    assert time.monotonic() - started < 15  # killed at once, not after 20 s


def test_ranks_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    code = (
        "from parallel.agent import run_ranks;"
        f"run_ranks('tests.parallel.deaths:write_pid_and_wait', ({str(tmp_path)!r},), num_ranks=2)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    while len(found := list(tmp_path.glob("pid_*"))) < 2:
        assert parent.poll() is None
        threading.Event().wait(0.05)
    pids = [int(path.name.removeprefix("pid_")) for path in found]
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline, "ranks train on unseen"
        threading.Event().wait(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["group", "fork server"])
def test_ranks_do_not_outlive_the_process_they_were_forked_from(lost: str, tmp_path: Path) -> None:
    """SIGTERM to the whole process group, as batch systems send it, and the fork server killed."""
    code = (
        "from parallel.agent import run_ranks; import sys;"
        f"sys.exit(run_ranks('tests.parallel.deaths:write_pid_and_wait', ({str(tmp_path)!r},),"
        " num_ranks=2))"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, start_new_session=True)
    while len(found := list(tmp_path.glob("pid_*"))) < 2:
        assert parent.poll() is None
        threading.Event().wait(0.05)
    pids = [int(path.name.removeprefix("pid_")) for path in found]
    if lost == "group":
        os.killpg(parent.pid, signal.SIGTERM)
    else:
        os.kill(int(Path(f"/proc/{pids[0]}/stat").read_text().split()[3]), signal.SIGKILL)
    assert parent.wait(30) == 85
    deadline = time.monotonic() + 20  # killed, but not its children: nobody waits for their end
    while any(lives(pid) for pid in pids):
        assert time.monotonic() < deadline, "ranks train on unseen"
        threading.Event().wait(0.05)


def lives(pid: int) -> bool:
    """Return whether a process is there and is not one whose end nobody asks for."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"
