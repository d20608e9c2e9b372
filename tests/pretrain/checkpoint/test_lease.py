"""One process at a time owns a run; who is gone is replaced without a person."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from pretrain.checkpoint import lease as lease_module
from pretrain.checkpoint.lease import (
    Attempt,
    Lease,
    LeaseError,
    read_attempts,
    take_lease,
    this_owner,
)

ROOT = Path(__file__).resolve().parents[3]
HOLD = """
import sys, time
sys.path.insert(0, sys.argv[3])
from pathlib import Path
from pretrain.checkpoint.lease import take_lease
lease = take_lease(Path(sys.argv[1]), lease_s=float(sys.argv[2]))
print(lease.number, flush=True)
for line in sys.stdin:
    print(lease.why_lost() or "still mine", flush=True)
lease.end(code=0, reason="done")
"""


class Holder:
    """Another process that holds a run."""

    def __init__(self, folder: Path, *, lease_s: float) -> None:
        command = [sys.executable, "-c", HOLD, str(folder), str(lease_s), str(ROOT)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.number = self.answer()

    def answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def ask(self) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.answer()

    def leave(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(10)


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[Holder]:
    found = Holder(tmp_path, lease_s=0.4)
    yield found
    found.process.send_signal(signal.SIGCONT)
    found.process.kill()
    with found.process:
        pass


def never(_: float) -> None:
    raise AssertionError("there is nothing to wait for")


def on_another_host(folder: Path) -> None:
    """Make the newest attempt one of a host whose processes cannot be seen from here."""
    path = max((folder / "attempts").glob("*.json"))
    record = json.loads(path.read_text())
    record["owner"]["host"] = "node-0042"
    path.write_text(json.dumps(record))


def test_attempts_are_numbered_from_one(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        lease = take_lease(tmp_path, lease_s=60, wait=never)
        assert lease.number == number
        lease.end(code=75, reason="asked to stop")
    assert [attempt.code for attempt in read_attempts(tmp_path)] == [75, 75, 75]


def test_a_second_job_is_refused_with_the_owners_name(holder: Holder, tmp_path: Path) -> None:
    with pytest.raises(LeaseError, match=rf"{socket.gethostname()}, process {holder.process.pid}"):
        take_lease(tmp_path, lease_s=0.4)
    assert holder.ask() == "still mine"


def test_an_owner_that_has_ended_is_followed_at_once(holder: Holder, tmp_path: Path) -> None:
    holder.leave()
    assert take_lease(tmp_path, lease_s=60, wait=never).number == 2


def test_an_owner_killed_on_this_host_is_followed_at_once(holder: Holder, tmp_path: Path) -> None:
    holder.process.kill()
    holder.process.wait(10)
    assert take_lease(tmp_path, lease_s=60, wait=never).number == 2


def test_another_process_of_the_same_number_is_not_the_owner(tmp_path: Path) -> None:
    lease = take_lease(tmp_path, lease_s=60)
    lease._ended.set()
    gone = replace(this_owner(), started=this_owner().started - 1)
    assert gone.is_certainly_gone
    assert not this_owner().is_certainly_gone


def test_a_silent_owner_elsewhere_is_followed_after_the_lease(
    holder: Holder, tmp_path: Path
) -> None:
    """It is stopped, as a machine that hangs; when it wakes up, it knows that it has lost."""
    holder.process.send_signal(signal.SIGSTOP)
    on_another_host(tmp_path)
    started = time.monotonic()
    lease = take_lease(tmp_path, lease_s=0.4)
    assert time.monotonic() - started >= 0.4
    assert lease.number == 2
    holder.process.send_signal(signal.SIGCONT)
    assert "taken over" in holder.ask()
    assert lease.why_lost() == ""
    lease.end(code=0, reason="")


def test_clocks_that_differ_by_an_hour_change_nothing(
    holder: Holder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time
    for skew in (-3600.0, 3600.0):
        monkeypatch.setattr(lease_module.time, "time", lambda skew=skew: now() + skew)
        on_another_host(tmp_path)
        with pytest.raises(LeaseError):
            take_lease(tmp_path, lease_s=0.4)


def test_of_many_takers_one_wins(tmp_path: Path) -> None:
    """All see an owner that has ended; each number is given once, so one is alive at a time."""
    numbers: list[int] = []
    refused: list[str] = []
    barrier = threading.Barrier(8)

    def take() -> None:
        barrier.wait()
        try:
            numbers.append(take_lease(tmp_path, lease_s=0.2).number)
        except LeaseError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert numbers == [1]
    assert len(refused) == 7


def test_an_attempts_file_is_never_seen_half(tmp_path: Path) -> None:
    lease = take_lease(tmp_path, lease_s=0.02)
    for _ in range(300):
        assert [attempt.number for attempt in read_attempts(tmp_path)] == [1]
    lease.end(code=0, reason="")


def test_what_an_attempt_reached_is_kept(tmp_path: Path) -> None:
    lease = take_lease(tmp_path, lease_s=60, digest="abc")
    lease.note(from_step=10)
    assert not read_attempts(tmp_path)[0].has_progressed
    lease.note(committed_step=20)
    lease.end(code=85, reason="a rank died")
    (attempt,) = read_attempts(tmp_path)
    assert attempt.has_progressed
    assert (attempt.from_step, attempt.committed_step) == (10, 20)
    assert (attempt.code, attempt.reason, attempt.digest) == (85, "a rank died", "abc")


def test_a_file_that_cannot_be_read_holds_nobody_up(tmp_path: Path) -> None:
    """A disk that filled up has left half a file of an older program."""
    (tmp_path / "attempts").mkdir()
    (tmp_path / "attempts" / "00000004.json").write_text('{"number": 4, "own')
    assert take_lease(tmp_path, lease_s=0.2).number == 5


def test_one_read_that_fails_does_not_replace_an_owner(
    holder: Holder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = lease_module._read
    answers = iter([None, None])
    monkeypatch.setattr(lease_module, "_read", lambda path: next(answers, read(path)))
    with pytest.raises(LeaseError, match="is held by"):
        take_lease(tmp_path, lease_s=0.6)
    assert holder.ask() == "still mine"


def test_a_file_of_newer_code_is_read(holder: Holder, tmp_path: Path) -> None:
    path = tmp_path / "attempts" / "00000001.json"
    holder.process.send_signal(signal.SIGSTOP)
    path.write_text(json.dumps({**json.loads(path.read_text()), "mood": "good"}))
    assert read_attempts(tmp_path)[0].number == 1


def test_a_full_disk_does_not_end_the_renewal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = take_lease(tmp_path, lease_s=0.04)
    beats = read_attempts(tmp_path)[0].beat
    with monkeypatch.context() as patch:
        refused = threading.Event()

        def refuse(_self: Lease) -> None:
            refused.set()
            raise OSError(28, "No space left on device")

        patch.setattr(Lease, "_write", refuse)
        assert refused.wait(10)
    deadline = time.monotonic() + 10
    while read_attempts(tmp_path)[0].beat <= beats:
        assert time.monotonic() < deadline
    lease.end(code=0, reason="")


def test_an_attempt_is_plain_json(tmp_path: Path) -> None:
    take_lease(tmp_path, lease_s=60)
    record = json.loads((tmp_path / "attempts" / "00000001.json").read_text())
    assert record["owner"] == asdict(this_owner())
    assert Attempt(**{**record, "owner": this_owner()}).number == 1
    assert os.listdir(tmp_path / "attempts") == ["00000001.json"]
