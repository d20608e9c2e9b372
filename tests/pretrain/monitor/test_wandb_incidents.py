"""Does wandb hear of each incident, and a person of each that wants one, once?"""

from pathlib import Path

import pytest

from pretrain.monitor.incidents import Incident, record_incident
from pretrain.monitor.wandb_incidents import COLUMNS, IncidentMirror


def test_the_table_is_made_anew_only_when_an_incident_was_added(tmp_path: Path) -> None:
    mirror = IncidentMirror(tmp_path)
    assert mirror.rows() is None
    record_incident(tmp_path, Incident(kind="data", text="a window is damaged", step=3, rank=1))
    rows = mirror.rows()
    assert rows is not None
    assert [dict(zip(COLUMNS, row, strict=True))["text"] for row in rows] == ["a window is damaged"]
    assert mirror.rows() is None


def test_an_incident_is_told_once_over_all_starts(tmp_path: Path) -> None:
    record_incident(tmp_path, Incident(kind="hang", text="first"))
    record_incident(tmp_path, Incident(kind="lease_taken", text="nobody needs to come"))
    assert [i["text"] for i in IncidentMirror(tmp_path).to_tell()] == ["first"]
    record_incident(tmp_path, Incident(kind="failure", text="second"))
    assert [i["text"] for i in IncidentMirror(tmp_path).to_tell()] == ["second"]
    assert list(IncidentMirror(tmp_path).to_tell()) == []


@pytest.mark.parametrize("kept", ["", "x"])
def test_a_count_that_was_cut_tells_twice_rather_than_never(tmp_path: Path, kept: str) -> None:
    record_incident(tmp_path, Incident(kind="hang", text="first"))
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "alerts_told").write_text(kept)
    assert [i["text"] for i in IncidentMirror(tmp_path).to_tell()] == ["first"]


def test_a_storm_is_twenty_messages(tmp_path: Path) -> None:
    for number in range(50):
        record_incident(tmp_path, Incident(kind="failure", text=str(number)))
    told = [i["text"] for i in IncidentMirror(tmp_path).to_tell()]
    assert told == [str(number) for number in range(30, 50)]
