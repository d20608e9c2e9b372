import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from pretrain.monitor.incidents import Incident, record_incident
from pretrain.monitor.metrics import Record, find_metric
from pretrain.monitor.records import read_attempts
from pretrain.monitor.telemetry import Telemetry, open_telemetry
from pretrain.monitor.telemetry_config import TelemetryConfig
from pretrain.monitor.wandb_sink import WandbSink

ROOT = Path(__file__).resolve().parents[3]
OFFLINE = TelemetryConfig(wandb="offline", wandb_close_timeout_s=10.0)
# A call of log must not be noticed. It takes about 2 microseconds; the bound leaves room for a
# machine that is busy with other tests, and is far below any wait on a thread or a server.
LOG_BOUND_S = 0.05


class FakeRun:
    """What wandb.init returns, kept in memory."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self.x_axes: list[tuple[str, str | None]] = []
        self.is_finished = False
        self.summaries: dict[str, str | None] = {}
        self.alerts: list[tuple[str, str]] = []

    def define_metric(
        self, name: str, *, step_metric: str | None = None, summary: str | None = None
    ) -> None:
        self.x_axes.append((name, step_metric))
        self.summaries[name] = summary

    def alert(self, title: str, text: str, level: str) -> None:
        self.alerts.append((title, text))

    def log(self, data: dict[str, Any]) -> None:
        self.records.append(data)

    def finish(self) -> None:
        self.is_finished = True


class FakeTable:
    """What wandb.Table keeps."""

    def __init__(self, *, columns: list[str], data: list[list[object]]) -> None:
        self.columns, self.data = columns, data


class FakeWandb(ModuleType):
    """A wandb whose init does what the test wants."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.Table = FakeTable
        self.run = FakeRun()
        self.calls: list[dict[str, object]] = []
        self.errors: list[BaseException] = []
        self.release = threading.Event()
        self.release.set()
        self.entered = threading.Event()

    def init(self, **arguments: object) -> FakeRun:
        self.calls.append(arguments)
        self.entered.set()
        self.release.wait()
        if self.errors:
            raise self.errors.pop(0)
        return self.run

    def teardown(self) -> None:
        pass


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeWandb]:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setenv("WANDB_SILENT", "true")
    yield fake
    fake.release.set()


def log_steps(sink: WandbSink, num_steps: int) -> float:
    """Log some steps and return the seconds of the slowest call."""
    slowest_s = 0.0
    for step in range(num_steps):
        began = time.perf_counter()
        sink.log({"step": step, "loss": 1.0})
        slowest_s = max(slowest_s, time.perf_counter() - began)
    return slowest_s


def test_every_record_reaches_wandb_in_order(tmp_path: Path, wandb: FakeWandb):
    sink = WandbSink(tmp_path, OFFLINE, environment={})
    log_steps(sink, 100)
    sink.close()
    assert [record["step"] for record in wandb.run.records] == list(range(100))
    assert wandb.run.is_finished


def test_tokens_are_the_x_axis_of_everything(tmp_path: Path, wandb: FakeWandb):
    WandbSink(tmp_path, OFFLINE, environment={}).close()
    (first, axis), *others = wandb.run.x_axes
    assert (first, axis) == ("tokens", None)
    assert others[0] == ("*", "tokens")
    assert {of for _, of in others} == {"tokens"}


def test_the_table_of_runs_shows_the_best_loss_and_the_worst_norm(tmp_path: Path, wandb: FakeWandb):
    WandbSink(tmp_path, OFFLINE, environment={}).close()
    shown = wandb.run.summaries
    assert (shown["loss"], shown["gradient_norm"]) == ("min,last", "max,last")
    for name in shown.keys() - {"*"}:
        find_metric(name)  # of the registry


def test_incidents_are_a_table_and_those_that_want_a_person_alerts(
    tmp_path: Path, wandb: FakeWandb
):
    record_incident(tmp_path, Incident(kind="lease_taken", text="taken over"))
    record_incident(tmp_path, Incident(kind="diverged", text="it diverges", step=7))
    for _ in range(2):  # the second start tells nothing again
        sink = WandbSink(tmp_path, OFFLINE, environment={})
        sink.log({"step": 9, "tokens": 900, "loss": 1.0})
        sink.close()
    tables = [r["incidents"] for r in wandb.run.records if "incidents" in r]
    assert [[row[1:3] for row in table.data] for table in tables] == [
        [["lease_taken", None], ["diverged", 7]]
    ] * 2
    assert wandb.run.alerts == [(f"{tmp_path.name}: diverged", "it diverges")]


def test_an_incident_while_the_run_goes_on_is_told_at_its_end_at_the_latest(
    tmp_path: Path, wandb: FakeWandb
):
    sink = WandbSink(tmp_path, OFFLINE, environment={})
    sink.log({"step": 9, "tokens": 900, "loss": 1.0})
    record_incident(tmp_path, Incident(kind="hang", text="rank 1 is silent"))
    sink.close()
    assert wandb.run.alerts == [(f"{tmp_path.name}: hang", "rank 1 is silent")]


def test_the_run_lies_in_its_folder_under_an_id_that_stays(tmp_path: Path, wandb: FakeWandb):
    for _ in range(2):
        WandbSink(tmp_path / "tiny", OFFLINE, run_config={"lr": 1.0}, environment={}).close()
    first, second = wandb.calls
    assert first["id"] == second["id"] == (tmp_path / "tiny" / "wandb_id").read_text().strip()
    assert first["dir"] == str(tmp_path / "tiny")
    assert (first["name"], first["mode"], first["resume"]) == ("tiny", "offline", "allow")
    assert first["config"] == {"lr": 1.0}


def test_project_and_entity_come_from_the_configuration_before_the_environment(
    tmp_path: Path, wandb: FakeWandb
):
    environment = {"WANDB_PROJECT": "theirs", "WANDB_ENTITY": "team"}
    WandbSink(tmp_path, OFFLINE, environment={}).close()
    WandbSink(tmp_path, OFFLINE, environment=environment).close()
    WandbSink(
        tmp_path, TelemetryConfig(wandb="offline", project="ours"), environment=environment
    ).close()
    projects = [(call["project"], call["entity"]) for call in wandb.calls]
    assert projects == [("pretrain", None), ("theirs", "team"), ("ours", "team")]


def test_an_init_that_hangs_holds_up_neither_log_nor_close(
    tmp_path: Path, wandb: FakeWandb, caplog: pytest.LogCaptureFixture
):
    wandb.release.clear()
    sink = WandbSink(tmp_path, OFFLINE, environment={})
    assert wandb.entered.wait(10.0)
    assert log_steps(sink, 1000) < LOG_BOUND_S
    began = time.perf_counter()
    sink.close(timeout_s=0.1)
    assert time.perf_counter() - began < 5.0
    assert "gave up after 0.1 s" in caplog.text


def test_a_full_queue_drops_and_counts(
    tmp_path: Path, wandb: FakeWandb, caplog: pytest.LogCaptureFixture
):
    wandb.release.clear()
    config = TelemetryConfig(wandb="offline", wandb_queue_records=8)
    sink = WandbSink(tmp_path, config, environment={})
    assert wandb.entered.wait(10.0)
    assert log_steps(sink, 100) < LOG_BOUND_S
    assert sink.num_dropped == 92
    wandb.release.set()
    sink.close()
    assert len(wandb.run.records) == 8
    assert "92 record(s) dropped" in caplog.text


def test_a_queue_that_stays_full_does_not_hold_up_close(tmp_path: Path, wandb: FakeWandb):
    wandb.release.clear()
    config = TelemetryConfig(wandb="offline", wandb_queue_records=1)
    sink = WandbSink(tmp_path, config, environment={})
    assert wandb.entered.wait(10.0)
    log_steps(sink, 3)
    began = time.perf_counter()
    sink.close(timeout_s=0.1)
    assert time.perf_counter() - began < 5.0


@pytest.mark.parametrize("error", [RuntimeError("broken"), SystemExit(1), KeyboardInterrupt()])
def test_an_init_that_raises_is_told_once_and_ends_there(
    tmp_path: Path,
    wandb: FakeWandb,
    caplog: pytest.LogCaptureFixture,
    error: BaseException,
):
    wandb.errors = [error]
    sink = WandbSink(tmp_path, OFFLINE, environment={})
    log_steps(sink, 3)
    sink.close()
    log_steps(sink, 3)
    assert sink.is_off
    assert caplog.text.count("the run goes on without it") == 1
    assert type(error).__name__ in caplog.text


def test_a_log_that_raises_later_does_not_reach_the_run(
    tmp_path: Path,
    wandb: FakeWandb,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
):
    def refuse(_: Record) -> None:
        raise ConnectionError("service gone")

    monkeypatch.setattr(wandb.run, "log", refuse)
    sink = WandbSink(tmp_path, OFFLINE, environment={})
    log_steps(sink, 3)
    sink.close()
    assert "ConnectionError: service gone" in caplog.text


def test_without_wandb_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setitem(sys.modules, "wandb", None)
    sink = WandbSink(tmp_path, TelemetryConfig(wandb="online"), environment={})
    log_steps(sink, 3)
    sink.close()
    assert "ModuleNotFoundError" in caplog.text
    assert caplog.text.count("wandb:") == 1


def test_a_server_that_does_not_answer_means_offline(
    tmp_path: Path, wandb: FakeWandb, caplog: pytest.LogCaptureFixture
):
    wandb.errors = [ConnectionError("unreachable")]
    with caplog.at_level(logging.INFO):
        sink = WandbSink(tmp_path, TelemetryConfig(wandb="online"), environment={})
        log_steps(sink, 5)
        sink.close()
    assert [call["mode"] for call in wandb.calls] == ["online", "offline"]
    assert len(wandb.run.records) == 5
    assert "wandb sync" in caplog.text


def test_disabled_starts_nothing(tmp_path: Path, wandb: FakeWandb):
    sink = WandbSink(tmp_path, TelemetryConfig(wandb="disabled"), environment={})
    log_steps(sink, 3)
    sink.close()
    assert not wandb.calls
    assert not list(tmp_path.iterdir())


REAL_RUN = """
import logging, sys, time
from pathlib import Path
from pretrain.monitor.telemetry import open_telemetry
from pretrain.monitor.telemetry_config import TelemetryConfig
logging.basicConfig(level=logging.INFO, stream=sys.stderr)
config = TelemetryConfig(wandb=sys.argv[2], wandb_init_timeout_s=30.0,
                         wandb_close_timeout_s=float(sys.argv[3]))
telemetry = open_telemetry(Path(sys.argv[1]), config, stream=sys.stdout, total_steps=50)
for step in range(1, 51):
    telemetry.log({"step": step, "loss": 1.0 / step})
telemetry.close()
"""


def run_for_real(run_dir: Path, mode: str, close_s: float, **environment: str):
    home = run_dir.parent / "home"
    home.mkdir(exist_ok=True)
    plain = {name: text for name, text in os.environ.items() if not name.startswith("WANDB_")}
    return subprocess.run(
        [sys.executable, "-c", REAL_RUN, str(run_dir), mode, str(close_s)],
        env={**plain, "HOME": str(home), "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        cwd=home,
    )


def test_a_real_offline_run_stands_in_the_run_folder(tmp_path: Path):
    pytest.importorskip("wandb")
    run_dir = tmp_path / "tiny"
    done = run_for_real(run_dir, "auto", 30.0)
    run_id = (run_dir / "wandb_id").read_text().strip()
    [mirrored] = (run_dir / "wandb").glob(f"offline-run-*/run-{run_id}.wandb")
    assert mirrored.stat().st_size > 1000
    assert len(read_attempts(run_dir / "metrics.jsonl")) == 50
    assert "not logged in" in done.stderr
    assert "WARNING" not in done.stderr
    assert "wandb" not in done.stdout


def test_a_real_server_out_of_reach_holds_up_neither_run_nor_exit(tmp_path: Path):
    pytest.importorskip("wandb")
    run_dir = tmp_path / "tiny"
    began = time.perf_counter()
    done = run_for_real(
        run_dir, "auto", 1.0, WANDB_BASE_URL="http://127.0.0.1:9", WANDB_API_KEY="0" * 40
    )
    # 1 s to close, 2 s to clean up, and imports; wandb alone would hold the exit up for 30 s.
    assert time.perf_counter() - began < 20.0
    assert "gave up after 1.0 s" in done.stderr
    assert len(read_attempts(run_dir / "metrics.jsonl")) == 50


class ListSink:
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.is_closed = False

    def log(self, record: Record) -> None:
        self.records.append(record)

    def close(self) -> None:
        self.is_closed = True


def test_telemetry_stamps_and_hands_to_every_sink():
    sinks = [ListSink(), ListSink()]
    telemetry = Telemetry(sinks, attempt=3, clock=lambda: 1000.5)
    telemetry.log({"step": 1, "loss": 2.0})
    telemetry.close()
    expected = {"step": 1, "loss": 2.0, "attempt": 3, "time_unix_s": 1000.5}
    assert all(sink.records == [expected] and sink.is_closed for sink in sinks)


def test_telemetry_refuses_a_name_before_any_sink_sees_it():
    sink = ListSink()
    with pytest.raises(ValueError, match="'losss'"):
        Telemetry([sink], attempt=1).log({"step": 1, "losss": 2.0})
    assert not sink.records


def test_an_opened_telemetry_counts_attempts_in_file_and_mirror(tmp_path: Path, wandb: FakeWandb):
    for _ in range(2):
        stream = StringIO()
        telemetry = open_telemetry(tmp_path, OFFLINE, stream=stream, total_steps=3)
        telemetry.log({"step": 1, "loss": 2.0})
        telemetry.close()
    assert [record["attempt"] for record in read_attempts(tmp_path / "metrics.jsonl")] == [1, 2]
    assert [record["attempt"] for record in wandb.run.records] == [1, 2]
    assert "loss  2.0000" in stream.getvalue()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("wandb", "sometimes"),
        ("console_interval_steps", 0),
        ("page_interval_s", -1.0),
        ("wandb_queue_records", 0),
        ("wandb_init_timeout_s", 0.0),
        ("wandb_close_timeout_s", -1.0),
    ],
)
def test_nonsense_is_refused_by_key(key: str, value: object):
    with pytest.raises(ValueError, match=key):
        TelemetryConfig(**{key: value})  # type: ignore[arg-type]
