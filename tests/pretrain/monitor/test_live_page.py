"""Does the page follow a run while it goes on, and cost its steps nothing?"""

import json
import logging
import re
import threading
import time
from pathlib import Path

import pytest

from pretrain.monitor.live_page import Follower, LivePage
from pretrain.monitor.page import PAGE_NAME
from pretrain.monitor.records import JsonLinesSink

WAIT_S = 20.0


def state_of(folder: Path) -> tuple[str, int]:
    page = (folder / PAGE_NAME).read_text()
    (inlined,) = re.findall(r'id="data">(.*?)</script>', page)
    data = json.loads(inlined)
    return data["state"], data["last"].get("step", 0)


def await_state(folder: Path, wanted: tuple[str, int]) -> tuple[str, int]:
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        if (folder / PAGE_NAME).exists() and (found := state_of(folder)) == wanted:
            return found
        threading.Event().wait(0.01)
    return state_of(folder)


def test_the_page_follows_and_says_at_last_that_the_run_is_over(tmp_path: Path) -> None:
    records = JsonLinesSink(tmp_path / "metrics.jsonl")
    page = LivePage(tmp_path, interval_s=0.02)
    for step in (1, 2, 3):
        records.log({"step": step, "tokens": step, "loss": 1.0})
        assert await_state(tmp_path, ("running", step)) == ("running", step)
    (tmp_path / "summary.json").write_text("{}")
    records.close()
    page.close()
    assert state_of(tmp_path) == ("finished", 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        PAGE_NAME,
        "metrics.jsonl",
        "summary.json",
    ]


def test_a_run_that_ends_before_the_first_interval_has_its_page(tmp_path: Path) -> None:
    records = JsonLinesSink(tmp_path / "metrics.jsonl")
    page = LivePage(tmp_path, interval_s=3600.0)
    records.log({"step": 1, "loss": 1.0})
    records.close()
    page.close()
    assert state_of(tmp_path) == ("not finished", 1)


def test_a_line_that_is_being_written_is_read_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "attempt": 1, "loss": 2.0}\n{"step": 2, "att')
    follower = Follower(path)
    follower.read_on(lambda _: None)
    assert list(follower.curves.curve("loss").steps) == [1]
    with path.open("ab") as file:
        file.write(b'empt": 1, "loss": 2.0}\n{"cut": \n{"step": 3, "attempt": 1, "loss": 2.0}\n')
    follower.read_on(lambda _: None)
    assert list(follower.curves.curve("loss").steps) == [1, 2, 3]


def test_a_long_history_is_read_with_rests(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with path.open("w") as file:
        for step in range(1, 20_001):
            file.write(json.dumps({"step": step, "attempt": 1, "loss": 2.0, "lr": 1e-3}) + "\n")
    rests: list[float] = []
    begun_s = time.thread_time()
    Follower(path).read_on(rests.append)
    worked_s = time.thread_time() - begun_s
    # 0.02 s of work between two rests, and one line more
    assert sum(rests) > 2 * worked_s


def test_a_disk_that_refuses_is_told_once_and_does_not_end_the_thread(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = threading.Event()
    calls: list[int] = []

    def refuse(*_: object) -> None:
        calls.append(1)
        if len(calls) > 3:
            tried.set()
        raise OSError("no space left on device")

    monkeypatch.setattr("pretrain.monitor.live_page.publish_page", refuse)
    with caplog.at_level(logging.WARNING):
        page = LivePage(tmp_path, interval_s=0.001)
        assert tried.wait(WAIT_S)
        page.close()
    assert caplog.text.count("no space left") == 1
