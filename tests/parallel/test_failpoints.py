"""Planted faults strike where they are told to, once, and a real run knows none."""

import errno
from pathlib import Path

import pytest

from parallel import failpoints
from parallel.failpoints import Fault, PlantedError, arm, at_step, failpoint, read_faults


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAULTS_FOLDER", str(tmp_path))
    monkeypatch.setattr(failpoints, "_faults", ())
    monkeypatch.setenv("RANK", "1")


def plant(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAULTS", text)
    arm()


def test_without_a_fault_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    plant("", monkeypatch)
    assert all(failpoint(point, step=3) == "" for point in failpoints.POINTS)


def test_words_become_faults() -> None:
    text = "save.half_file:kill:rank=2:step=15; step.begin:sleep=1.5:every"
    assert read_faults(text) == (
        Fault(point="save.half_file", action="kill", rank=2, step=15),
        Fault(point="step.begin", action="sleep", value=1.5, every=True),
    )


@pytest.mark.parametrize("text", ["nowhere:kill", "step.begin", "step.begin:kill:node=3"])
def test_what_is_no_fault_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="FAULTS:"):
        read_faults(text)


def test_a_fault_strikes_its_rank_at_its_step_once(monkeypatch: pytest.MonkeyPatch) -> None:
    plant("step.begin:raise:rank=1:step=7;step.begin:raise:rank=0:step=8", monkeypatch)
    at_step(6)
    failpoint("step.begin")
    failpoint("save.begin", step=7)
    at_step(7)
    with pytest.raises(PlantedError):
        failpoint("step.begin")
    failpoint("step.begin")  # a later start of the run comes by again
    at_step(8)
    failpoint("step.begin")  # another rank's


def test_a_fault_that_strikes_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    plant("save.file_written:full:every", monkeypatch)
    for _ in range(2):
        with pytest.raises(OSError, match="planted") as raised:
            failpoint("save.file_written", step=4)
        assert raised.value.errno == errno.ENOSPC


def test_what_only_the_point_can_do_is_told_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    plant("save.half_file:flip", monkeypatch)
    assert failpoint("save.half_file", step=4) == "flip"
    assert failpoint("save.half_file", step=8) == ""


def test_a_point_that_knows_what_it_looks_at_is_told_for_what_to_look(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plant("step.window:nan=17;step.window:nan=4:rank=0;step.window:nan=9:rank=1", monkeypatch)
    assert failpoints.planted_values("step.window") == (17.0, 9.0)
