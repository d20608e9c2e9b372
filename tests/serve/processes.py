"""How are commands and servers started, waited for, and always ended?

Each has its own process group, so that what it starts in turn ends with it, and its own log file,
whose last lines are shown if it fails.
"""

import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LOG_LINES = 25
END_TIMEOUT_S = 20
POLL_S = 0.5


class ServeError(RuntimeError):
    """A command or a server that did not do what the check needs; the message has its log."""


def run_logged(
    command: Sequence[str | Path],
    *,
    log: Path,
    timeout_s: float,
    folder: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> None:
    """Run a command to its end, its output in `log`.

    Args:
        command: the program and its words.
        log: written anew.
        timeout_s: after it the command and all it started are ended.
        folder: where it runs; None: here.
        environment: variables besides this process's.

    Raises:
        ServeError: if it fails or takes too long, with the last lines of its log.
    """
    with started(command, log=log, folder=folder, environment=environment) as process:
        try:
            code = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise ServeError(f"not done after {timeout_s:.0f} s: {told(command, log)}") from None
    if code:
        raise ServeError(f"exit code {code}: {told(command, log)}")


@contextmanager
def serving(
    command: Sequence[str | Path],
    *,
    port: int,
    log: Path,
    timeout_s: float,
    folder: Path,
    environment: Mapping[str, str],
) -> Iterator[str]:
    """Start an HTTP server, yield its URL once /health answers, and end it with all it started.

    Args:
        command: the program and its words; told to listen on `port`.
        port: of 127.0.0.1.
        log: written anew.
        timeout_s: for the start.
        folder: where it runs. Not the repository's root: `python -m` would import from there, and
            vLLM's transformers takes our package `kernels` for the one on PyPI.
        environment: variables besides this process's.

    Raises:
        ServeError: if it ends or has not answered by then, with the last lines of its log.
    """
    url = f"http://127.0.0.1:{port}"
    with started(command, log=log, folder=folder, environment=environment) as process:
        deadline = time.monotonic() + timeout_s
        while not answers(f"{url}/health"):
            if process.poll() is not None:
                raise ServeError(f"exit code {process.returncode}: {told(command, log)}")
            if time.monotonic() > deadline:
                raise ServeError(f"no answer after {timeout_s:.0f} s: {told(command, log)}")
            time.sleep(POLL_S)
        yield url


@contextmanager
def started(
    command: Sequence[str | Path],
    *,
    log: Path,
    folder: Path | None,
    environment: Mapping[str, str] | None,
) -> Iterator[subprocess.Popen[bytes]]:
    """Start a command in a process group of its own; on leaving, end what is left of the group."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [str(word) for word in command],
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        )
    try:
        yield process
    finally:
        end_group(process)


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Ask a process group to end, and force it after END_TIMEOUT_S."""
    for sent in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + END_TIMEOUT_S
        signal_group(process, sent)
        while signal_group(process, 0) and time.monotonic() < deadline:
            time.sleep(0.1)


def signal_group(process: subprocess.Popen[bytes], sent: int) -> bool:
    """Return whether the group still has members, each of which got the signal; 0 only asks."""
    process.poll()  # an ended leader stays a member until it is waited for
    try:
        os.killpg(process.pid, sent)
    except ProcessLookupError:
        return False
    return True


def free_port() -> int:
    """Return a port of 127.0.0.1 that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def answers(url: str) -> bool:
    """Return whether a GET is answered with 200."""
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:
            return reply.status == 200
    except (urllib.error.URLError, OSError):
        return False


def ask(url: str, body: Mapping[str, Any], *, timeout_s: float) -> dict[str, Any]:
    """Return the JSON that a POST of `body` is answered with.

    Raises:
        ServeError: if the answer is not 200 or does not come in time, with what was said instead.
    """
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as reply:
            return json.load(reply)
    except urllib.error.HTTPError as error:
        said = error.read().decode(errors="replace")
        raise ServeError(f"{url} answered {error.code} to {json.dumps(body)}: {said}") from error
    except OSError as error:
        raise ServeError(f"{url} did not answer {json.dumps(body)}: {error}") from error


def told(command: Sequence[str | Path], log: Path) -> str:
    """Return a command and the last lines of its log."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:]
    words = " ".join(str(word) for word in command)
    return "\n".join([words, f"--- the end of {log}", *lines, "---"])
