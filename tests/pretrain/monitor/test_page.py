"""Is the page of a run one file with the right points, whatever the run has written?"""

import json
import re
from pathlib import Path

import pytest

from pretrain.monitor.curves import Curves
from pretrain.monitor.dashboard import ROWS
from pretrain.monitor.incidents import Incident, record_incident
from pretrain.monitor.metrics import Value
from pretrain.monitor.page import (
    MAX_PAGE_BYTES,
    PAGE_NAME,
    Written,
    page_text,
    write_page,
)

NOW = Written(unix_s=2e9, is_live=True)
HOSTILE = "</script><script>alert(1)</script><!-- &amp; "


def run_folder(tmp_path: Path, *records: dict[str, Value]) -> Path:
    folder = tmp_path / "tiny"
    folder.mkdir()
    lines = [{"attempt": 1, "time_unix_s": 1e9 + i, **r} for i, r in enumerate(records)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def page_of(folder: Path) -> str:
    write_page(folder, folder / PAGE_NAME)
    return (folder / PAGE_NAME).read_text()


def data_of(page: str) -> dict:
    (inlined,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page)
    return json.loads(inlined)


def panels_of(data: dict) -> dict[str, dict]:
    return {panel["title"]: panel for row in data["rows"] for panel in row["panels"]}


def steps(count: int, **more: Value) -> list[dict[str, Value]]:
    return [
        {"step": s, "tokens": 64 * s, "loss": 3.0 / s, "gradient_norm": 1.0 + s, **more}
        for s in range(1, count + 1)
    ]


def test_a_page_holds_every_step_of_a_short_run(tmp_path: Path) -> None:
    data = data_of(page_of(run_folder(tmp_path, *steps(20))))
    (loss,) = panels_of(data)["Loss"]["series"]
    assert loss["steps"] == list(range(1, 21))
    assert loss["values"] == pytest.approx([3.0 / s for s in range(1, 21)], rel=1e-6)
    assert data["last"] == {"step": 20, "tokens": 1280}


def test_a_longer_run_has_the_running_mean_of_its_loss_beside_it(tmp_path: Path) -> None:
    data = data_of(page_of(run_folder(tmp_path, *steps(300))))
    loss, mean = panels_of(data)["Loss"]["series"]
    expected = 0.0
    for number, value in enumerate(loss["values"], start=1):
        expected += max(0.1, 1 / number) * (value - expected)
    assert mean["isMean"]
    assert mean["values"][-1] == pytest.approx(expected, rel=1e-5)


def test_what_was_not_recorded_is_named_and_has_no_panel(tmp_path: Path) -> None:
    data = data_of(page_of(run_folder(tmp_path, *steps(3))))
    for row, described in zip(data["rows"], ROWS, strict=True):
        named = {title for title, _ in row["missing"]}
        shown = {panel["title"] for panel in row["panels"]} - {"incidents, 24 h"}
        assert named | shown == {panel.title for panel in described.panels}
        assert not named & shown
    assert panels_of(data).keys() >= {"Loss", "Gradient norm"}


def test_nothing_that_a_run_writes_ends_the_script_or_becomes_markup(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, *steps(3, stage=HOSTILE))
    with (folder / "metrics.jsonl").open("a") as file:
        named = f"validation/{HOSTILE}/loss"  # a file that another program has written
        file.write(json.dumps({"step": 3, "attempt": 1, named: 2.0}) + "\n")
    record_incident(folder, Incident(kind="data", text=HOSTILE, step=2, node=HOSTILE))
    (folder / "ledger.jsonl").write_text(
        json.dumps({"kind": "skip", "first_batch": 1, "num_batches": 1, "reason": HOSTILE}) + "\n"
    )
    page = page_of(folder)
    data = data_of(page)
    assert "alert(1)" in json.dumps(data["tables"])  # it is told, as text
    assert page.count("</script>") == 2  # the template's own
    assert "<script>alert" not in page
    assert "innerHTML" not in page


def test_a_folder_with_markup_in_its_name_is_shown_as_text(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, *steps(2)).rename(tmp_path / "<b>&x")
    assert "<title>&lt;b&gt;&amp;x</title>" in page_of(folder)


def test_the_page_needs_nothing_from_elsewhere(tmp_path: Path) -> None:
    page = page_of(run_folder(tmp_path, *steps(2)))
    assert not re.search(r"(?:src|href)=\"(?!data:)", page)
    assert "default-src 'none'" in page
    assert [url for url in re.findall(r"https?://[^\"' ]+", page) if "w3.org" not in url] == []


def test_it_loads_again_until_the_run_is_over(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, *steps(2))
    assert 'http-equiv="refresh"' in page_of(folder)
    (folder / "summary.json").write_text("{}")
    page = page_of(folder)
    assert 'http-equiv="refresh"' not in page
    assert data_of(page)["state"] == "finished"


def test_a_large_model_on_a_long_run_stays_within_the_size(tmp_path: Path) -> None:
    curves = Curves()
    kinds = ("load_max_over_mean", "load_min_over_mean", "router_entropy", "residual_rms",
             "residual_abs_max", "attention_logit_max", "router_bias_range")  # fmt: skip
    for step in range(1, 400):
        record: dict[str, Value] = {
            "step": step * 50,
            "attempt": 1,
            "loss": 1 / step,
            "tokens": step**2 * 1000,
        }
        for layer in range(62):
            record |= {f"layer/{layer}/{kind}": (step * 7919 % 1013) / 7 for kind in kinds}
            for part in range(6):
                record[f"module/layer_{layer}.p{part}/gradient_norm"] = step / (layer + 1.1)
                record[f"module/layer_{layer}.p{part}/update_over_weight"] = 1e-3 / (layer + 1.1)
        curves.add(record)
    page = page_text(tmp_path, curves, written=NOW)
    assert len(page) < MAX_PAGE_BYTES + 50_000
    cells = panels_of(data_of(page))["Residual stream, RMS"]["values"]
    assert len(cells) == 62
    assert max(v for row in cells for v in row) == pytest.approx(
        max(step * 7919 % 1013 for step in range(1, 400)) / 7, rel=1e-3
    )


def test_values_that_are_no_numbers_reach_the_page_as_words(tmp_path: Path) -> None:
    records = steps(5)
    records[2]["loss"] = "NaN"
    shown = panels_of(data_of(page_of(run_folder(tmp_path, *records))))["Loss"]["series"][0]
    assert shown["values"][2] == "nan"


def test_incidents_starts_and_the_ledger_are_marked_and_listed(tmp_path: Path) -> None:
    records = [*steps(4, rewinds=0), *[{**r, "attempt": 2} for r in steps(6, rewinds=1)[2:]]]
    folder = run_folder(tmp_path, *records)
    record_incident(folder, Incident(kind="hang", text="rank 1 is silent", step=4))
    data = data_of(page_of(folder))
    told = {(mark["kind"], mark["step"]) for mark in data["marks"]}
    assert told == {("start", 3), ("incident", 4), ("rewind", 3)}
    incidents, _, starts = data["tables"]
    assert incidents["rows"][0][1:3] == ["hang", 4]
    assert [row[:4] for row in starts["rows"]] == [[2, 3, 6, 2], [1, 1, 4, 0]]
    assert panels_of(data)["incidents, 24 h"]["value"] == 1


def test_a_run_that_has_written_nothing_yet_has_a_page(tmp_path: Path) -> None:
    data = data_of(page_of(run_folder(tmp_path)))
    assert [len(row["panels"]) for row in data["rows"]] == [1, 0, 0, 0, 0, 0]


def test_colours_tell_apart_what_is_nearly_alike(tmp_path: Path) -> None:
    records = [r | {"layer/0/residual_rms": 1 + r["step"] * 1e-5} for r in steps(9)]  # type: ignore[operator]  a number
    cells = panels_of(data_of(page_of(run_folder(tmp_path, *records))))["Residual stream, RMS"]
    (row,) = cells["values"]
    assert row == pytest.approx([1 + step * 1e-5 for step in range(1, 10)], abs=1e-7)
