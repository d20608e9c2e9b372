"""Storage that is full, slow, read-only or gone: training goes on, or ends with 85 and goes on."""

import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pretrain.checkpoint.lease import read_attempts
from pretrain.checkpoint.manifest import list_checkpoints
from pretrain.checkpoint.resume import find_newest
from pretrain.monitor.incidents import read_incidents
from pretrain.monitor.records import read_attempts as read_records
from pretrain.training.run import Run
from tests.chaos.oracles import Truth, violations
from tests.chaos.play import Played, play
from tests.chaos.scenario import Scenario
from tests.chaos.storage import mounted

MakeRun = Callable[..., Run]


@pytest.fixture
def make_run(tiny_corpus: Path, tmp_path: Path, whole: Played) -> MakeRun:
    def make(**changes: Any) -> Run:
        scenario = Scenario(layout="ep2", **changes)
        return scenario.run(tmp_path / "runs", corpus=tiny_corpus, name="disturbed")

    return make


def kinds(run: Run) -> Counter[str]:
    return Counter(str(record["kind"]) for record in read_incidents(run.folder))


def fill(root: Path) -> list[Path]:
    """Use up what a small file system has left, bytes or inodes; return the files."""
    fillers: list[Path] = []
    try:
        while True:
            path = root / f"filler_{len(fillers)}"
            path.touch()
            fillers.append(path)
            path.write_bytes(bytes(1 << 20))
    except OSError:
        return fillers


@pytest.mark.slow
@pytest.mark.parametrize("options", ["size=24m", "nr_inodes=40"], ids=["bytes", "inodes"])
def test_training_goes_on_when_the_disk_is_full_and_the_old_checkpoint_loads(
    options: str, make_run: MakeRun, truth: Truth
) -> None:
    """Somebody else fills the disk before step 8 is saved, and makes room when the alarm comes."""
    run = make_run()
    root = run.folder / "checkpoints"
    seen: list[list[str]] = []

    def look_after_the_disk() -> None:
        while not list_checkpoints(root):
            threading.Event().wait(0.02)
        fillers = fill(root)
        while not kinds(run)["save_failed"]:
            threading.Event().wait(0.02)
        seen.append([path.name for path in list_checkpoints(root)])
        assert find_newest(root) is not None
        for path in fillers:
            path.unlink()

    with mounted(root, options):
        person = threading.Thread(target=look_after_the_disk)
        person.start()
        played = play(run, ["step.begin:sleep=2:rank=0:step=6"])
        person.join()
        assert seen == [["step_00000004"]]
        assert kinds(run).keys() == {"save_failed"}
        assert violations(played, truth, codes=[0]) == []


@pytest.mark.slow
def test_a_limit_on_the_size_of_files_is_a_full_disk(make_run: MakeRun, truth: Truth) -> None:
    """RLIMIT_FSIZE, for whoever may mount nothing: EFBIG, until the rank is started again."""
    run = make_run()
    played = play(run, ["step.begin:limit=300000:rank=1:step=9", "step.begin:kill:rank=1:step=21"])
    incidents = Counter(save_failed=3, rank_died=1)  # of steps 12, 16 and 20
    assert violations(played, truth, codes=[85, 0], incidents=incidents) == []
    assert [attempt.from_step for attempt in read_attempts(run.folder)] == [0, 8]


@pytest.mark.slow
def test_slow_storage_stretches_the_interval_and_not_the_steps(
    make_run: MakeRun, truth: Truth
) -> None:
    run = make_run()
    played = play(run, ["save.file_written:sleep=2:rank=1:every"])
    assert violations(played, truth, codes=[0], incidents=Counter()) == []
    records = read_records(run.folder / "metrics.jsonl")
    saves = [record for record in records if "checkpoint_save_s" in record]
    assert all(float(record["checkpoint_save_s"]) >= 2 for record in saves)
    assert all(float(record["checkpoint_blocking_s"]) < 0.5 for record in saves)
    assert len(saves) < 6  # of the six that were due


@pytest.mark.slow
def test_a_source_that_is_gone_ends_the_start_and_the_next_goes_on(
    make_run: MakeRun, tiny_corpus: Path, tmp_path: Path, truth: Truth
) -> None:
    """A file system that hangs answers nothing: the wait is bounded, and the file is named."""
    run = make_run()
    reading = replace(run.data.reading, timeout_s=2.0)
    run = replace(run, data=replace(run.data, reading=reading))
    played = play(run, ["data.read:sleep=600:rank=1"])
    incidents = Counter(data=1)
    assert violations(played, truth, codes=[85, 0], incidents=incidents) == []
    (record,) = read_incidents(run.folder)
    assert record["rank"] == 1
    assert "were not there after 2 s (data.reading.timeout_s)" in str(record["text"])
