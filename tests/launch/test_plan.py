"""Does launch/plan.py plan the report's run as it says, and refuse what it cannot plan?"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.compose import run
from launch.plan import main
from pretrain.training.start import USER_ERRORS

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Return what runs the command in this process, and gives its exit code and what it said."""

    def command(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["plan.py", "+cluster=h200_1536", *words])
        code = run(main, user_errors=USER_ERRORS)
        said = capsys.readouterr()
        return code, said.out, said.err

    return command


def test_the_reports_run_trains_as_much_of_its_time_as_we_want(
    plan: Command, tmp_path: Path
) -> None:
    path = tmp_path / "new" / "goodput.json"
    code, out, _ = plan(f"json={path}")
    assert code == 0
    for words in (
        "527,688,113,152 parameters * 14 bytes = 7.39 TB, 4.81 GB on each of 1,536 ranks",
        "62,914,560 tokens in 40.9 s",
        "27,648 GPU-hours of 75 days",
        "write to storage       184.69  counted  goodput.persist_bytes_per_s",
        "processes and groups   300.00  assumed  goodput.init_s",
        "arXiv 2407.21783",
    ):
        assert words in out, out
    table = out[out.index("failures as") :].splitlines()
    rows = {line[:18].strip(): line[18:].split() for line in table[1:5]}
    hours = [cells[0] for cells in rows.values()]
    assert hours == ["33.0", "19.2", "5.3", "4.8"]
    assert [cells[2] for cells in rows.values()] == ["55", "94", "342", "372"]

    record = json.loads(path.read_text(encoding="utf-8"))
    assert record["command"].startswith("python ")
    assert record["commit"]
    assert record["state_bytes"] == 14 * 527_688_113_152
    by_name = {row["name"]: row for row in record["rows"]}
    # the goal at the rate of Llama 3, and what is lost by waiting for the storage
    assert by_name["Llama 3"]["simulated"]["ettr"] >= 0.97
    assert by_name["Llama 3"]["waiting"] < 0.97
    for row in record["rows"]:
        # what the closed form leaves out costs: a save that is not persisted yet is lost
        lost = record["persist_s"] / row["mtbf_s"]
        assert row["closed_form"] - row["simulated"]["ettr"] == pytest.approx(lost, abs=0.0025)
        assert row["simulated"]["standard_error"] < 0.0005
        assert row["best_closed_form"] > row["closed_form"]


def test_a_cheap_local_tier_helps_where_nodes_stay(plan: Command, tmp_path: Path) -> None:
    path = tmp_path / "goodput.json"

    def ettr(*words: str) -> float:
        assert plan("goodput.node_loss_share=0.2", "goodput.blocking_s=1", *words)[0] == 0
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        return next(r["simulated"]["ettr"] for r in rows if r["name"] == "RSC, by jobs")

    tier = ("checkpoints.local.folder=/nvme/run", "checkpoints.local.interval_steps=5")
    assert ettr(*tier, f"json={path}") > ettr(f"json={path}") + 0.02


def test_measured_times_take_the_place_of_assumed_ones(plan: Command, tmp_path: Path) -> None:
    path = tmp_path / "measured.json"
    path.write_text(json.dumps({"measured": {"blocking_s": 0.25, "detection_s": 4}}))
    code, out, _ = plan(f"goodput.measured={path}")
    assert code == 0
    assert "agreement                0.25  measured  goodput.blocking_s" in out
    assert "detection                4.00  measured  goodput.detection_s" in out
    assert "processes and groups   300.00  assumed   goodput.init_s" in out


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["action=memory"], ["action", "'memory'", "goodput"]),
        (["checkpoints.interval_steps=0"], ["checkpoints.interval_steps=0", "give 1 or more"]),
        (["goodput.tokens_per_s=0"], ["goodput.tokens_per_s=0", "above 0"]),
        (
            ["checkpoints.local.folder=/nvme/a", "checkpoints.local.interval_steps=7"],
            ["checkpoints.local.interval_steps=7", "divide"],
        ),
        (["goodput.measured=nowhere.json"], ["goodput.measured=nowhere.json", "measured"]),
        (["goodput.persist=1"], ["goodput.persist", "persist_bytes_per_s"]),
        (["layout.pp=7"], ["layout.pp=7", "1536 ranks"]),
    ],
    ids=lambda words: " ".join(words),
)
def test_a_wrong_configuration_ends_with_2_and_names_the_key(
    plan: Command, words: list[str], named: list[str]
) -> None:
    code, _, err = plan(*words)
    assert code == 2
    assert all(word in err for word in named), err


@pytest.mark.parametrize(
    "text", ["", "[]", '{"measured": {"init_s": "soon"}}', '{"measured": {"init_s": -1}}']
)
def test_measurements_that_are_none_are_refused(plan: Command, text: str, tmp_path: Path) -> None:
    path = tmp_path / "measured.json"
    path.write_text(text)
    code, _, err = plan(f"goodput.measured={path}")
    assert code == 2
    assert f"goodput.measured={path}" in err
