"""Is an event that is known told in full, and is a question that cannot be answered refused?"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.compose import run
from launch.explain_spike import main
from parallel.layout import Layout
from parallel.spawn import RankPool
from pretrain.monitor.event_bundle import bundle_path, find_bundles, read_bundle, write_bundle
from pretrain.training.run import Run
from tests.launch.short_runs import train_some
from tests.pretrain.training.recorded_steps import recorded_steps

Explain = Callable[..., tuple[int, str, str]]


@pytest.fixture
def explain(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Explain:
    """Return what runs the command here and gives its exit code, output and errors."""

    def command(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["explain_spike.py", *words])
        code = run(main)
        said = capsys.readouterr()
        return code, said.out, said.err

    return command


@pytest.fixture(scope="module")
def told(tiny_run: Callable[..., Run], two_ranks: RankPool) -> Path:
    """Return the folder of a run of four steps with an event at the third."""
    made = tiny_run(Layout(num_ranks=2, ep=2), name="told")
    two_ranks.run(train_some, made, leave_after=1)
    two_ranks.run(recorded_steps, made, num_steps=4, event_at=2)
    return made.folder


def test_an_event_is_told_in_full(told: Path, explain: Explain, tmp_path: Path) -> None:
    output = tmp_path / "out" / "spike.json"
    code, text, _ = explain(f"run={told}", f"output={output}", "sequences=2")
    assert code == 0
    bundle = read_bundle(find_bundles(told)[0])
    assert text.startswith("flagged at step 2, batch 2 of run told, attempt 1\n")
    assert f"likely cause: {bundle['cause']['kind']}" in text
    assert "computed again: same again" in text
    for slot in bundle["worst"][:2]:
        assert f"sample {slot['sample']}: {slot['bucket']}" in text
        assert all(piece["place"] in text for piece in slot["pieces"])
    assert f"action=explain run={told} sample={bundle['worst'][0]['sample']}" in text
    assert "experts: the busiest of layer" in text
    (written,) = json.loads(output.read_text())
    assert written["sequences"] == bundle["sequences"]


def test_text_that_was_not_there_is_read_now(told: Path, explain: Explain) -> None:
    (path,) = find_bundles(told)
    bundle = read_bundle(path)
    places = {piece["place"] for slot in bundle["worst"] for piece in slot["pieces"]}
    for slot in bundle["worst"]:
        del slot["pieces"]
    other = bundle_path(told, step=3, batch=3, kind="flagged")
    late = {**bundle, "text_problem": "the text was not read within 10 s"}
    write_bundle(other, late)
    try:
        code, text, _ = explain(f"run={told}", "event=3", "sequences=8")
    finally:
        other.unlink()
    assert code == 0
    assert "not read within" not in text
    assert all(place in text for place in places)


def test_a_run_without_events_is_no_error(tmp_path: Path, explain: Explain) -> None:
    code, text, _ = explain(f"run={tmp_path}")
    assert (code, text) == (
        0,
        f"{tmp_path} has had no events: no batch was left out, no loss has spiked\n",
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["event=7"], "has events of the steps [2], or event=latest is allowed"),
        (["event=newest"], "latest, or a step is allowed"),
        (["sequences=0"], "at least 1 is allowed"),
    ],
)
def test_a_question_without_an_answer_is_refused(
    words: list[str], said: str, told: Path, explain: Explain
) -> None:
    code, _, error = explain(f"run={told}", *words)
    assert code == 2
    assert said in error


def test_no_run_is_refused(explain: Explain) -> None:
    code, _, error = explain("run=/no/such/run")
    assert code == 2
    assert "the folder of a run is allowed" in error


def test_a_damaged_bundle_is_refused_by_its_name(
    told: Path, explain: Explain, tmp_path: Path
) -> None:
    damaged: Any = bundle_path(tmp_path, step=1, batch=1, kind="skip")
    damaged.parent.mkdir()
    damaged.write_bytes(find_bundles(told)[0].read_bytes()[:-20])
    code, _, error = explain(f"run={tmp_path}")
    assert code == 2
    assert damaged.name in error
