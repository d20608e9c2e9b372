"""Incidents are whole lines, whoever appends them, and none of them stops a run."""

import json
import os
from pathlib import Path

import pytest

from pretrain.monitor.incidents import (
    INCIDENTS_NAME,
    Incident,
    read_incidents,
    record_incident,
    this_node,
)


def test_an_incident_comes_back_as_it_was(tmp_path: Path) -> None:
    record_incident(
        tmp_path / "run",
        Incident(kind="hang", text="rank 3 waits", rank=3, step=12, detail={"stack": ["a", "b"]}),
    )
    (found,) = read_incidents(tmp_path / "run")
    assert found["kind"] == "hang"
    assert found["rank"] == 3
    assert found["step"] == 12
    assert found["detail"] == {"stack": ["a", "b"]}
    assert found["recorded_by"] == this_node()


def test_a_run_without_incidents_has_none(tmp_path: Path) -> None:
    assert read_incidents(tmp_path) == []


def test_a_cut_line_costs_only_itself(tmp_path: Path) -> None:
    record_incident(tmp_path, Incident(kind="failure", text="first"))
    with (tmp_path / INCIDENTS_NAME).open("a") as file:
        file.write('{"kind": "hang", "te\n')
    record_incident(tmp_path, Incident(kind="failure", text="second"))
    assert [found["text"] for found in read_incidents(tmp_path)] == ["first", "second"]


def test_the_job_of_the_batch_system_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "71")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "70")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    monkeypatch.setenv("SLURMD_NODENAME", "node-17")
    record_incident(tmp_path, Incident(kind="failure", text="x"))
    line = (tmp_path / INCIDENTS_NAME).read_text()
    assert json.loads(line)["job"] == "70_1"
    assert json.loads(line)["recorded_by"] == "node-17"


def test_a_disk_that_refuses_is_only_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", refuse)
    record_incident(tmp_path, Incident(kind="save_failed", text="disk is full"))
    assert "No space left" in caplog.text
