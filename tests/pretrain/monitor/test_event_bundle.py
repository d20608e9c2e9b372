"""Is a bundle what was written, without secrets, and is its series that of the model that lives?"""

import json
import math
from pathlib import Path

import pytest

from pretrain.monitor.event_bundle import (
    bundle_path,
    find_bundles,
    last_records,
    read_bundle,
    step_of,
    write_bundle,
)


def test_what_is_written_comes_back_and_secrets_do_not(tmp_path: Path) -> None:
    path = bundle_path(tmp_path, step=20, batch=21, kind="skip")
    text = "key hf_" + "a" * 34
    write_bundle(path, {"loss": math.nan, "norms": [math.inf, -math.inf, 1.5], "text": text})
    found = read_bundle(path)
    assert math.isnan(found["loss"])
    assert found["norms"] == [math.inf, -math.inf, 1.5]
    assert found["text"] == "key ***"
    json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert [item.name for item in path.parent.iterdir()] == [
        "step_00000020_batch_00000021_skip.json"
    ]


def test_bundles_are_found_by_step_and_batch(tmp_path: Path) -> None:
    assert find_bundles(tmp_path) == []
    paths = [
        bundle_path(tmp_path, step=9, batch=9, kind="skip"),
        bundle_path(tmp_path, step=9, batch=10, kind="skip"),
        bundle_path(tmp_path, step=100, batch=101, kind="diverged"),
    ]
    for path in reversed(paths):
        write_bundle(path, {})
    (paths[0].parent / ".tmp-abc").touch()
    (paths[0].parent / "step_note.json").touch()
    assert find_bundles(tmp_path) == paths
    assert [step_of(path) for path in paths] == [9, 9, 100]


@pytest.mark.parametrize("content", ['{"version": 0}', "[]", "{", ""])
def test_what_is_no_bundle_is_refused_by_its_name(content: str, tmp_path: Path) -> None:
    path = tmp_path / "step_00000001_batch_00000001_skip.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="step_00000001_batch_00000001_skip"):
        read_bundle(path)


def test_a_series_ends_with_the_step_and_has_what_was_taken_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert last_records(path, before=10, most=4) == []
    records = [{"step": step, "attempt": 1, "loss": 9.0} for step in range(1, 13)]
    records += [{"step": step, "attempt": 2, "loss": 1.0} for step in range(8, 11)]
    records += [{"step": 10, "attempt": 2, "validation_s": 3.0}]
    path.write_text("".join(json.dumps(one) + "\n" for one in records) + '{"step": 11, "att')
    found = last_records(path, before=10, most=4)
    assert [(one["step"], one["loss"]) for one in found] == [
        (7, 9.0),
        (8, 1.0),
        (9, 1.0),
        (10, 1.0),
    ]


def test_of_a_long_history_the_end_alone_is_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    text = "x" * 1000
    with path.open("w") as file:
        for step in range(3000):
            file.write(json.dumps({"step": step, "attempt": 1, "loss": 1.0, "stage": text}) + "\n")
    found = last_records(path, before=2999, most=64)
    assert [one["step"] for one in found] == list(range(2936, 3000))
