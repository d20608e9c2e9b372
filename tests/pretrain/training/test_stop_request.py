"""A run hears of signals, of its request file and of the end of its time, and of nothing else."""

import math
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from parallel.cluster import Cluster
from pretrain.training import stop_request
from pretrain.training.stop_request import (
    DEADLINE_NAME,
    StopRequest,
    remove_request,
    working_time_s,
)

CLUSTER = Cluster(
    name="small",
    num_nodes=1,
    gpus_per_node=1,
    gpu_memory_bytes=1,
    node_link_bytes_per_s=1,
    network_bytes_per_s=1,
    time_limit_s=100,
    time_margin_s=30,
)


@pytest.fixture(autouse=True)
def signals_put_back() -> Iterator[None]:
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)}
    yield
    for signum, action in before.items():
        signal.signal(signum, action)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return the monotonic time that the module sees, in a list that a test may change."""
    now = [1000.0]
    monkeypatch.setattr(stop_request.time, "monotonic", lambda: now[0])
    return now


def request(folder: Path, *, seconds: float = math.inf, polls: bool = True) -> StopRequest:
    return StopRequest(folder, working_time_s=seconds, polls_file=polls)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_to_stop(tmp_path: Path, signum: signal.Signals) -> None:
    stop = request(tmp_path)
    assert not stop()
    os.kill(os.getpid(), signum)
    assert stop()
    assert stop.received == signum.name


def test_a_second_interrupt_ends_the_process(tmp_path: Path) -> None:
    stop = request(tmp_path)
    os.kill(os.getpid(), signal.SIGINT)
    assert stop()
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_the_file_asks_to_stop_and_is_looked_for_once_a_second(
    tmp_path: Path, clock: list[float]
) -> None:
    stop = request(tmp_path)
    assert not stop()
    (tmp_path / "stop.request").write_text("asked\n")
    clock[0] += 0.9
    assert not stop()  # not yet a second since the last look
    clock[0] += 0.2
    assert stop()
    assert "stop.request" in stop.received


def test_other_ranks_than_the_first_do_not_look_for_the_file(
    tmp_path: Path, clock: list[float]
) -> None:
    (tmp_path / "stop.request").touch()
    stop = request(tmp_path, polls=False)
    clock[0] += 10.0
    assert not stop()


def test_a_request_is_remembered_when_its_file_is_gone(tmp_path: Path) -> None:
    (tmp_path / "stop.request").touch()
    stop = request(tmp_path)
    assert stop()
    remove_request(tmp_path)
    assert not (tmp_path / "stop.request").exists()
    assert stop()
    remove_request(tmp_path)  # a second removal finds nothing, and that is no error


def test_the_end_of_its_time_asks_to_stop(tmp_path: Path, clock: list[float]) -> None:
    stop = request(tmp_path, seconds=50.0)
    clock[0] += 49.0
    assert not stop()
    clock[0] += 1.0
    assert stop()
    assert "time limit" in stop.received


def test_the_deadline_of_the_job_counts_and_not_the_start_of_the_rank() -> None:
    environment = {DEADLINE_NAME: f"{time.time() + 500:.0f}"}
    assert working_time_s(CLUSTER, environment=environment) == pytest.approx(500, abs=5)
    assert working_time_s(None, environment=environment) == pytest.approx(500, abs=5)
    assert working_time_s(CLUSTER, environment={DEADLINE_NAME: "1000"}) < 0


def test_without_a_batch_job_the_limit_of_the_cluster_counts_less_its_margin() -> None:
    assert working_time_s(CLUSTER, environment={}) == 70
    assert working_time_s(None, environment={}) == math.inf


@pytest.mark.parametrize("text", ["", "soon", "nan", "inf"])
def test_a_deadline_that_is_no_number_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=f"{DEADLINE_NAME}='{text}'.*seconds since 1970"):
        working_time_s(None, environment={DEADLINE_NAME: text})
