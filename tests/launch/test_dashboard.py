"""Does the command write pages and describe workspaces, and refuse in the user's words?"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.monitor.dashboard import ROWS
from pretrain.monitor.workspace import Project, describe_workspace

ROOT = Path(__file__).resolve().parents[2]


def dashboard(home: Path, *words: str) -> subprocess.CompletedProcess[str]:
    plain = {name: text for name, text in os.environ.items() if not name.startswith("WANDB_")}
    return subprocess.run(
        [sys.executable, str(ROOT / "launch" / "dashboard.py"), *words],
        env={**plain, "HOME": str(home)},
        capture_output=True,
        text=True,
        cwd=home,
        timeout=60,
    )


def test_the_page_of_a_run_is_written_where_it_is_wanted(tmp_path: Path) -> None:
    run = tmp_path / "tiny"
    run.mkdir()
    (run / "metrics.jsonl").write_text(json.dumps({"step": 1, "attempt": 1, "loss": 2.0}) + "\n")
    done = dashboard(tmp_path, "run=tiny", "output=pages/a.html")
    assert (done.returncode, done.stderr) == (0, "")
    assert "pages/a.html" in done.stdout
    assert (tmp_path / "pages" / "a.html").read_text().startswith("<!doctype html>")


def test_what_is_no_run_is_refused_by_key(tmp_path: Path) -> None:
    done = dashboard(tmp_path, "run=nowhere")
    assert done.returncode == 2
    assert "run=nowhere given" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_workspace_without_a_login_is_refused_with_what_to_set(tmp_path: Path) -> None:
    done = dashboard(tmp_path, "wandb=true", "entity=team")
    assert done.returncode == 2
    assert "WANDB_API_KEY" in done.stderr
    assert "Traceback" not in done.stderr


# wandb-workspaces' own, when it is imported
@pytest.mark.filterwarnings("ignore:Pydantic V1 style:DeprecationWarning")
def test_the_workspace_has_every_row_and_every_metric(tmp_path: Path) -> None:
    pytest.importorskip("wandb_workspaces")
    view = describe_workspace(Project(entity="team", name="ours"))
    sections = [s for s in view["spec"]["section"]["panelBankConfig"]["sections"] if s["panels"]]
    assert [section["name"] for section in sections] == [row.title for row in ROWS]
    for section, row in zip(sections, ROWS, strict=True):
        panels = section["panels"][: len(row.panels)]
        for drawn, panel in zip(panels, row.panels, strict=True):
            config = drawn["config"]
            assert config["chartTitle"] == panel.title
            if "metricRegex" in config:
                assert config["useMetricRegex"]
                for entry in panel.entries:
                    assert entry.pattern.pattern in config["metricRegex"]
            else:
                assert config["metrics"] == list(panel.metrics)
            if panel.kind != "number":
                assert config["xAxis"] == "tokens"
    assert sections[-1]["panels"][-1]["config"]["panel2Config"]["exp"]["fromOp"]["inputs"]["key"][
        "val"
    ] == "incidents"  # fmt: skip


def test_the_workspace_can_be_read_before_it_is_saved(tmp_path: Path) -> None:
    pytest.importorskip("wandb_workspaces")
    done = dashboard(tmp_path, "wandb=true", "dry=true", "entity=team", "project=ours")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["entity"] == "team"
