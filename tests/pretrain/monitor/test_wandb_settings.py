"""Does wandb keep to what it may record, whatever the environment asks for, and never hold up?"""

import http.server
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pretrain.monitor.records import read_attempts
from pretrain.monitor.wandb_settings import PRIVATE, wandb_settings

ROOT = Path(__file__).resolve().parents[3]

TELEMETRY = """
import logging, sys, time
from pathlib import Path
from pretrain.monitor.telemetry import open_telemetry
from pretrain.monitor.telemetry_config import TelemetryConfig
logging.basicConfig(level=logging.INFO, stream=sys.stderr)
close_s = float(sys.argv[3])
config = TelemetryConfig(
    wandb=sys.argv[2], wandb_init_timeout_s=3.0, wandb_close_timeout_s=close_s
)
telemetry = open_telemetry(Path(sys.argv[1]), config, stream=sys.stdout, total_steps=200)
took = []
for step in range(1, 201):
    began = time.perf_counter()
    telemetry.log({"step": step, "loss": 1.0 / step})
    took.append(time.perf_counter() - began)
    time.sleep(0.005)
began = time.perf_counter()
telemetry.close()
print("TOOK", sorted(took)[100], max(took), time.perf_counter() - began)
"""


def run(
    folder: Path, mode: str, close_s: float = 2.0, /, **environment: str
) -> subprocess.CompletedProcess[str]:
    home = folder / "home"
    home.mkdir(exist_ok=True)
    plain = {name: text for name, text in os.environ.items() if not name.startswith("WANDB_")}
    return subprocess.run(
        [sys.executable, "-c", TELEMETRY, str(folder / "run"), mode, str(close_s), "--canary-word"],
        env={**plain, "HOME": str(home), "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=90,
        cwd=home,
    )


def test_the_environment_cannot_make_wandb_record_more(tmp_path: Path) -> None:
    """wandb's own variables for each of the settings, all of them turned on."""
    pytest.importorskip("wandb")
    on = {"WANDB_SAVE_CODE": "true", "WANDB_CONSOLE": "wrap", "WANDB_DISABLE_CODE": "false"}
    on |= {"WANDB_DISABLE_GIT": "false", "WANDB_X_DISABLE_META": "false"}
    on |= {"WANDB_X_SAVE_REQUIREMENTS": "true", "WANDB_DISABLE_JOB_CREATION": "false"}
    done = run(tmp_path, "offline", **on)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    kept = {path.name for path in (folder / "files").rglob("*") if path.is_file()}
    assert kept == set()
    (recorded,) = folder.glob("run-*.wandb")
    content = recorded.read_bytes()
    for word in (b"--canary-word", b"TOOK", sys.executable.encode()):
        assert word not in content


def test_every_private_setting_is_one_that_wandb_knows() -> None:
    """wandb refuses unknown settings only with a warning, which a run would not show."""
    settings = pytest.importorskip("wandb").Settings()
    given = wandb_settings(init_timeout_s=1.0, finish_timeout_s=2.0, stop=lambda: None)
    for name in given:
        assert hasattr(settings, name), name
    assert {name: given[name] for name in PRIVATE} == PRIVATE
    assert (given["init_timeout"], given["finish_timeout"]) == (1.0, 2.0)


class Refusing(http.server.BaseHTTPRequestHandler):
    """A server to which every key is unknown, as after it was revoked."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(401)
        self.end_headers()
        self.wfile.write(b'{"errors":[{"message":"invalid api key"}]}')

    do_GET = do_POST  # noqa: N815  http.server's name

    def log_message(self, *_: object) -> None:  # type: ignore[override]  says nothing
        pass


@pytest.fixture
def revoked() -> Iterator[str]:
    """Yield the address of a server on this machine that refuses every key."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("server", ["unreachable", "revoked"])
def test_a_server_out_of_reach_or_a_revoked_key_costs_a_run_nothing(
    tmp_path: Path, server: str, revoked: str
) -> None:
    pytest.importorskip("wandb")
    address = "http://127.0.0.1:9" if server == "unreachable" else revoked
    began = time.perf_counter()
    done = run(tmp_path, "online", WANDB_BASE_URL=address, WANDB_API_KEY="0" * 40)
    elapsed_s = time.perf_counter() - began
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert len(read_attempts(tmp_path / "run" / "metrics.jsonl")) == 200
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("TOOK ")]
    median_s, _, close_s = map(float, line.split()[1:])
    # without wandb a record takes some 30 microseconds; the margin is for a machine that is busy
    assert median_s < 0.002
    assert close_s < 2.0 + 2.0 + 3.0  # its own bound, ending the service, and a margin
    assert elapsed_s < 45.0


def test_a_run_that_went_offline_can_be_uploaded_later(tmp_path: Path, revoked: str) -> None:
    pytest.importorskip("wandb")
    # A busy machine takes its time to begin a second run, offline, after the first was refused.
    done = run(tmp_path, "online", 30.0, WANDB_BASE_URL=revoked, WANDB_API_KEY="0" * 40)
    assert done.returncode == 0, done.stderr
    assert "offline, the server did not take the run" in done.stderr
    assert "upload with: wandb sync" in done.stderr
    (recorded,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    assert recorded.read_bytes().count(b"time_unix_s") >= 200
