"""One rank's thread against a store in which the test plays the other rank."""

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch._C._distributed_c10d import HashStore, PrefixStore

from parallel import watch
from parallel.beats import Beat, Watch
from parallel.recorder import Waits
from parallel.watch import RankWatch, Report

CLOSE = Watch(interval_s=0.5, hang_s=5.0, slow_hang_s=10.0)
LIMIT_S = 10.0


class Other:
    """Rank 1 of two: it beats until it is told to be silent."""

    def __init__(self, store: Any) -> None:
        self.store = PrefixStore("watch", store)
        self.beats, self.ends = threading.Event(), threading.Event()
        self.beats.set()
        self._beat = Beat(
            rank=1, count=0, phase="step", step=3, idle_s=0.0, patience_s=5.0, node="n0", pid=1
        )
        self.beat()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def beat(self) -> None:
        self._beat = replace(self._beat, count=self._beat.count + 1)
        self.store.set("beat/1", self._beat.encode())

    def _run(self) -> None:
        while not self.ends.wait(0.05):
            if self.beats.is_set():
                self.beat()

    def end(self) -> None:
        self.ends.set()
        self._thread.join()


@pytest.fixture
def world(
    one_rank: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[RankWatch, Other, list[Report], list[int]]]:
    """Yield a watching rank 0, the other rank, what was reported, and the exit codes."""
    reports: list[Report] = []
    codes: list[int] = []

    over = threading.Event()

    def stand_still(code: int) -> None:  # in a real run nothing of the process is left
        codes.append(code)
        over.wait()

    monkeypatch.setattr(watch, "process_state", lambda _: "T (stopped)")
    monkeypatch.setattr(watch.os, "_exit", stand_still)
    store = HashStore()
    other = Other(store)
    own = RankWatch(
        store, ranks=(0, 2), node="n0", watch=CLOSE, waits=Waits(), report=reports.append
    )
    own.start(tmp_path)
    yield own, other, reports, codes
    own._leaving.set()  # no further round
    over.set()
    own.found.clear()
    own.leave()
    other.end()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.005)


World = tuple[RankWatch, Other, list[Report], list[int]]


def test_a_silent_rank_is_reported_once_and_the_process_ends_with_85(world: World) -> None:
    _, other, reports, codes = world
    other.beats.clear()
    until(lambda: bool(codes))
    assert codes == [85]
    assert [report.finding.silent for report in reports] == [(1,)]
    assert reports[0].verdict.culprits == (1,)
    files = sorted(path.name for path in reports[0].folder.iterdir())
    assert files == ["rank_00000.txt", "rank_00001.txt"]


def test_a_rank_that_was_late_and_lives_is_forgiven_and_found_when_it_really_stops(
    world: World,
) -> None:
    _, other, reports, codes = world
    other.beats.clear()
    until(lambda: other.store.check(["ask/0"]))
    other.beat()
    other.beats.set()
    until(lambda: other.store.check(["end/0"]))
    assert bytes(other.store.get("end/0")) == b"go on"
    assert (reports, codes) == ([], [])
    other.beats.clear()
    until(lambda: bool(codes))
    assert codes == [85]
    assert [report.finding.silent for report in reports] == [(1,)]


@pytest.mark.parametrize(("state", "tries"), [("R (running)", 3), ("D (disk sleep)", 3), ("T", 0)])
def test_a_silent_process_that_runs_is_left_alone_three_times_and_a_stopped_one_never(
    world: World, monkeypatch: pytest.MonkeyPatch, state: str, tries: int
) -> None:
    _, other, reports, codes = world
    monkeypatch.setattr(watch, "process_state", lambda _: state)
    other.beats.clear()
    until(lambda: bool(codes))
    asked = [turn for turn in range(8) if other.store.check([f"ask/{turn}"])]
    assert asked == list(range(tries + 1))
    assert reports[0].states == {1: state}
    assert len(reports) == 1


def test_a_store_that_fails_ends_the_process_with_a_report(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, _, reports, codes = world

    def fail() -> None:
        raise RuntimeError("connection reset")

    monkeypatch.setattr(own, "_round", fail)
    until(lambda: bool(codes) and bool(reports))  # of two threads that end it one reports
    assert set(codes) == {85}
    assert "connection reset" in reports[0].store_error
