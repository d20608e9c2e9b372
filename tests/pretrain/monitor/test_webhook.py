"""Incidents reach a real HTTP server, once each, and a server that is gone costs nothing."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from pretrain.monitor.incidents import Incident, record_incident
from pretrain.monitor.webhook import VARIABLE, Webhook, posted_incidents


class Server(HTTPServer):
    """Keeps what is posted; answers with `status`."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.posted: list[dict[str, object]] = []
        self.status = 200

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/hook"

    def texts(self) -> list[object]:
        return [body["text"] for body in self.posted]


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.server.status == 200:
            self.server.posted.append(json.loads(body))  # before the answer, which ends the wait
        self.send_response(self.server.status)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    found = Server()
    thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield found
    found.shutdown()
    thread.join()
    found.server_close()


def happen(folder: Path, text: str) -> None:
    record_incident(folder, Incident(kind="alarm", text=text, step=7))


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_every_new_incident_is_posted_once_in_words_and_whole(
    server: Server, tmp_path: Path
) -> None:
    happen(tmp_path, "of a start before this one")
    hook = Webhook(tmp_path, server.url, name="demo", interval_s=0.02)
    happen(tmp_path, "first")
    wait_until(lambda: len(server.posted) == 1)
    happen(tmp_path, "second")
    hook.close()  # posts what is left
    assert server.texts() == ["demo: alarm: first", "demo: alarm: second"]
    incident = server.posted[0]["incident"]
    assert isinstance(incident, dict)
    assert (incident["step"], incident["kind"]) == (7, "alarm")


def test_what_could_not_be_posted_is_by_the_next_start(server: Server, tmp_path: Path) -> None:
    server.status = 503
    happen(tmp_path, "before the first start")
    hook = Webhook(tmp_path, server.url, name="demo", interval_s=0.02)
    happen(tmp_path, "first")
    time.sleep(0.2)
    server.status = 200
    wait_until(lambda: len(server.posted) == 1)
    hook.close()
    happen(tmp_path, "between two starts")
    Webhook(tmp_path, server.url, name="demo").close()
    assert server.texts() == ["demo: alarm: first", "demo: alarm: between two starts"]


def test_a_run_moved_aside_begins_anew(server: Server, tmp_path: Path) -> None:
    hook = Webhook(tmp_path, server.url, name="demo", interval_s=0.02)
    happen(tmp_path, "a long text of the run that is moved aside")
    wait_until(lambda: len(server.posted) == 1)
    (tmp_path / "incidents.jsonl").unlink()
    happen(tmp_path, "new")
    hook.close()
    assert server.texts()[1:] == ["demo: alarm: new"]


def test_a_hook_that_is_gone_or_refuses_costs_nothing_and_is_never_named(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gone = Webhook(tmp_path, "http://127.0.0.1:9/private-path", name="demo", interval_s=0.02)
    server.status = 404
    refuses = Webhook(tmp_path, server.url, name="demo", interval_s=0.02)
    happen(tmp_path, "first")
    begun = time.monotonic()
    gone.close()
    refuses.close()
    assert time.monotonic() - begun < 5
    said = " ".join(record.getMessage() for record in caplog.records)
    assert "not reached (URLError)" in said
    assert "refused with status 404" in said
    assert "private-path" not in said
    assert "/hook" not in said


def test_the_environment_names_the_hook(
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with posted_incidents(tmp_path, name="demo"):
        happen(tmp_path, "nobody is told")
    monkeypatch.setenv(VARIABLE, server.url)
    with posted_incidents(tmp_path, name="demo"):
        happen(tmp_path, "told")
    assert server.texts() == ["demo: alarm: told"]
    monkeypatch.setenv(VARIABLE, "ftp://host/x")
    with posted_incidents(tmp_path, name="demo"):
        pass
    assert "http:// or https:// is allowed" in caplog.text
