"""Does an offline run hold everything that metrics.jsonl holds, to be uploaded later?"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pretrain.monitor.incidents import Incident, record_incident
from pretrain.monitor.records import read_attempts
from tests.pretrain.monitor.wandb_file import records_of

ROOT = Path(__file__).resolve().parents[3]

TELEMETRY = """
import sys
from pathlib import Path
from pretrain.monitor.telemetry import open_telemetry
from pretrain.monitor.telemetry_config import TelemetryConfig
config = TelemetryConfig(wandb="offline", wandb_close_timeout_s=60.0)
telemetry = open_telemetry(
    Path(sys.argv[1]), config, stream=sys.stderr, total_steps=400, run_config={"seed": 3}
)
for step in range(1, 401):
    record = {"step": step, "tokens": 64 * step, "loss": 9.0 / step, "consumed": "ab"}
    if step % 10 == 0:
        record |= {f"layer/{layer}/residual_rms": step / (layer + 3) for layer in range(200)}
    telemetry.log(record)
telemetry.log({"step": 400, "tokens": 25600, "validation/loss": float("inf")})
telemetry.close()
"""


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run with 200 layers, an incident and a value that is no number."""
    pytest.importorskip("wandb")
    folder = tmp_path_factory.mktemp("offline")
    run_dir = folder / "tiny"
    record_incident(run_dir, Incident(kind="diverged", text="it diverges", step=7))
    plain = {name: text for name, text in os.environ.items() if not name.startswith("WANDB_")}
    subprocess.run(
        [sys.executable, "-c", TELEMETRY, str(run_dir)],
        env={**plain, "HOME": str(folder), "PYTHONPATH": str(ROOT)},
        check=True,
        capture_output=True,
        timeout=120,
        cwd=folder,
    )
    return run_dir


def mirrored(run_dir: Path) -> list[Any]:
    (path,) = (run_dir / "wandb").glob("offline-run-*/run-*.wandb")
    return list(records_of(path))


def test_the_offline_file_holds_every_record_to_the_last(run_dir: Path) -> None:
    history: list[dict[str, Any]] = []
    for record in mirrored(run_dir):
        if record.WhichOneof("record_type") == "history":
            items = {
                item.key or ".".join(item.nested_key): json.loads(item.value_json)
                for item in record.history.item
            }
            history.append({k: v for k, v in items.items() if not k.startswith("_")})
    tables = [line for line in history if "incidents.nrows" in line]
    metrics = [line for line in history if line not in tables]
    written = read_attempts(run_dir / "metrics.jsonl")
    assert len(written) == 401
    assert [comparable(line) for line in metrics] == [comparable(line) for line in written]
    assert [table["incidents.nrows"] for table in tables] == [1]


def comparable(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record with what is no finite number as a word, as JSON has it."""
    return {
        name: str(value).lower() if isinstance(value, float) and not math.isfinite(value)
        else {"infinity": "inf"}.get(str(value).lower(), value)
        for name, value in record.items()
    }  # fmt: skip


def test_its_axes_its_alert_and_its_versions_are_in_the_file(run_dir: Path) -> None:
    records = mirrored(run_dir)
    kinds = [record.WhichOneof("record_type") for record in records]
    metrics = [record.metric for record in records if record.WhichOneof("record_type") == "metric"]
    assert ("*", "tokens") in {(m.glob_name or m.name, m.step_metric) for m in metrics}
    (alert,) = [r.alert for r in records if r.WhichOneof("record_type") == "alert"]
    assert (alert.title, alert.text) == ("tiny: diverged", "it diverges")
    (run,) = [r.run for r in records if r.WhichOneof("record_type") == "run"]
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["seed"] == 3
    assert {"torch", "megatron-core", "code"} <= set(config["versions"])
    assert kinds.count("exit") == 1
