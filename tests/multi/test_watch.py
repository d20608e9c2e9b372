"""A run whose rank stops, sleeps or goes another way ends by itself with 85 and names the rank."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from parallel.agent import run_ranks
from parallel.beats import Watch
from parallel.layout import Layout
from pretrain.monitor.incidents import read_incidents
from pretrain.monitor.stragglers import Stragglers
from pretrain.monitor.telemetry_config import TelemetryConfig
from pretrain.training.run import Run
from tests.conftest import tiny_curriculum
from tests.launch.conftest import SMALL, STEP_TOKENS, TOKENS

MakeRun = Callable[..., Run]
ROOT = Path(__file__).resolve().parents[2]
INTERVAL_S = 2.0  # at 1 s a busy machine may answer some tenths of a second too late
CLOSE = Watch(interval_s=INTERVAL_S, hang_s=3.0, slow_hang_s=30.0)
QUIET = TelemetryConfig(wandb="disabled", console_interval_steps=10)
STEPS = 1_000  # more than any of these runs gets to


def only_incident(folder: Path) -> dict[str, Any]:
    found: list[dict[str, Any]] = read_incidents(folder)
    assert [incident["kind"] for incident in found] == ["hang"], found
    exit_record = json.loads((folder / "exit.json").read_text(encoding="utf-8"))
    assert exit_record["code"] == 85
    assert exit_record["reason"] == found[0]["text"]
    return found[0]


def start_words(corpus: Path, root: Path) -> list[str]:
    """Return the command of a run that does not end by itself."""
    words = [*SMALL, f"data.corpus={corpus}", f"output_root={root}", "name=t"]
    words += [
        "restarts.in_job=0",
        f"watch.interval_s={INTERVAL_S}",
        f"{TOKENS}={STEPS * STEP_TOKENS}",
    ]
    return [sys.executable, str(ROOT / "launch" / "pretrain.py"), *words]


def ranks_of(parent: int) -> list[int]:
    """Return the processes of a run's ranks, in rank order: children of the one they fork from."""
    return sorted(
        grandchild
        for child in _children(parent)
        if b"forkserver" in Path(f"/proc/{child}/cmdline").read_bytes()
        for grandchild in _children(child)
    )


def _children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8")
    return [int(child) for child in text.split()]


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill what a failed test would leave: a stopped rank outlives its parent."""
    if process.poll() is None:
        for pid in ranks_of(process.pid):
            os.kill(pid, signal.SIGKILL)
    process.kill()
    process.wait()


def wait_for(path: Path, *, limit_s: float = 60.0) -> None:
    deadline = time.monotonic() + limit_s
    while not (path.exists() and path.stat().st_size):
        assert time.monotonic() < deadline, f"{path} did not come"
        time.sleep(0.05)


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_stopped_rank_is_found_within_two_intervals_and_leaves_no_process(
    rank: int, tiny_corpus: Path, tmp_path: Path
) -> None:
    command = start_words(tiny_corpus, tmp_path)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(tmp_path / "t" / "metrics.jsonl")
        ranks = ranks_of(process.pid)
        os.kill(ranks[rank], signal.SIGSTOP)
        stopped = time.time()
        assert process.wait(timeout=30) == 85
    finally:
        end(process)
    incident = only_incident(tmp_path / "t")
    assert incident["rank"] == rank
    assert incident["time_unix_s"] - stopped < 2 * INTERVAL_S
    detail = incident["detail"]
    assert detail["process_states"] == {str(rank): "T (stopped)"}
    assert detail["missing"]["not_by"] == [rank]
    assert not [pid for pid in ranks if Path(f"/proc/{pid}").exists()]
    other = Path(detail["stacks"]) / f"rank_{1 - rank:05d}.txt"
    assert "in measure_step" in other.read_text(encoding="utf-8")
    assert "could not write" in (other.parent / f"rank_{rank:05d}.txt").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_stopped_rank_0_that_holds_the_store_is_found_too(
    tiny_corpus: Path, tmp_path: Path
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    own = {**os.environ, **place, "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    command = start_words(tiny_corpus, tmp_path)
    ranks = [
        subprocess.Popen(command, env={**own, "RANK": rank, "LOCAL_RANK": rank},
                         stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for rank in ("0", "1")
    ]  # fmt: skip
    try:
        wait_for(tmp_path / "t" / "metrics.jsonl")
        ranks[0].send_signal(signal.SIGSTOP)
        assert ranks[1].wait(timeout=30) == 85
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    incident = only_incident(tmp_path / "t")
    assert "the rendezvous store, by which ranks watch each other, is gone" in incident["text"]
    assert "in measure_step" in (Path(incident["detail"]["stacks"]) / "rank_00001.txt").read_text()


@pytest.mark.slow
def test_a_killed_rank_ends_the_run_at_once_and_is_no_hang(
    tiny_corpus: Path, tmp_path: Path
) -> None:
    command = start_words(tiny_corpus, tmp_path)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(tmp_path / "t" / "metrics.jsonl")
        ranks = ranks_of(process.pid)
        os.kill(ranks[1], signal.SIGKILL)
        assert process.wait(timeout=30) == 85
    finally:
        end(process)
    (incident,) = read_incidents(tmp_path / "t")
    assert (incident["kind"], incident["rank"]) == ("rank_died", 1)
    assert not [pid for pid in ranks if Path(f"/proc/{pid}").exists()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "place", "where"),
    [
        ("sleeps", "try_step", "_sleep (watch_faults.py"),
        ("sleeps", "next_batch", "_sleep (watch_faults.py"),
        ("holds the lock", "try_step", None),
        ("enters another collective", "try_step", "_other_collective (watch_faults.py"),
    ],
)
def test_a_rank_that_does_wrong_is_named_with_its_place(
    fault: str, place: str, where: str | None, tiny_run: MakeRun
) -> None:
    watch = replace(CLOSE, slow_hang_s=CLOSE.hang_s) if place == "next_batch" else CLOSE
    run = tiny_run(
        Layout(num_ranks=2),
        curriculum=tiny_curriculum(STEPS * 8 * 64),
        watch=watch,
        telemetry=QUIET,
    )
    target = "tests.multi.watch_faults:train_with_fault"
    assert run_ranks(target, (run, fault, place, 4), num_ranks=2) == 85
    incident = only_incident(run.folder)
    detail = incident["detail"]
    assert incident["rank"] == 1 or detail["mismatch"]
    if where is None:
        assert incident["step"] in (3, 4)  # of the last beat that it wrote
        assert "1" not in detail["where"]  # who holds the lock cannot tell
        return
    assert incident["step"] == 4
    assert where in detail["where"]["1"]
    if fault == "enters another collective":
        ops = {(told["rank"], told["op"]) for told in detail["mismatch"]}
        assert ops == {(0, "all_reduce"), (1, "broadcast")}
    else:
        assert detail["missing"]["not_by"] == [1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "part"), [("try_step", "compute"), ("next_batch", "data wait"), ("try_step", None)]
)
def test_a_rank_that_is_slow_every_time_is_named_once_and_no_other(
    place: str, part: str | None, tiny_run: MakeRun
) -> None:
    run = tiny_run(
        Layout(num_ranks=2),
        curriculum=tiny_curriculum(60 * 8 * 64),
        watch=CLOSE,
        stragglers=Stragglers(window_steps=20),
        telemetry=QUIET,
    )
    seconds = 0.25 if part else 0.0
    target = "tests.multi.watch_faults:train_slowly"
    assert run_ranks(target, (run, place, seconds), num_ranks=2) == 0
    incidents: list[dict[str, Any]] = read_incidents(run.folder)
    named = [(found["kind"], found["rank"], found["detail"]["part"])
             for found in incidents]  # fmt: skip
    assert named == ([("straggler", 1, part)] if part else [])
